"""The folder of a run as a model: at any time that of its newest checkpoint, whatever happened."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import pangu_jax
from infer import __main__ as door
from pangu_jax import build
from pangu_jax.checkpoint import native
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import write_preset
from tests import layouts, reference
from train.checkpoints import Checkpoints
from train.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    RunSection,
)
from train.recipe import Recipe
from train.run_folder import RunFolder

# Where a file is damaged, Orbax leaves coroutines behind that nobody waits for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUMBERS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOKENS = layouts.random_tokens(2, 7)
FROZEN = ("embed", "blocks.*.qkv")


@pytest.fixture(autouse=True)
def _forget_coroutines() -> Iterator[None]:
    """While their warnings are ignored."""
    yield
    gc.collect()


def config_of(kind: str) -> ModelConfig:
    """Two layers, room for the tokens of the nano tokenizer."""
    more: Any = dict(num_layers=2, vocab_size=1024, dtype="bfloat16", eos_token_ids=(15,))
    return dataclasses.replace(layouts.MODELS[kind], **more)


def random_model(config: ModelConfig, seed: int) -> tuple[Pangu, dict[str, np.ndarray]]:
    """A float32 model of stacked layers, and its numbers."""
    like, rng = layouts.abstract(config), np.random.default_rng(seed)
    numbers = {
        name: (0.3 * rng.standard_normal(leaf.shape) + (leaf.ndim < 3)).astype(np.float32)
        for name, leaf in build.named_leaves(like)
    }
    return build.with_weights(like, jax.device_put(numbers, build.places(like))), numbers


def write(
    folder: Path, config: ModelConfig, steps: int, freeze: tuple[str, ...] = (), **sections: Any
) -> dict[str, np.ndarray]:
    """What a run has written after so many steps, its weights drawn anew for each; returns the
    last ones.
    """
    run = Config(
        sections.get("model", ModelSection(preset="none", tokenizer="nano")),
        DataSection(path="none"),
        RunSection(output=str(folder), steps=9),
        optimizer=OptimizerSection(freeze=freeze, warmup_steps=0),
        lora=sections.get("lora", LoraSection()),
    )
    model, numbers = random_model(config, 0)
    recipe, place = Recipe(run, model), RunFolder(folder)
    state = recipe.start(model)
    folder.mkdir()
    home = folder.with_name("tokenizer")
    home.mkdir(exist_ok=True)
    write_preset("nano", home)
    place.describe(run, model, state.frozen, home)
    saved = Checkpoints(place.checkpoints, keep=9)
    rng = np.random.default_rng(1)
    for step in range(1, steps + 1):
        trained = {
            name: (leaf + rng.standard_normal(leaf.shape) / 5).astype(np.float32)
            for name, leaf in jax.device_get(state.trainable).items()
        }
        state = dataclasses.replace(
            state, step=np.int32(step) + 0 * state.step, trainable=jax.device_put(trained)
        )
        saved.save(state)
        numbers = {**numbers, **trained}
    saved.close()
    return numbers


class Run:
    """A run of two checkpoints, and the numbers of the second."""

    def __init__(self, folder: Path, kind: str, freeze: tuple[str, ...]) -> None:
        self.folder, self.config = folder, config_of(kind)
        self.numbers = write(folder, self.config, 2, freeze)

    def copied(self, target: Path) -> Path:
        """The folder, to be damaged."""
        return Path(shutil.copytree(self.folder, target))


CASES = {"dense": ("dense", ()), "frozen": ("moge", FROZEN)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of a dense model, and one of MoGE with frozen leaves."""
    return {name: Run(tmp_path_factory.mktemp(name) / "run", *case) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, made: dict[str, Run]) -> Run:
    return made[request.param]


