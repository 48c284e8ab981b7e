"""Quantising tensor by tensor: the same numbers, whatever interrupts it, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pangu_jax
from pangu_jax import build
from pangu_jax.checkpoint import hf, names, safetensors, save, streamed
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.errors import CheckpointError
from pangu_jax.quant import scheme as schemes
from tests import folders, quantised_reader
from tests.pangu_jax.checkpoint.test_load import check_message, same
from tests.pangu_jax.checkpoint.test_quantised import BASES, both, equal, recipe_of

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]

ROOT = Path(__file__).parent.parent.parent.parent
INDEX = "model.safetensors.index.json"
COMPANIONS = {
    "generation_config.json": b'{"do_sample": true, "eos_token_id": [2, 7]}\n',
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": '{"chat_template": "盘古"}'.encode(),
}
NOT_COPIED = ("modeling_openpangu_dense.py", "README.md", "quantising.json")


def said_of(source: Path, recipe: str = "w8a8", how: Any = "compressed-tensors") -> Description:
    raw = hf.read_config(source)[1]
    return Description(recipe_of(recipe, raw), how)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse(source: Path, target: Path, *words: str, said: Description | None = None) -> str:
    """The one line with which quantising is refused; it contains every word."""
    with pytest.raises(CheckpointError) as caught:
        streamed.quantise(source, target, said or said_of(source))
    message = str(caught.value)
    check_message(message)
    for word in words:
        assert word in message
    return message


def refused(source: Path, target: Path) -> str | None:
    """The one line with which quantising to w8a8 is refused, if it is."""
    try:
        streamed.quantise(source, target, said_of(source))
    except CheckpointError as error:
        check_message(str(error))
        return str(error)
    return None


# --- the same numbers ---------------------------------------------------------------------------

CASES = [
    ("dense", "mixed", "float16", "compressed-tensors"),
    ("dense", "w8a8", "bfloat16", "msmodelslim"),
    ("moge", "w4a16", "bfloat16", "compressed-tensors"),
    ("moge", "fp8", "float32", "compressed-tensors"),
]
SLOW_CASES = [
    ("dense", "w8a16", "float32", "compressed-tensors"),
    ("dense", "w4a16", "float16", "compressed-tensors"),
    ("dense", "fp8", "bfloat16", "compressed-tensors"),
    ("moge", "w8a8", "float16", "compressed-tensors"),
    ("moge", "w8a8", "float32", "msmodelslim"),
    ("moge", "w8a16", "bfloat16", "compressed-tensors"),
    ("moge", "mixed", "float32", "compressed-tensors"),
]


@pytest.mark.parametrize("case", both(CASES, SLOW_CASES))
def test_a_stream_is_rounded_as_the_model_is(tmp_path: Path, case: tuple[str, ...]) -> None:
    """Every leaf, every tensor and every word of the config, bit for bit."""
    family, recipe, dtype, how = case
    source = tmp_path / "source"
    folders.write(source, BASES[family], dtype=dtype, shards=3)
    said = said_of(source, recipe, how)
    streamed.quantise(source, tmp_path / "a", said)
    model = build.quantize(pangu_jax.load(source), said.recipe)
    same(pangu_jax.load(tmp_path / "a"), model)
    pangu_jax.save_hf(model, tmp_path / "b", quantised_as=said.format)
    found = quantised_reader.stored(tmp_path / "a")
    equal(found, quantised_reader.stored(tmp_path / "b"))
    assert words(tmp_path / "a") == words(tmp_path / "b")
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "source"]


def words(folder: Path) -> dict[str, Any]:
    """What a folder's files say, but for the index."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*[!x].json")}


def test_tied_embeddings_and_stray_tensors(tmp_path: Path) -> None:
    raw = {**folders.DENSE, "tie_word_embeddings": True}
    tensors = folders.random_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folders.write(tmp_path / "source", raw, tensors)
    streamed.quantise(tmp_path / "source", tmp_path / "a", said_of(tmp_path / "source"))
    found = quantised_reader.stored(tmp_path / "a")
    assert not [name for name in found if "lm_head" in name or "inv_freq" in name]
    pangu_jax.load(tmp_path / "a")


# --- one source, for all that is not about numbers ----------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float folder with companions, and files that are none."""
    folder = tmp_path_factory.mktemp("source")
    folders.write(folder, {**folders.DENSE, "my_key": [1, "a"]}, dtype="bfloat16", shards=2)
    for name, text in {**COMPANIONS, **dict.fromkeys(NOT_COPIED, b"print()")}.items():
        (folder / name).write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    target = tmp_path_factory.mktemp("whole") / "a"
    streamed.quantise(source, target, said_of(source))
    return content(target)


