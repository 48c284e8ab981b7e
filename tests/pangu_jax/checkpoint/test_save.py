"""`pangu_jax.save_hf`: what comes out is bit-equal, readable by others, and whole or not there."""

import builtins
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as library_numpy

import pangu_jax
from pangu_jax.build import named_leaves
from pangu_jax.checkpoint import hf_config, save
from tests import folders, reference

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED = {"tie_word_embeddings": True}
COMPANIONS = {
    "generation_config.json": b'{"do_sample": true, "eos_token_id": [2, 7]}\n',
    "tokenizer.model": bytes(range(256)),
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": '{"chat_template": "盘古"}'.encode(),
    "special_tokens_map.json": b"{}",
}
CODE = ("modeling_openpangu_dense.py", "configuration_openpangu_dense.py", "tokenization.py")


def stored_in(folder: Path) -> Tensors:
    """Every tensor of a saved folder by the independent library; checks the index on the way."""
    if (folder / SINGLE).exists():
        assert not (folder / INDEX).exists()
        assert list(folder.glob("*.safetensors")) == [folder / SINGLE]
        return library_numpy.load_file(folder / SINGLE)
    index = json.loads((folder / INDEX).read_text())
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = library_numpy.load_file(file)
        assert found
        for name in found:
            assert name not in tensors
            assert index["weight_map"][name] == file.name
        tensors.update(found)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def same_tensors(found: Tensors, expected: Tensors) -> None:
    """Equal to the bit, under the same names."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


def config_of(folder: Path) -> Raw:
    return json.loads((folder / "config.json").read_text())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


CASES = [
    pytest.param(folders.DENSE, id="dense"),
    pytest.param({**folders.DENSE, **TIED}, id="tied"),
    pytest.param({**folders.DENSE, "bias": False}, id="no biases"),
    pytest.param({**folders.DENSE, "head_dim": 6}, id="own head_dim"),
    pytest.param(folders.MOGE, id="moge"),
    pytest.param({**folders.MOGE, **TIED}, id="tied moge"),
]


@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("base", CASES)
def test_round_trip_is_bit_equal(tmp_path: Path, base: Raw, form: Any) -> None:
    stored = folders.write(tmp_path / "a", base)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a", form=form), tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), stored)
    for name, value in base.items():
        assert config_of(tmp_path / "b")[name] == value
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", SINGLE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("base", "dtype", "form"),
    [
        (folders.DENSE, "bfloat16", "separate"),
        (folders.DENSE, "float16", "stacked"),
        (folders.MOGE, "bfloat16", "stacked"),
        (folders.MOGE, "float16", "separate"),
    ],
    ids=["dense bf16", "dense f16 stacked", "moge bf16 stacked", "moge f16"],
)
def test_round_trip_of_half_precision(tmp_path: Path, base: Raw, dtype: str, form: Any) -> None:
    stored = folders.write(tmp_path / "a", base, dtype=dtype)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a", form=form), tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), stored)
    assert config_of(tmp_path / "b")["torch_dtype"] == dtype


def test_special_numbers_are_kept_to_the_bit(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    special = [np.inf, -np.inf, -0.0, 1e-45, 3e38, -1e-40]
    tensors["model.norm.weight"][: len(special)] = special
    tensors["model.norm.weight"].view(np.uint32)[10] = 0x7FC00123  # a NaN with a payload
    stored = folders.write(tmp_path / "a", folders.DENSE, tensors)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), stored)


@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
@pytest.mark.parametrize("shard_bytes", [1, 5_000, 20_000])
def test_shards(tmp_path: Path, base: Raw, shard_bytes: int, form: Any) -> None:
    stored = folders.write(tmp_path / "a", base)
    model = pangu_jax.load(tmp_path / "a", form=form)
    pangu_jax.save_hf(model, tmp_path / "b", shard_bytes=shard_bytes)
    same_tensors(stored_in(tmp_path / "b"), stored)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    sizes = []
    for file in files:
        tensors = library_numpy.load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= shard_bytes or len(tensors) == 1
    if shard_bytes == 1:
        assert count == len(stored)
    else:  # filled, not scattered: two neighbours never fit one file
        assert all(a + b > shard_bytes for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("more", [0, -1])
def test_the_size_at_which_a_second_file_begins(tmp_path: Path, more: int) -> None:
    stored = folders.write(tmp_path / "a", folders.DENSE)
    total = sum(tensor.nbytes for tensor in stored.values())
    model = pangu_jax.load(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b", shard_bytes=total + more)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == (1 if more == 0 else 2)
    same_tensors(stored_in(tmp_path / "b"), stored)


def test_shards_in_shards_out(tmp_path: Path) -> None:
    stored = folders.write(tmp_path / "a", folders.MOGE, shards=3)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b", shard_bytes=30_000)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "b"), tmp_path / "c")
    same_tensors(stored_in(tmp_path / "b"), stored)
    same_tensors(stored_in(tmp_path / "c"), stored)


def test_what_is_saved_computes_the_same(tmp_path: Path) -> None:
    """Through the independent reference, on the saved folder's own config.json and tensors."""
    stored = folders.write(tmp_path / "a", folders.MOGE)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b")
    found = reference.forward(stored_in(tmp_path / "b"), config_of(tmp_path / "b"), [5, 1, 93])
    expected = reference.forward(stored, folders.MOGE, [5, 1, 93])
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_a_redundant_head_of_tied_embeddings_is_not_written(tmp_path: Path) -> None:
    raw = {**folders.DENSE, **TIED}
    tensors = folders.random_tensors(raw)
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    folders.write(tmp_path / "a", raw, {**tensors, **spare})
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), tensors)


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float16"),
    ],
)
def test_loaded_in_another_dtype(tmp_path: Path, before: str, after: str) -> None:
    stored = folders.write(tmp_path / "a", folders.DENSE, dtype=before)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a", dtype=after), tmp_path / "b")
    expected = {name: tensor.astype(folders.DTYPES[after]) for name, tensor in stored.items()}
    same_tensors(stored_in(tmp_path / "b"), expected)
    assert config_of(tmp_path / "b")["torch_dtype"] == after
    again = pangu_jax.load(tmp_path / "b")
    assert again.dtype == folders.DTYPES[after]
    assert again.config.dtype == after