def separate(numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves of one run of stacked layers by the names that they have as separate layers."""
    found = {}
    for name, leaf in numbers.items():
        if name.startswith("blocks.0."):
            own = name.removeprefix("blocks.0.")
            found |= {f"blocks.{layer}.{own}": part for layer, part in enumerate(leaf)}
        else:
            found[name] = leaf
    return found


def same(found: dict[str, Any], wanted: dict[str, np.ndarray], dtype: str = "float32") -> None:
    """Rounded to a dtype, equal to the bit."""
    assert set(found) == set(wanted)
    for name, leaf in wanted.items():
        got = np.asarray(found[name])
        assert got.dtype == NUMBERS[dtype]
        assert got.tobytes() == leaf.astype(NUMBERS[dtype]).tobytes(), name


def refused(folder: Path, *words: str) -> str:
    """The one line with which the folder is refused; it contains every word."""
    with pytest.raises(CheckpointError) as caught:
        pangu_jax.load(folder)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert str(folder) in message
    assert len(message) < 1500
    for word in words:
        assert word in message
    return message


# --- good folders


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_a_run_is_the_model_of_its_newest_checkpoint(run: Run, dtype: str | None) -> None:
    """Stacked or separate, in any dtype; without one in that of its configuration."""
    for form in ("stacked", "separate"):
        model = pangu_jax.load(run.folder, dtype, form=form)
        assert model.form == form
        assert model.config == run.config
        wanted = run.numbers if form == "stacked" else separate(run.numbers)
        same(dict(build.named_leaves(model)), wanted, dtype or "bfloat16")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("dense", "tp8"),
        ("frozen", "h2p-8"),
        pytest.param("frozen", "ep8", marks=pytest.mark.slow),
        pytest.param("frozen", "fsdp-h2p-4x2", marks=pytest.mark.slow),
    ],
)
def test_under_a_layout_it_is_the_same(name: str, where: str, made: dict[str, Run]) -> None:
    """Placed as any model is there."""
    model = pangu_jax.load(made[name].folder, "float32", layouts.named(where), "stacked")
    same(dict(build.weights(model)), made[name].numbers)
    like = layouts.abstract(made[name].config, layouts.named(where))
    for (leaf, got), wanted in zip(build.named_leaves(model), jax.tree.leaves(like), strict=True):
        assert got.sharding == wanted.sharding, leaf


def test_logits_are_those_of_the_reference(run: Run, tmp_path: Path) -> None:
    """In float64, of the numbers in the checkpoint."""
    model = random_model(run.config, 0)[0]
    numbers = jax.device_put(run.numbers, build.places(model))
    pangu_jax.save_hf(build.with_weights(model, numbers), tmp_path / "hf")
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    for form in ("stacked", "separate"):
        found = np.asarray(pangu_jax.load(run.folder, "float32", form=form)(TOKENS[:1]))[0]
        wanted = reference.forward(stored, raw, TOKENS[0])["logits"]
        assert np.abs(wanted).max() > 1
        layouts.close(found, wanted, 1e-4)


def test_it_is_saved_as_any_other(run: Run, tmp_path: Path) -> None:
    """With its tokenizer, to the bit."""
    pangu_jax.save_hf(pangu_jax.load(run.folder, "float32"), tmp_path / "hf")
    again = pangu_jax.load(tmp_path / "hf", "float32", form="stacked")
    same(dict(build.named_leaves(again)), run.numbers)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (run.folder / name).read_bytes()


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    """Before it is described it is no model folder; then it is one without weights."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").write_text("[run]\n")
    refused(tmp_path / "new", "config.json")
    write(tmp_path / "run", config_of("dense"), 0)
    wanted = "the run has no checkpoint yet (see run.save_every)"
    refused(tmp_path / "run", wanted)
    (tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    refused(tmp_path / "run", wanted)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    refused(tmp_path / "run", wanted)


def test_what_is_being_written_is_not_read(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path / "run")
    (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (folder / ".final.partial").mkdir()
    same(dict(build.named_leaves(pangu_jax.load(folder, "float32", form="stacked"))), run.numbers)


def test_of_a_finished_run_it_is_the_end(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path / "run")
    model, numbers = random_model(run.config, 5)
    pangu_jax.save_hf(model, folder / "final")
    found = pangu_jax.load(folder, "float32", form="stacked")
    same(dict(build.named_leaves(found)), numbers)


def test_the_published_folder_of_a_run_is_its_end(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"the run is not finished; this needs its final"):
        native.published(folder)
    (folder / "final").mkdir()
    assert native.published(folder) == folder / "final"
    assert native.published(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "argv", [("check",), ("quantize", "--recipe", "w8a8", "--output")], ids=["check", "quantize"]
)
def test_commands_that_read_files_read_the_end(
    argv: tuple[str, ...], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *flags = argv
    flags += [str(tmp_path / "out")] if flags else ["--skip-run"]
    folder = run.copied(tmp_path / "run")
    argv = (name, "--model", str(folder), *flags)
    assert door.main(list(argv)) != 0
    captured = capsys.readouterr()
    assert f"{folder}: the run is not finished" in captured.out + captured.err
    pangu_jax.save_hf(pangu_jax.load(folder), folder / "final")
    assert door.main(list(argv)) == 0


def test_a_command_opens_it(
    made: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says what it says of the same model in a Hugging Face folder."""
    run, said = made["dense"], []
    pangu_jax.save_hf(pangu_jax.load(run.folder, "float32"), tmp_path / "hf")
    for folder in (run.folder, tmp_path / "hf"):
        flags = ["--prompt", "What is 3 + 2?", "--max-new-tokens", "8", "--dtype", "float32"]
        assert door.main(["generate", "--model", str(folder), *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].strip()


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_a_command_tells_that_there_is_nothing_yet(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", config_of("dense"), 0)
    asked = {"messages": [{"role": "user", "content": "1"}], "answer": "1"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    flags = {
        "generate": ["--prompt", "Hi"],
        "chat": [],
        "eval": ["--tasks", str(tmp_path / "asked.jsonl")],
    }[command]
    assert door.main([command, "--model", str(tmp_path / "run"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'run'}: the run has no checkpoint yet (see run.save_every)"


# --- hostile folders


def edited(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ('{"config": ', "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "config"),
        ('{"config": {}, "published": "{}"}', "config"),
        ('{"config": 3, "published": "{}"}', "config"),
        ("\ud800".encode("utf-8", "surrogatepass"), "model.json"),
    ],
)
def test_a_description_that_is_none(
    text: str | bytes, complaint: str, made: dict[str, Run], tmp_path: Path
) -> None:
    folder = made["dense"].copied(tmp_path / "run")
    (folder / "model.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, "model.json", complaint)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3},
        {"num_layers": 1},
        {"hidden_size": 64},
        {"intermediate_size": 45},
        {"vocab_size": 1025},
        {"attention_bias": False},
        {"tie_embeddings": True},
        {"num_kv_heads": 1},
        {"num_layers": 10**9},
        {"num_layers": "2"},
        {"dtype": "float64"},
        {"head_dim": -4},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_description_of_another_model(
    change: dict[str, Any], made: dict[str, Run], tmp_path: Path
) -> None:
    folder = made["dense"].copied(tmp_path / "run")
    edited(folder / "model.json", lambda said: {**said, "config": {**said["config"], **change}})
    refused(folder)


@pytest.mark.parametrize("published", ["", "[]", "{", '{"a": NaN}', 3, None])
def test_a_published_configuration_that_is_none(
    published: Any, made: dict[str, Run], tmp_path: Path
) -> None:
    folder = made["dense"].copied(tmp_path / "run")
    edited(folder / "model.json", lambda said: {**said, "published": published})
    refused(folder, "model.json")


NAME = "['trainable']['blocks.0.mlp.down']"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda sums: {**sums, "['trainable']['blocks.0.mlp.up']": 1},
            "blocks.0.mlp.up is no leaf",
        ),
        (lambda sums: {**sums, "['trainable']['blocks.9.mlp.down']": 1}, "blocks.9.mlp.down is no"),
        (lambda sums: {n: x for n, x in sums.items() if n != NAME}, "frozen"),
        (lambda sums: {}, "not a checkpoint of a run"),
        (lambda sums: list(sums), "must be a JSON object"),
        (lambda sums: None, "must be a JSON object"),
    ],
)
def test_names_that_are_not_the_models(
    change: Callable[[dict[str, int]], Any], complaint: str, made: dict[str, Run], tmp_path: Path
) -> None:
    folder = made["dense"].copied(tmp_path / "run")
    edited(folder / "checkpoints" / "2" / "sums" / "metadata", change)
    refused(folder, complaint)


@pytest.mark.parametrize("part", ["state", "sums", ".", "../../frozen"])
def test_what_is_missing_is_told(part: str, made: dict[str, Run], tmp_path: Path) -> None:
    folder = made["frozen"].copied(tmp_path / "run")
    place = (folder / "checkpoints" / "2" / part).resolve()
    shutil.rmtree(place)
    place.mkdir()
    refused(folder, str(place) if part != "." else "checkpoints/2")
    place.rmdir()
    if part == ".":  # the one before
        assert pangu_jax.load(folder).config == made["frozen"].config
    else:
        refused(folder, str(place))


def test_a_frozen_leaf_that_is_not_there(made: dict[str, Run], tmp_path: Path) -> None:
    """Of a run that froze another one, or in another shape."""
    for number, held in enumerate(
        [{"embed": np.zeros((1024, 32), np.float32)}, {"embed": np.zeros((7, 3), np.float32)}]
    ):
        folder = made["frozen"].copied(tmp_path / str(number))
        shutil.rmtree(folder / "frozen")
        with ocp.StandardCheckpointer() as writer:
            writer.save((folder / "frozen").absolute(), held)
        refused(folder, str(folder / "frozen"))


def test_frozen_numbers_that_are_others(made: dict[str, Run], tmp_path: Path) -> None:
    folder = made["frozen"].copied(tmp_path / "run")
    with ocp.StandardCheckpointer() as reader:
        held = reader.restore((folder / "frozen").absolute())
    name = sorted(held)[-1]
    held[name] = held[name].at[0].add(1e-3)
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "frozen").absolute(), held, force=True)
    refused(folder, f"the numbers of ['{name}'] are damaged")
    (folder / "frozen.json").unlink()
    refused(folder, "frozen.json")


@pytest.mark.parametrize("name", ["9", "٣", "1e3", "-9", "９"])
def test_other_names_among_the_checkpoints(name: str, made: dict[str, Run], tmp_path: Path) -> None:
    """What is no number of a step is none; what is must be one."""
    folder = made["dense"].copied(tmp_path / "run")
    (folder / "checkpoints" / name).write_text("no checkpoint")
    if name.isdecimal():
        refused(folder)
    else:
        assert pangu_jax.load(folder).config == made["dense"].config


def test_numbers_of_another_shape_or_kind(made: dict[str, Run], tmp_path: Path) -> None:
    """In the state itself, whatever the sums say of it."""
    for number, leaf in enumerate(
        [np.zeros((2, 32, 43), np.float32), np.zeros((2, 32), np.float32), np.zeros(3, np.int8)]
    ):
        folder = made["dense"].copied(tmp_path / str(number))
        trained = {**made["dense"].numbers, "blocks.0.mlp.down": leaf}
        shutil.rmtree(folder / "checkpoints" / "2" / "state")
        with ocp.StandardCheckpointer() as writer:
            where = (folder / "checkpoints" / "2" / "state").absolute()
            writer.save(where, {"trainable": trained})
        refused(folder, str(folder / "checkpoints" / "2"))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    place: float, made: dict[str, Run], tmp_path: Path
) -> None:
    """In any file of the checkpoint."""
    run, noticed = made["dense"], 0
    files = [path.relative_to(run.folder) for path in (run.folder / "checkpoints" / "2").rglob("*")]
    for number, name in enumerate(files):
        if not (run.folder / name).is_file() or not (run.folder / name).stat().st_size:
            continue
        folder = run.copied(tmp_path / str(number))
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * place)] ^= 4
        (folder / name).write_bytes(content)
        found = None
        try:
            found = pangu_jax.load(folder, "float32", form="stacked")
        except CheckpointError:
            refused(folder)
            noticed += 1
        if found is not None:
            same(dict(build.named_leaves(found)), run.numbers)
    assert noticed >= 3


# --- adapters


def adapted(folder: Path, kind: str, **section: Any) -> tuple[dict[str, np.ndarray], Path]:
    """A run that trains adapters beside a model's folder; what it trained, and that folder."""
    base = folder.with_name("base")
    model, _ = random_model(config_of(kind), 0)
    pangu_jax.save_hf(model, base)
    lora = LoraSection(rank=3, alpha=6.0, **section)
    numbers = write(folder, config_of(kind), 2, model=ModelSection(path=str(base)), lora=lora)
    return numbers, base


@pytest.mark.parametrize("kind", ["dense", "moge"])
def test_adapters_are_merged(kind: str, tmp_path: Path) -> None:
    """W + 2 B A, by hand."""
    numbers, _ = adapted(tmp_path / "run", kind)
    pairs = {name.removesuffix(".lora_a") for name in numbers if name.endswith(".lora_a")}
    wanted = {name: leaf for name, leaf in numbers.items() if "lora" not in name}
    assert {"blocks.0.attention.qkv", "blocks.0.mlp.down"} <= pairs <= set(wanted)
    for name in pairs:
        a, b = (numbers[f"{name}.lora_{part}"].astype(np.float64) for part in "ab")
        each = a.ndim - 2  # axes of layers and experts
        product = np.empty(wanted[name].shape)
        for place in np.ndindex(a.shape[:each]):
            product[place] = np.einsum("...r,rd->...d", b[place], a[place])
        wanted[name] = (wanted[name] + 2 * product).astype(np.float32)
    found = dict(build.named_leaves(pangu_jax.load(tmp_path / "run", "float32")))
    layouts.close_leaves(found, separate(wanted), 1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda said: {**said, "path": "/nowhere"}, "/nowhere: does not exist"),
        (lambda said: {**said, "rank": 4}, ""),
        (lambda said: {**said, "rank": -1}, ""),
        (lambda said: {**said, "targets": ["mlp.*"]}, "not the adapters that"),
        (lambda said: {**said, "targets": ["x"]}, "no matrix matches"),
        (lambda said: {**said, "quantize": "w3a5"}, "w3a5"),
        (lambda said: {**said, "scale": "big"}, "base.json"),
        (lambda said: {**said, "more": 1}, "base.json"),
        (lambda said: [], "base.json"),
    ],
)
def test_adapters_of_another_base(
    change: Callable[[dict[str, Any]], Any], complaint: str, tmp_path: Path
) -> None:
    adapted(tmp_path / "run", "dense")
    edited(tmp_path / "run" / "base.json", change)
    with pytest.raises(CheckpointError) as caught:
        pangu_jax.load(tmp_path / "run")
    (line,) = str(caught.value).splitlines()
    assert complaint in line


def test_a_run_that_stands_on_itself(tmp_path: Path) -> None:
    adapted(tmp_path / "run", "dense")
    edited(tmp_path / "run" / "base.json", lambda said: {**said, "path": str(tmp_path / "run")})
    refused(tmp_path / "run", "base.json")


def test_a_hugging_face_folder_is_no_run(tmp_path: Path) -> None:
    """Whatever lies beside its weights."""
    model, numbers = random_model(config_of("dense"), 0)
    pangu_jax.save_hf(model, tmp_path / "hf")
    (tmp_path / "hf" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "hf" / "final").mkdir()
    assert not native.is_run(tmp_path / "hf")
    found = pangu_jax.load(tmp_path / "hf", "float32", form="stacked")
    same(dict(build.named_leaves(found)), numbers)