def hidden(folder: Path) -> Path:
    """What there is of an interrupted run's target `a`: one hidden folder."""
    (found,) = folder.iterdir()
    assert found.name.startswith(".a.")
    return found


def test_companions_are_copied_and_nothing_else(source: Path, whole: dict[str, bytes]) -> None:
    shards = {name for name in whole if name.endswith(".safetensors")}
    assert set(whole) - shards == {*COMPANIONS, INDEX, "config.json"}
    assert {name: whole[name] for name in COMPANIONS} == COMPANIONS
    raw = json.loads(whole["config.json"])
    assert raw["my_key"] == [1, "a"]
    assert raw["torch_dtype"] == "bfloat16"
    assert len(shards) == folders.DENSE["num_hidden_layers"] + 3


def test_a_file_out_of_the_folder_is_no_companion(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "secret").write_bytes(b"a private key")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    streamed.quantise(tmp_path / "source", tmp_path / "a", said_of(source))
    assert not (tmp_path / "a" / "tokenizer.json").exists()


def test_progress_is_told_up_to_the_end(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    streamed.quantise(source, tmp_path / "a", said_of(source), lambda *now: told.append(now))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({total for _, total in told}) == 1
    size = sum(tensor.nbytes for tensor in quantised_reader.stored(source).values())
    assert told[-1] == (size, size)


@pytest.mark.parametrize("place", ["new/folders/a", "empty"])
def test_places_for_a_target(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    """Also relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    streamed.quantise(source, Path(place), said_of(source))
    assert content(tmp_path / place) == whole


# --- interruptions ------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for Ctrl-C, a full disk, a lost machine."""


def interrupt_at(step: int) -> Callable[[int, int], None]:
    """A progress callback that Ctrl-C interrupts when it is called for the step-th time."""
    calls = iter(range(1000))

    def progress(done: int, total: int) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("step", range(folders.DENSE["num_hidden_layers"] + 3))
def test_a_run_goes_on_behind_every_shard(
    source: Path, whole: dict[str, bytes], tmp_path: Path, step: int
) -> None:
    """What is there stays there, untouched; nothing is at the target before all is."""
    target = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        streamed.quantise(source, target, said_of(source), interrupt_at(step))
    assert not target.exists()
    before = {path.name: path.stat() for path in hidden(tmp_path).glob("*.safetensors")}
    assert len(before) == step + 1
    streamed.quantise(source, target, said_of(source))
    assert content(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    for name, was in before.items():
        now = (target / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)


def test_a_run_goes_on_however_often_it_is_interrupted(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            streamed.quantise(source, tmp_path / "a", said_of(source), interrupt_at(2))
        assert len(list(hidden(tmp_path).glob("*.safetensors"))) == 3
    streamed.quantise(source, tmp_path / "a", said_of(source))
    assert content(tmp_path / "a") == whole


CALLS = [
    (os, "replace"),
    (os, "fsync"),
    (shutil, "copyfile"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (save, "write_json"),
]


def die(source: Path, target: Path, step: int) -> bool:
    """Runs where the step-th call that changes a file is the last; whether it came to that."""
    calls = iter(range(1000))

    def last(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) != step:
                return real(*args, **kwargs)
            raise Interrupted

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, last(getattr(module, name)))
        try:
            streamed.quantise(source, target, said_of(source))
        except Interrupted:
            return True
    return False


def test_a_run_goes_on_wherever_it_died(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """From the first call that changes a file to the last."""
    step = 0
    while die(source, tmp_path / str(step) / "a", step):
        home = tmp_path / str(step)
        if not (home / "a").exists():
            streamed.quantise(source, home / "a", said_of(source))
        found = content(home / "a")
        assert {name: found[name] for name in whole} == whole, step
        assert set(found) - set(whole) <= {"quantising.json"}  # may be cleared up at the very end
        assert [path.name for path in home.iterdir()] == ["a"]
        step += 1
    assert step > 20


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_another_source_is_never_mixed_in(source: Path, tmp_path: Path, name: str) -> None:
    """Whenever the first run died, the second one is of one source or refused."""
    home = tmp_path / "source"
    step, finished = 0, set()
    while True:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(source, home)
        if not die(home, tmp_path / "a", step):
            break
        if (tmp_path / "a").exists():  # complete; only the clearing up was cut off
            shutil.rmtree(tmp_path / "a")
            step += 1
            continue
        change_tensor(home, name)
        message = refused(home, tmp_path / "a")
        if message is not None:
            assert "another model or recipe" in message
        else:
            finished.add(step)
            own = quantised_reader.read(tmp_path / "a").floats()[name]
            wanted = quantised_reader.stored(home)[name].astype(np.float64)
            error = np.abs(own - wanted).max() / np.abs(wanted).max()
            assert error < 0.01, f"mixed with what a run made that died at step {step}"
            shutil.rmtree(tmp_path / "a")
        for path in tmp_path.glob(".a.*"):
            shutil.rmtree(path)
        step += 6 if step < 24 else 1
    assert step > 24
    assert 0 in finished


def change_tensor(folder: Path, name: str) -> None:
    """Turns the signs of a tensor, in a file of the same size."""
    for file in folder.glob("*.safetensors"):
        tensors = {n: t for n, t in quantised_reader.stored(folder).items() if n in named(file)}
        if name in tensors:
            quantised_reader.write(file, {**tensors, name: -tensors[name]})


def named(file: Path) -> set[str]:
    return set(safetensors.File(file).entries)


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, of which two shards were quantised to the target beside it."""
    shutil.copytree(source, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        streamed.quantise(tmp_path / "source", tmp_path / "a", said_of(source), interrupt_at(1))
    return tmp_path / "source"


def test_a_changed_source_is_refused(begun: Path, tmp_path: Path) -> None:
    change_tensor(begun, "model.norm.weight")
    message = refuse(begun, tmp_path / "a", "another model or recipe", "remove it")
    partial = next(tmp_path.glob(".a.*"))
    assert str(partial) in message
    shutil.rmtree(partial)
    streamed.quantise(begun, tmp_path / "a", said_of(begun))


def test_a_changed_config_is_refused(begun: Path, tmp_path: Path) -> None:
    raw = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**raw, "rope_theta": 5e5}))
    refuse(begun, tmp_path / "a", "another model or recipe")


@pytest.mark.parametrize(
    ("recipe", "how"), [("w8a16", "compressed-tensors"), ("w8a8", "msmodelslim")]
)
def test_another_recipe_is_refused(begun: Path, tmp_path: Path, recipe: str, how: str) -> None:
    said = said_of(begun, recipe, how)
    refuse(begun, tmp_path / "a", "another model or recipe", said=said)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": 5}', "\x00" * 100])
def test_a_damaged_manifest_is_refused(begun: Path, tmp_path: Path, text: str) -> None:
    (manifest,) = tmp_path.glob(".a.*/quantising.json")
    manifest.write_text(text)
    refuse(begun, tmp_path / "a", "another model or recipe")


def test_a_shard_that_is_not_whole_is_written_again(
    begun: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Refused in one line, or made anew; never taken."""
    first = min(tmp_path.glob(".a.*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    message = refused(begun, tmp_path / "a")
    if message is not None:
        assert first.name in message
    else:
        assert content(tmp_path / "a") == whole


# --- what is refused ----------------------------------------------------------------------------

QUANTISED = [
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("recipe", "name"), list(zip(["w8a8", "w4a16", "fp8"], QUANTISED, strict=True))
)
def test_a_number_that_is_none_is_refused(
    tmp_path: Path, recipe: str, name: str, bad: float
) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    tensors[name][-1, 3] = bad
    folders.write(tmp_path / "source", folders.DENSE, tensors)
    said = said_of(tmp_path / "source", recipe)
    refuse(tmp_path / "source", tmp_path / "a", name, "NaN", said=said)
    assert not (tmp_path / "a").exists()


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    """As `load` does."""
    tensors = folders.random_tensors(folders.DENSE)
    tensors["model.norm.weight"][3] = 1e6
    folders.write(tmp_path / "source", folders.DENSE, tensors)
    raw = {**folders.DENSE, "torch_dtype": "float16"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
    refuse(tmp_path / "source", tmp_path / "a", "model.norm.weight", "float16")


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder"])
def test_a_target_that_exists_is_refused_before_the_work(
    source: Path, tmp_path: Path, kind: str
) -> None:
    target, other = tmp_path / "a", tmp_path / "other"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to(other)
        other.mkdir()
        (other / "mine").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    refuse(source, target, str(tmp_path), "already exists")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if kind == "folder":
        assert content(target) == {"mine": b"mine"}


@pytest.mark.parametrize("broken", [False, True])
def test_a_link_to_an_empty_folder_is_filled_or_refused_before_the_work(
    source: Path, whole: dict[str, bytes], tmp_path: Path, broken: bool
) -> None:
    """`save_hf` fills it: the link stays a link."""
    if not broken:
        (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk")
    before = sorted(path.name for path in tmp_path.iterdir())
    if refused(source, tmp_path / "a") is not None:
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    else:
        assert content(tmp_path / "a") == whole


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "fp8", "mixed"])
def test_what_a_format_cannot_say_is_refused_before_the_work(tmp_path: Path, recipe: str) -> None:
    """And not when all of a large model has been written."""
    folders.write(tmp_path / "source", BASES["dense"])
    said = said_of(tmp_path / "source", recipe, "msmodelslim")
    refuse(tmp_path / "source", tmp_path / "a", "msModelSlim", said=said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantised_source_is_refused(source: Path, tmp_path: Path) -> None:
    for how in ("compressed-tensors", "msmodelslim"):
        streamed.quantise(source, tmp_path / how, said_of(source, how=how))
        refuse(tmp_path / how, tmp_path / "a", "quantised already", said=said_of(source))
    assert not list(tmp_path.glob(".a.*"))


def test_an_incomplete_source_is_refused_before_the_work(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    del tensors["model.norm.weight"]
    folders.write(tmp_path / "source", folders.DENSE, tensors)
    refuse(tmp_path / "source", tmp_path / "a", "missing", "model.norm.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(source, tmp_path / "locked" / "a", "cannot be written")


def test_a_place_that_is_no_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse(source, tmp_path / "file" / "a", "cannot be written")
    refuse(source, tmp_path / ("a" * 300), "cannot be written")


# --- memory -------------------------------------------------------------------------------------

LAYERS = 4
LIMIT = 8e9

# In its own process: peak anonymous memory above that of the interpreter with JAX, of each shard:
# embedding, layers of the 72B's full width, norm, head. The source is one random block, repeated;
# the target a checksum.
MEASURE = """
import dataclasses, json, math, sys, threading, time, zlib
import jax, ml_dtypes, numpy as np, pangu_jax
from pangu_jax.checkpoint import names, streamed
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.quant import scheme
jax.devices()
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
base, peak, lock = anonymous(), 0, threading.Lock()
def watch():
    global peak
    while True:
        with lock:
            peak = max(peak, anonymous())
        time.sleep(0.005)
config = dataclasses.replace(pangu_jax.preset("pro-moe-72b"), num_layers=int(sys.argv[2]))
shapes = {part.name: part.shape for _, parts in names.leaves(config) for part in parts}
rng = np.random.default_rng(0)
block = (0.02 * rng.standard_normal(2**20, np.float32)).astype(ml_dtypes.bfloat16)
def read(name):
    start, size = zlib.crc32(name.encode()) % 1000, math.prod(shapes[name])
    return np.resize(block[start:], size).reshape(shapes[name])
threading.Thread(target=watch, daemon=True).start()
said = Description(scheme.named(sys.argv[1], config), "compressed-tensors")
digest, peaks, sizes, start = 0, [], [0, 0], time.perf_counter()
for shard in streamed.shards(config, said, np.dtype(ml_dtypes.bfloat16), read):
    with lock:
        peak = 0
    for spec, tensor in zip(shard.specs, shard.tensors(), strict=True):
        assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype)
        digest = zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), digest)
        sizes[1] += tensor.nbytes
    del tensor
    peaks.append(peak - base)
sizes[0] = 2 * sum(map(math.prod, shapes.values()))
print(json.dumps(dict(peaks=peaks, sizes=sizes, seconds=time.perf_counter() - start)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_peak_memory_of_layers_of_the_72b(recipe: str) -> None:
    argv = [sys.executable, "-c", MEASURE, recipe, str(LAYERS)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    embedding, *layers, _, head = found["peaks"]
    before, after = found["sizes"]
    gigabytes = ", ".join(f"{peak / 1e9:.2f}" for peak in found["peaks"])
    print(
        f"{recipe}: {before / 1e9:.1f} GB to {after / 1e9:.1f} GB in {found['seconds']:.0f} s; "
        f"peak GB of embedding, {LAYERS} layers, norm and head: {gigabytes}"
    )
    assert len(layers) == LAYERS
    assert max(found["peaks"]) < LIMIT
    assert 0 < layers[-1] < 1.25 * layers[0]  # a layer becomes 0.8 GB or more
    assert max(layers) < embedding
    assert head < 1.5 * embedding


def test_shards_are_made_one_tensor_at_a_time() -> None:
    """A shard reads nothing before it is asked, and each tensor once."""
    config = pangu_jax.preset("nano-moge")
    read: list[str] = []
    rng = np.random.default_rng(0)
    shapes = {part.name: part.shape for _, ps in names.leaves(config) for part in ps}

    def source(name: str) -> np.ndarray:
        read.append(name)
        return rng.standard_normal(shapes[name]).astype(np.float32)

    said = Description(schemes.named("w8a8", config), "compressed-tensors")
    every = list(streamed.shards(config, said, np.dtype(np.float32), source))
    assert read == []
    tensors = every[1].tensors()
    for count, _ in enumerate(tensors, 1):
        assert len(read) <= count
    assert len(read) == len(set(read)) == sum(name.startswith("model.layers.0.") for name in shapes)