def test_widened_and_narrowed_again_is_bit_equal(tmp_path: Path) -> None:
    stored = folders.write(tmp_path / "a", folders.MOGE, dtype="bfloat16")
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a", dtype="float32"), tmp_path / "b")
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "b", dtype="bfloat16"), tmp_path / "c")
    same_tensors(stored_in(tmp_path / "c"), stored)


def test_the_newer_spelling_of_dtype_follows(tmp_path: Path) -> None:
    folders.write(tmp_path / "a", folders.DENSE)
    raw = config_of(tmp_path / "a")
    raw["dtype"] = raw.pop("torch_dtype")
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a", dtype="bfloat16"), tmp_path / "b")
    assert config_of(tmp_path / "b")["dtype"] == "bfloat16"
    assert config_of(tmp_path / "b").get("torch_dtype", "bfloat16") == "bfloat16"


# --- config.json ------------------------------------------------------------------------------


def test_unknown_keys_and_token_ids_are_kept_as_written(tmp_path: Path) -> None:
    raw = {
        **folders.DENSE,
        "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
        "transformers_version": "4.53.2",
        "attention_dropout": 0.1,
        "use_cache": False,
        "a_list": [1, {"b": None}],
        "名": "盘古\n",
        "bos_token_id": 3,
        "pad_token_id": None,
        "eos_token_id": [2, 7],
    }
    folders.write(tmp_path / "a", raw)
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b")
    assert config_of(tmp_path / "b") == raw | {
        name: value for name, value in config_of(tmp_path / "b").items() if name not in raw
    }


@pytest.mark.parametrize("eos", [2, [2], [2, 7], [], None])
def test_end_tokens_are_kept_as_written(tmp_path: Path, eos: Any) -> None:
    folders.write(tmp_path / "a", {**folders.DENSE, "eos_token_id": eos})
    model = pangu_jax.load(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b")
    assert config_of(tmp_path / "b")["eos_token_id"] == eos
    assert pangu_jax.load(tmp_path / "b").config == model.config


@pytest.mark.parametrize("base", CASES)
def test_the_saved_config_reads_as_the_same(tmp_path: Path, base: Raw) -> None:
    folders.write(tmp_path / "a", base)
    model = pangu_jax.load(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b")
    assert pangu_jax.load(tmp_path / "b").config == model.config


@pytest.mark.parametrize(
    ("base", "form"),
    [(folders.DENSE, "separate"), (folders.MOGE, "stacked")],
    ids=["dense", "moge"],
)
def test_a_fresh_model_without_an_origin(tmp_path: Path, base: Raw, form: Any) -> None:
    config = hf_config.from_hf(base)
    model = pangu_jax.init(config, jax.random.key(0), form=form)
    pangu_jax.save_hf(model, tmp_path / "b")
    names = {name: tensor.shape for name, tensor in folders.random_tensors(base).items()}
    assert {name: tensor.shape for name, tensor in stored_in(tmp_path / "b").items()} == names
    for name, value in base.items():
        if name != "bias":
            assert config_of(tmp_path / "b")[name] == value
    again = pangu_jax.load(tmp_path / "b", form=form)
    assert again.config == config
    for (name, leaf), (_, other) in zip(named_leaves(model), named_leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=name)


# --- companions -------------------------------------------------------------------------------


def a_model_with_companions(folder: Path) -> pangu_jax.Pangu:
    folders.write(folder, folders.DENSE)
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    for name in CODE:
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')")
    for name in ("README.md", "pytorch_model.bin", ".hidden", "vllm.whl"):
        (folder / name).write_bytes(b"no companion")
    return pangu_jax.load(folder)


def test_companions_are_copied_and_code_never(tmp_path: Path) -> None:
    pangu_jax.save_hf(a_model_with_companions(tmp_path / "a"), tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        *COMPANIONS,
        "config.json",
        SINGLE,
    }
    for name, content in COMPANIONS.items():
        assert (tmp_path / "b" / name).read_bytes() == content


def test_linked_companions_become_files(tmp_path: Path) -> None:
    """As in the Hugging Face cache: the copy must not hang on it."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "6b16f155").write_bytes(b"tokens")
    folder = tmp_path / "snapshots" / "main"
    folders.write(folder, folders.DENSE)
    (folder / "tokenizer.model").symlink_to("../../blobs/6b16f155")
    pangu_jax.save_hf(pangu_jax.load(folder), tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.model").is_symlink()
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"tokens"


def test_a_link_to_a_private_file_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_bytes(b"secret")
    folders.write(tmp_path / "a", folders.DENSE)
    (tmp_path / "a" / "tokenizer.json").symlink_to("../id_rsa")
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "a"), tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_companion_that_changed_since_it_was_loaded_is_refused(tmp_path: Path) -> None:
    model = a_model_with_companions(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(pangu_jax.CheckpointError, match="has changed since"):
        pangu_jax.save_hf(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_traced_function_never_mixes_up_companions(tmp_path: Path) -> None:
    """Two folders of one shape but with other tokenizers, through one compiled function."""
    for name in ("a", "b"):
        folders.write(tmp_path / name, {**folders.DENSE, "note": name})
        (tmp_path / name / "tokenizer.model").write_bytes(name.encode())
    double = jax.jit(lambda model: jax.tree.map(lambda leaf: leaf * 2, model))
    for name in ("a", "b"):
        pangu_jax.save_hf(double(pangu_jax.load(tmp_path / name)), tmp_path / f"{name}2")
        assert (tmp_path / f"{name}2" / "tokenizer.model").read_bytes() == name.encode()
        assert json.loads((tmp_path / f"{name}2" / "config.json").read_text())["note"] == name


def test_models_saved_and_loaded_again_are_of_one_type(tmp_path: Path) -> None:
    model = a_model_with_companions(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b")
    again = pangu_jax.load(tmp_path / "b")
    assert jax.tree.structure(again) == jax.tree.structure(model)


def test_a_model_of_mixed_or_integer_dtypes_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "a", folders.DENSE)
    model = pangu_jax.load(tmp_path / "a")
    eight = jax.tree.map(lambda leaf: leaf.astype(jnp.int8), model)
    mixed = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, model)
    for wrong in (eight, mixed):
        with pytest.raises(pangu_jax.CheckpointError, match="to be saved a model must be"):
            pangu_jax.save_hf(wrong, tmp_path / "b")


def test_companions_travel_on(tmp_path: Path) -> None:
    pangu_jax.save_hf(a_model_with_companions(tmp_path / "a"), tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    pangu_jax.save_hf(pangu_jax.load(tmp_path / "b"), tmp_path / "c")
    assert tree(tmp_path / "b") == tree(tmp_path / "c")


def test_a_relative_folder_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model_with_companions(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    model = pangu_jax.load("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pangu_jax.save_hf(model, "b")
    found = (tmp_path / "elsewhere" / "b" / "tokenizer.model").read_bytes()
    assert found == COMPANIONS["tokenizer.model"]


@pytest.mark.parametrize("instead", ["nothing", "fifo", "directory"])
def test_a_companion_that_is_gone_is_refused_and_nothing_left(tmp_path: Path, instead: str) -> None:
    model = a_model_with_companions(tmp_path / "a")
    companion = tmp_path / "a" / "tokenizer.model"
    companion.unlink()
    if instead == "fifo":
        os.mkfifo(companion)
    elif instead == "directory":
        companion.mkdir()
    with pytest.raises(pangu_jax.CheckpointError, match=r"a/tokenizer\.model") as caught:
        pangu_jax.save_hf(model, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_mapped_weights_may_go_once_loaded(tmp_path: Path) -> None:
    stored = folders.write(tmp_path / "a", folders.DENSE)
    model = pangu_jax.load(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), stored)


# --- where to ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pangu_jax.Pangu:
    folder = tmp_path_factory.mktemp("source")
    folders.write(folder, folders.DENSE)
    (folder / "tokenizer.model").write_bytes(b"tokens")
    return pangu_jax.load(folder)


@pytest.mark.parametrize("content", ["config.json", ".hidden", "folder"])
def test_a_target_that_holds_something_is_refused_and_untouched(
    tmp_path: Path, model: pangu_jax.Pangu, content: str
) -> None:
    target = tmp_path / "b"
    target.mkdir()
    if content == "folder":
        (target / "folder").mkdir()
    else:
        (target / content).write_bytes(b"precious")
    before = tree(tmp_path)
    with pytest.raises(pangu_jax.CheckpointError) as caught:
        pangu_jax.save_hf(model, target)
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_saving_over_the_loaded_folder_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "a", folders.DENSE)
    loaded = pangu_jax.load(tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(pangu_jax.CheckpointError, match="already exists"):
        pangu_jax.save_hf(loaded, tmp_path / "a")
    assert tree(tmp_path) == before


def test_a_file_as_target_is_refused_and_untouched(tmp_path: Path, model: pangu_jax.Pangu) -> None:
    (tmp_path / "b").write_bytes(b"precious")
    with pytest.raises(pangu_jax.CheckpointError, match="already exists"):
        pangu_jax.save_hf(model, tmp_path / "b")
    assert tree(tmp_path) == {"b": b"precious"}


def test_an_empty_target_is_taken(tmp_path: Path, model: pangu_jax.Pangu) -> None:
    (tmp_path / "b").mkdir()
    pangu_jax.save_hf(model, tmp_path / "b")
    assert (tmp_path / "b" / SINGLE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_folders_above_are_made_and_a_path_may_be_text(
    tmp_path: Path, model: pangu_jax.Pangu
) -> None:
    pangu_jax.save_hf(model, str(tmp_path / "x" / "y" / "b"))
    assert (tmp_path / "x" / "y" / "b" / SINGLE).exists()


def test_a_target_that_cannot_be_is_refused_and_nothing_left(
    tmp_path: Path, model: pangu_jax.Pangu
) -> None:
    (tmp_path / "b").write_bytes(b"precious")
    target = tmp_path / "b" / "c"
    before = tree(tmp_path)
    with pytest.raises(pangu_jax.CheckpointError) as caught:
        pangu_jax.save_hf(model, target)
    assert str(target) in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_to_a_new_or_empty_folder(
    tmp_path: Path, model: pangu_jax.Pangu, exists: bool
) -> None:
    if exists:
        (tmp_path / "empty").mkdir()
    (tmp_path / "b").symlink_to("empty")
    pangu_jax.save_hf(model, tmp_path / "b")
    assert (tmp_path / "b").is_symlink()
    assert len(stored_in(tmp_path / "b")) == len(folders.random_tensors(folders.DENSE))
    assert {path.name for path in tmp_path.iterdir()} <= {"b", "empty"}


# --- interruptions ----------------------------------------------------------------------------


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but surely ours."""


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty target"])
@pytest.mark.parametrize(
    "where", ["first sync", "third sync", "fifth sync", "companions", "rename", "transfer", "open"]
)
def test_an_interruption_leaves_nothing(
    tmp_path: Path,
    model: pangu_jax.Pangu,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    exists: bool,
) -> None:
    if exists:
        (tmp_path / "b").mkdir()

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        assert any(path.name != "b" for path in tmp_path.iterdir()), "nothing was begun"
        raise Interrupted

    def after(calls: int, real: Any) -> Any:
        left = iter(range(calls))
        return lambda *args, **kwargs: (
            interrupt() if next(left, None) is None else real(*args, **kwargs)
        )

    with monkeypatch.context() as patch:
        if where.endswith("sync"):
            count = {"first": 0, "third": 2, "fifth": 4}[where.split()[0]]
            patch.setattr(os, "fsync", after(count, os.fsync))
        elif where == "companions":
            patch.setattr(save, "_copy_companions", interrupt)
        elif where == "rename":
            for name in ("replace", "rename"):
                patch.setattr(os, name, interrupt)
        elif where == "transfer":
            patch.setattr(np, "ascontiguousarray", after(5, np.ascontiguousarray))
        else:
            patch.setattr(builtins, "open", after(3, open))
        with pytest.raises(Interrupted):
            pangu_jax.save_hf(model, tmp_path / "b", shard_bytes=20_000)
    assert tree(tmp_path) == ({"b": None} if exists else {})
    pangu_jax.save_hf(model, tmp_path / "b", shard_bytes=20_000)  # and it can be repeated
    assert len(stored_in(tmp_path / "b")) == len(folders.random_tensors(folders.DENSE))


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, model: pangu_jax.Pangu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, pangu_jax.CheckpointError), match="No space left on device"):
        pangu_jax.save_hf(model, tmp_path / "b")
    assert tree(tmp_path) == {}


# --- what the format cannot say ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": False}, ["attention_bias"]),
        ({"head_dim": 6}, ["head_dim", "6"]),
        ({"num_attention_heads": 8, "head_dim": 8}, ["head_dim", "8"]),
    ],
    ids=["no biases", "small heads", "large heads"],
)
def test_moge_that_the_format_cannot_express_is_refused(
    tmp_path: Path, change: Raw, words: list[str]
) -> None:
    """The published class has biases and head_dim = hidden / heads, and no field for others."""
    model = pangu_jax.abstract(hf_config.from_hf({**folders.MOGE, **change}))
    with pytest.raises(pangu_jax.CheckpointError) as caught:
        pangu_jax.save_hf(model, tmp_path / "b")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("change", [{"bias": False}, {"head_dim": 6}, {"attention_bias": False}])
def test_moge_whose_own_config_said_so_is_written_back(tmp_path: Path, change: Raw) -> None:
    raw = {**folders.MOGE, **change}
    tensors = folders.random_tensors({**raw, "bias": not ({"bias", "attention_bias"} & {*change})})
    stored = folders.write(tmp_path / "a", raw, tensors)
    model = pangu_jax.load(tmp_path / "a")
    pangu_jax.save_hf(model, tmp_path / "b")
    same_tensors(stored_in(tmp_path / "b"), stored)
    assert pangu_jax.load(tmp_path / "b").config == model.config


@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_ordinary_models_can_be_expressed(tmp_path: Path, base: Raw) -> None:
    model = pangu_jax.init(hf_config.from_hf({**base, **TIED}), jax.random.key(1))
    pangu_jax.save_hf(model, tmp_path / "b")
    assert "lm_head.weight" not in stored_in(tmp_path / "b")
