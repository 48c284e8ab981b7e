"""`pangu_jax.load`: good folders give the right numbers, all others one line on what is wrong."""

import contextlib
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pangu_jax
from pangu_jax.build import named_leaves
from pangu_jax.checkpoint import names
from tests import folders, reference
from tests.limits import no_longer_than

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]

TOKENS = [5, 1, 93, 17, 17, 40, 2, 71, 0]
SHARDED = "model.safetensors.index.json"
TIED = {"tie_word_embeddings": True}


def check_message(message: str) -> None:
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert len(message) < 1500


def refuse(folder: Path, *words: str) -> str:
    """The one line with which the folder is refused; it contains every word."""
    with no_longer_than(20), pytest.raises(pangu_jax.CheckpointError) as caught:
        pangu_jax.load(folder)
    message = str(caught.value)
    check_message(message)
    for word in words:
        assert word in message
    return message


def with_config(folder: Path, change: Raw, base: Raw = folders.DENSE) -> Path:
    """A folder whose config.json says other things than its sound tensors; `...` drops a field."""
    if not (folder / "model.safetensors").exists():
        folders.write(folder, base)
    raw = {name: value for name, value in {**base, **change}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], None], base: Raw = folders.DENSE):
    """A folder of two shards with its weight_map changed."""
    folders.write(folder, base, shards=2)
    index = json.loads((folder / SHARDED).read_text())
    change(index["weight_map"])
    (folder / SHARDED).write_text(json.dumps(index))
    return folder


def raw_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Zeros under any dtype name, also those that NumPy does not know."""
    sizes = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "I32": 4, "F64": 8, "F32": 4}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.unlink(missing_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)


def leaves(model: pangu_jax.Pangu) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model)}


def same(a: pangu_jax.Pangu, b: pangu_jax.Pangu) -> None:
    """Equal to the bit."""
    ours, theirs = leaves(a), leaves(b)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        assert leaf.tobytes() == theirs[name].tobytes(), name


def check_logits(model: pangu_jax.Pangu, stored: Tensors, raw: Raw) -> None:
    """Against the float64 reference on the stored numbers."""
    expected = reference.forward(stored, raw, TOKENS)["logits"]
    found = np.asarray(model(np.array([TOKENS])))[0]
    assert np.abs(expected).max() > 1  # lively: a mistake would show
    np.testing.assert_allclose(found, expected, atol=3e-4, rtol=0)


# --- good folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_logits_are_the_reference_ones(tmp_path: Path, base: Raw, form: Any) -> None:
    stored = folders.write(tmp_path, base)
    model = pangu_jax.load(tmp_path, form=form)
    assert model.form == form
    assert model.dtype == np.float32
    check_logits(model, stored, base)


def test_logits_of_tied_embeddings(tmp_path: Path) -> None:
    raw = {**folders.DENSE, **TIED}
    stored = folders.write(tmp_path, raw)
    assert "lm_head.weight" not in stored
    model = pangu_jax.load(tmp_path)
    assert model.head is None
    check_logits(model, stored, raw)


@pytest.mark.parametrize(
    "change",
    [{"bias": False}, {"head_dim": 6, "num_key_value_heads": 4}],
    ids=["no biases", "own head_dim"],
)
def test_logits_of_other_shapes(tmp_path: Path, change: Raw) -> None:
    raw = {**folders.DENSE, **change}
    stored = folders.write(tmp_path, raw)
    check_logits(pangu_jax.load(tmp_path), stored, raw)


@pytest.mark.parametrize(
    ("base", "dtype"), [(folders.DENSE, "bfloat16"), (folders.MOGE, "float16")], ids=["bf16", "f16"]
)
def test_half_precision_is_kept_or_widened(tmp_path: Path, base: Raw, dtype: str) -> None:
    stored = folders.write(tmp_path, base, dtype=dtype)
    native = pangu_jax.load(tmp_path)
    assert native.dtype == folders.DTYPES[dtype]
    np.testing.assert_array_equal(native.embed[...], stored["model.embed_tokens.weight"])
    wide = pangu_jax.load(tmp_path, dtype="float32")
    assert wide.dtype == np.float32
    for name, leaf in leaves(wide).items():
        np.testing.assert_array_equal(leaf, leaves(native)[name].astype(np.float32))
    check_logits(wide, stored, base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing_rounds_to_nearest(tmp_path: Path, dtype: str) -> None:
    stored = folders.write(tmp_path, folders.DENSE)
    model = pangu_jax.load(tmp_path, dtype=dtype)
    assert model.config.dtype == "float32"  # how the checkpoint stores it
    expected = stored["lm_head.weight"].astype(folders.DTYPES[dtype])
    np.testing.assert_array_equal(model.head[...], expected)


@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_shards_are_the_same_model(tmp_path: Path, base: Raw, form: Any) -> None:
    folders.write(tmp_path / "one", base)
    folders.write(tmp_path / "three", base, shards=3)
    assert not (tmp_path / "three" / "model.safetensors").exists()
    one, three = (pangu_jax.load(tmp_path / name, form=form) for name in ("one", "three"))
    same(one, three)


@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_both_forms_are_the_same_model(tmp_path: Path, base: Raw) -> None:
    folders.write(tmp_path, base)
    separate = pangu_jax.load(tmp_path, form="separate")
    stacked = pangu_jax.load(tmp_path, form="stacked")
    same(pangu_jax.convert(stacked, "separate"), separate)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE, folders.random_tensors(folders.DENSE, 7), shards=2)
    stored = folders.write(tmp_path, folders.DENSE)
    found = pangu_jax.load(tmp_path).embed[...]
    np.testing.assert_array_equal(found, stored["model.embed_tokens.weight"])


def test_a_redundant_head_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    raw = {**folders.DENSE, **TIED}
    tensors = folders.random_tensors(raw)
    folders.write(tmp_path / "plain", raw, tensors)
    head = tensors["model.embed_tokens.weight"].copy()
    folders.write(tmp_path / "spare", raw, {**tensors, "lm_head.weight": head})
    same(pangu_jax.load(tmp_path / "plain"), pangu_jax.load(tmp_path / "spare"))


@pytest.mark.parametrize("shards", [1, 2])
def test_stray_inverse_frequencies_are_ignored(tmp_path: Path, shards: int) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    folders.write(tmp_path / "plain", folders.DENSE, tensors)
    for i in range(2):
        stray = np.full(4, np.nan, np.float32)
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = stray
    folders.write(tmp_path / "stray", folders.DENSE, tensors, shards=shards)
    same(pangu_jax.load(tmp_path / "plain"), pangu_jax.load(tmp_path / "stray"))


@pytest.mark.parametrize("shards", [1, 3])
def test_links_into_blobs_are_followed_as_in_the_hub_cache(tmp_path: Path, shards: int) -> None:
    folders.write(tmp_path / "plain", folders.DENSE, shards=shards)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copyfile(file, tmp_path / "blobs" / f"{i:040x}")
        link = tmp_path / "snapshots" / "abc" / file.name
        link.symlink_to(Path("../../blobs") / f"{i:040x}")
    linked = pangu_jax.load(tmp_path / "snapshots" / "abc")
    same(linked, pangu_jax.load(tmp_path / "plain"))


@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_experts_are_ordered_by_number(tmp_path: Path, form: Any) -> None:
    """Ten and up would come before two as text."""
    stored = folders.write(tmp_path, folders.MOGE, shards=2)
    model = pangu_jax.convert(pangu_jax.load(tmp_path, form=form), "separate")
    for i in range(2):
        expert = f"model.layers.{i}.mlp.experts"
        for e in range(12):
            mlp = model.blocks[i].mlp
            np.testing.assert_array_equal(mlp.down[e], stored[f"{expert}.{e}.down_proj.weight"])
            gate, up = (stored[f"{expert}.{e}.{n}_proj.weight"] for n in ("gate", "up"))
            np.testing.assert_array_equal(mlp.gate_up[e], np.stack([gate, up]))


def test_layers_are_ordered_by_number(tmp_path: Path) -> None:
    raw = {**folders.DENSE, "num_hidden_layers": 12}
    stored = folders.write(tmp_path, raw)
    model = pangu_jax.load(tmp_path, form="stacked")
    found = np.asarray(model.blocks[0].attention_norm.weight)
    for i in range(12):
        np.testing.assert_array_equal(found[i], stored[f"model.layers.{i}.input_layernorm.weight"])


def test_mixed_float_dtypes_are_read(tmp_path: Path) -> None:
    """One folder may hold a float32 router beside bfloat16 matrices."""
    stored = folders.write(tmp_path / "a", folders.MOGE)
    mixed = {
        name: tensor if "router" in name else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in stored.items()
    }
    library_numpy.save_file(mixed, tmp_path / "a" / "model.safetensors")
    model = pangu_jax.load(tmp_path / "a", dtype="float32")
    scale = model.blocks[1].mlp.router_scale[...]
    np.testing.assert_array_equal(scale, stored["model.layers.1.mlp.router_scale"][0])
    np.testing.assert_array_equal(
        model.embed[...], mixed["model.embed_tokens.weight"].astype(np.float32)
    )


def test_a_path_may_be_text(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE)
    same(pangu_jax.load(str(tmp_path)), pangu_jax.load(tmp_path))


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    stored = folders.write(tmp_path, folders.DENSE)
    calls: list[tuple[int, int]] = []
    pangu_jax.load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in stored.values())
    assert {seen for _, seen in calls} == {total}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": 7}, (7,)), ({"eos_token_id": [7, 9]}, (7, 9)), ({"top_k": 3}, (2,))],
)
def test_eos_of_the_generation_config_goes_first(
    tmp_path: Path, generation: Raw, expected: tuple[int, ...]
) -> None:
    folders.write(tmp_path, folders.DENSE)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert pangu_jax.load(tmp_path).config.eos_token_ids == expected


# --- tensors ----------------------------------------------------------------------------------

EVERY_DENSE = sorted(name for name in folders.random_tensors(folders.DENSE) if ".1." not in name)
SOME_MOGE = [
    "model.layers.1.mlp.gate.weight",
    "model.layers.0.mlp.router_scale",
    "model.layers.1.mlp.experts.0.gate_proj.weight",
    "model.layers.0.mlp.experts.11.up_proj.weight",
    "model.layers.1.mlp.experts.10.down_proj.weight",
    "model.layers.0.mlp.shared_expert.gate_proj.weight",
    "model.layers.1.mlp.shared_expert.down_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
]
TENSORS = [(folders.DENSE, name) for name in EVERY_DENSE]
TENSORS += [(folders.MOGE, name) for name in SOME_MOGE]
IDS = [("moge " if "num_experts" in base else "dense ") + name for base, name in TENSORS]


@pytest.mark.parametrize(("base", "name"), TENSORS, ids=IDS)
def test_a_missing_tensor_is_refused(tmp_path: Path, base: Raw, name: str) -> None:
    tensors = folders.random_tensors(base)
    del tensors[name]
    folders.write(tmp_path, base, tensors)
    refuse(tmp_path, str(tmp_path), "missing", name)


@pytest.mark.parametrize(("base", "name"), TENSORS, ids=IDS)
def test_a_wrong_shape_is_refused(tmp_path: Path, base: Raw, name: str) -> None:
    tensors = folders.random_tensors(base)
    wrong = np.concatenate([tensors[name], tensors[name][:1]])
    folders.write(tmp_path, base, {**tensors, name: wrong})
    refuse(tmp_path, "model.safetensors", name, str(list(wrong.shape)), str([*tensors[name].shape]))


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
)
@pytest.mark.parametrize("how", ["transposed", "flat", "extra axis"])
def test_the_right_size_in_another_shape_is_refused(tmp_path: Path, name: str, how: str) -> None:
    raw = {**folders.DENSE, "num_key_value_heads": 2}
    tensors = folders.random_tensors(raw)
    values = tensors[name]
    wrong = {"transposed": values.T, "flat": values.reshape(-1), "extra axis": values[None]}[how]
    if wrong.shape == values.shape:
        wrong = values[:, None]
    folders.write(tmp_path, raw, {**tensors, name: np.ascontiguousarray(wrong)})
    refuse(tmp_path, "model.safetensors", name, "shape")


def test_a_flat_router_scale_is_refused(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.MOGE)
    name = "model.layers.1.mlp.router_scale"
    folders.write(tmp_path, folders.MOGE, {**tensors, name: tensors[name][0]})
    refuse(tmp_path, name, "shape")


def test_a_missing_head_is_never_tied_silently(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    del tensors["lm_head.weight"]
    folders.write(tmp_path, folders.DENSE, tensors)
    refuse(tmp_path, "lm_head.weight", "tie_word_embeddings")


def test_a_missing_head_without_a_word_on_tying_is_refused(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    del tensors["lm_head.weight"]
    folders.write(tmp_path, folders.DENSE, tensors)
    with_config(tmp_path, {"tie_word_embeddings": ...})
    refuse(tmp_path, "lm_head.weight")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.00.input_layernorm.weight",
        "model.embed_tokens.bias",
        "embed_tokens.weight",
        "lm_head.bias",
        "inv_freq",
        "",
        "a\nb\x1b[2J",
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_an_extra_tensor_is_refused(tmp_path: Path, name: str, shards: int) -> None:
    tensors = {**folders.random_tensors(folders.DENSE), name: np.zeros(3, np.float32)}
    folders.write(tmp_path, folders.DENSE, tensors, shards=shards)
    shown = name if name.isprintable() else "a\\x0ab\\x1b[2J"
    refuse(tmp_path, str(tmp_path), ".safetensors", "unexpected", shown)


def test_an_extra_expert_is_refused(tmp_path: Path) -> None:
    tensors = folders.random_tensors({**folders.MOGE, "num_experts": 13})
    good = folders.random_tensors(folders.MOGE)
    extra = {name: tensor for name, tensor in tensors.items() if ".experts.12." in name}
    folders.write(tmp_path, folders.MOGE, {**good, **extra})
    refuse(tmp_path, "model.safetensors", "experts.12.")


@pytest.mark.parametrize(
    "name", ["qkv_proj.weight", "k_layernorm.weight", "param_sink_key", "e_score_correction_bias"]
)
def test_tensors_of_the_v2_network_are_called_by_name(tmp_path: Path, name: str) -> None:
    name = f"model.layers.0.self_attn.{name}"
    tensors = {**folders.random_tensors(folders.MOGE), name: np.zeros(3, np.float32)}
    folders.write(tmp_path, folders.MOGE, tensors)
    refuse(tmp_path, name, "openPangu-R-72B-2512")


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F8_E5M2", "I32", "BOOL", "F64"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_no_float_is_refused(tmp_path: Path, dtype: str, name: str) -> None:
    stored = folders.write(tmp_path, folders.DENSE)
    tensors = {n: ("F32", tensor.shape) for n, tensor in stored.items()}
    tensors[name] = (dtype, tensors[name][1])
    raw_file(tmp_path / "model.safetensors", tensors)
    refuse(tmp_path, "model.safetensors", name, dtype)


def test_biases_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    with_config(tmp_path, {"bias": False})
    refuse(tmp_path, "model.safetensors", "unexpected", "_proj.bias")


@pytest.mark.parametrize("value", [1e6, -1e38, np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_beyond_float16_are_refused(tmp_path: Path, value: float, dtype: str) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    folders.write(tmp_path, folders.DENSE, tensors, dtype=dtype)
    with pytest.raises(pangu_jax.CheckpointError) as caught:
        pangu_jax.load(tmp_path, dtype="float16")
    check_message(str(caught.value))
    for word in ("model.safetensors", "model.layers.1.mlp.up_proj.weight", "float16"):
        assert word in str(caught.value)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "sub/x.safetensors",
        "sub/../model-00001-of-00002.safetensors",
        "./model-00001-of-00002.safetensors",
        "..\\x.safetensors",
        "~/x.safetensors",
        "ABSOLUTE",
        "..",
        ".",
        "",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "inner"
    if file == "ABSOLUTE":
        file = str(tmp_path / "x.safetensors")
    edit_index(folder, lambda where: where.update({"model.norm.weight": file}))
    for place in (tmp_path, folder / "sub"):  # it exists: only its place is wrong
        place.mkdir(exist_ok=True)
        shutil.copyfile(folder / "model-00001-of-00002.safetensors", place / "x.safetensors")
    refuse(folder, SHARDED, "model.norm.weight", "outside the folder")


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"]
)
def test_an_index_of_pickles_is_refused(tmp_path: Path, file: str) -> None:
    edit_index(tmp_path, lambda where: where.update({"model.norm.weight": file}))
    (tmp_path / file).write_bytes(b"\x80\x04cos\nsystem\n.")
    refuse(tmp_path, SHARDED, "model.norm.weight", file, "pickle")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "x.npz", "x"])
def test_an_index_of_other_files_is_refused(tmp_path: Path, file: str) -> None:
    edit_index(tmp_path, lambda where: where.update({"model.norm.weight": file}))
    refuse(tmp_path, SHARDED, "model.norm.weight", file)


@pytest.mark.parametrize("file", [None, 3, 1.5, True, [], {}, ["model.safetensors"]])
def test_an_index_of_things_that_are_no_names_is_refused(tmp_path: Path, file: Any) -> None:
    edit_index(tmp_path, lambda where: where.update({"model.norm.weight": file}))
    refuse(tmp_path, SHARDED, "model.norm.weight")


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("a\nb.safetensors", "b.safetensors"),
        ("\x1b[2J\u2028.safetensors", ".safetensors"),
        ("\ud800.safetensors", ".safetensors"),
        ("n" * 300 + ".safetensors", "nnn"),
        ("n" * 10**5 + ".safetensors", "nnn"),
    ],
    ids=["newline", "escapes", "lone surrogate", "too long a name", "absurd name"],
)
def test_a_hostile_file_name_is_shown_on_one_short_line(
    tmp_path: Path, file: str, shown: str
) -> None:
    edit_index(tmp_path, lambda where: where.update({"model.norm.weight": file}))
    refuse(tmp_path, str(tmp_path), shown)


def test_an_index_that_lists_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    file = "model-00002-of-00002.safetensors"
    edit_index(tmp_path, lambda where: where.update({"model.extra.weight": file}))
    refuse(tmp_path, file, "model.extra.weight", "missing")


def test_an_index_with_a_tensor_in_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

    def swap(where: dict[str, str]) -> None:
        where["model.norm.weight"] = files[where["model.norm.weight"] == files[0]]

    edit_index(tmp_path, swap)
    refuse(tmp_path, "-of-00002.safetensors", "model.norm.weight")


def test_a_shard_with_a_tensor_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    edit_index(tmp_path, lambda where: where.pop("model.norm.weight"))
    refuse(tmp_path, "-of-00002.safetensors", "model.norm.weight", "not listed")


def test_a_tensor_stored_in_two_shards_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE, shards=2)
    for i in (1, 2):
        path = tmp_path / f"model-0000{i}-of-00002.safetensors"
        tensors = dict(library_numpy.load_file(path))
        tensors["model.norm.weight"] = np.full(32, i, np.float32)
        library_numpy.save_file(tensors, path)
    refuse(tmp_path, "-of-00002.safetensors", "model.norm.weight")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refuse(tmp_path, "model-00002-of-00003.safetensors", "no such file")


@pytest.mark.parametrize("damage", ["cut", "empty", "directory", "fifo", "pointer", "dangling"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_damaged_weight_file_is_refused(tmp_path: Path, damage: str, shards: int) -> None:
    folders.write(tmp_path, folders.DENSE, shards=shards)
    name = "model.safetensors" if shards == 1 else "model-00002-of-00003.safetensors"
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "directory":
        file.mkdir()
    elif damage == "fifo":
        os.mkfifo(file)
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    else:
        file.symlink_to("nowhere")
    refuse(tmp_path, str(tmp_path), name)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "model.safetensors", 3, True, [["a", "b"]], ...]
)
def test_a_weight_map_that_is_no_table_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folders.write(tmp_path, folders.DENSE, shards=2)
    index = {} if weight_map is ... else {"weight_map": weight_map}
    (tmp_path / SHARDED).write_text(json.dumps(index))
    refuse(tmp_path, SHARDED, "weight_map")


NOT_JSON = {
    "empty": b"",
    "text": b"weight_map",
    "cut": b'{"weight_map": {"a"',
    "a list": b"[]",
    "a number": b"4",
    "null": b"null",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b'{"a": NaN}',
    "minus Infinity": b'{"a": -Infinity}',
    "a key twice": b'{"a": 1, "a": 1}',
    "a key twice inside": b'{"weight_map": {"a": "x", "a": "y"}}',
    "deep lists": b"[" * 10**5 + b"]" * 10**5,
    "deep objects": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "two values": b"{}{}",
    "17 MiB": b'{"a": "' + b" " * 17 * 2**20 + b'"}',
}


@pytest.mark.parametrize("what", NOT_JSON)
@pytest.mark.parametrize("file", ["config.json", SHARDED, "generation_config.json"])
def test_a_file_that_is_no_strict_json_object_is_refused(
    tmp_path: Path, file: str, what: str
) -> None:
    folders.write(tmp_path, folders.DENSE, shards=2)
    (tmp_path / file).write_bytes(NOT_JSON[what])
    refuse(tmp_path, str(tmp_path / file))


@pytest.mark.parametrize("file", ["config.json", SHARDED, "generation_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "link to fifo", "device"])
def test_a_thing_that_is_no_file_is_refused_at_once(tmp_path: Path, file: str, kind: str) -> None:
    folder = tmp_path / "model"
    folders.write(folder, folders.DENSE, shards=2)
    (folder / file).unlink(missing_ok=True)
    if kind == "directory":
        (folder / file).mkdir()
    elif kind == "fifo":
        os.mkfifo(folder / file)
    elif kind == "link to fifo":
        os.mkfifo(tmp_path / "pipe")
        (folder / file).symlink_to(tmp_path / "pipe")
    else:
        (folder / file).symlink_to("/dev/zero")
    with no_longer_than(2):
        refuse(folder, str(folder / file), "regular file")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE)
    (tmp_path / "config.json").unlink()
    refuse(tmp_path, str(tmp_path / "config.json"), "no such file")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_of_pickles_is_refused(tmp_path: Path, file: str) -> None:
    folders.write(tmp_path, folders.DENSE)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    refuse(tmp_path, str(tmp_path), file, "pickle", "safetensors")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    refuse(tmp_path, str(tmp_path), "other.safetensors", "model.safetensors")
    (tmp_path / "other.safetensors").unlink()
    refuse(tmp_path, str(tmp_path), "no weights")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", str(tmp_path / "file"), "not a folder")
    (tmp_path / "link").symlink_to("nowhere")
    refuse(tmp_path / "link", str(tmp_path / "link"))


def test_a_folder_name_too_long_for_the_system_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / ("n" * 300), "nnn")


# --- config.json ------------------------------------------------------------------------------

# Each field of config.json, and the other name its complaint may use.
INTEGERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_positions",
    "head_dim": "head_dim",
}
DENSE_INTEGERS = {**INTEGERS, "intermediate_size": "intermediate_size"}
MOGE_INTEGERS = {
    **INTEGERS,
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_groups",
    "moe_intermediate_size": "expert_width",
    "shared_expert_intermediate_size": "shared_width",
}
FLOATS = {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "initializer_range": "init_range"}
TOKEN_IDS = {"bos_token_id": "bos", "pad_token_id": "pad", "eos_token_id": "eos"}
NO_NUMBER = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "true", "false", '"4"', '""']
NO_NUMBER += ["[]", "[4]", "{}", '{"a": 4}', "9" * 5000, '"a\\nb"', '"\\ud800"']
NO_INTEGER = [*NO_NUMBER, "4.0", "1.5", "4e0", "-0.0"]
NO_SIZE = [*NO_INTEGER, "0", "-1", "-4", str(2**24 + 1), str(2**31), str(2**63), "9" * 400]
NO_SCALE = [*NO_NUMBER, "0", "0.0", "-0.0", "-1", "-1e-5", "9" * 400]
NO_TOKEN = [*NO_INTEGER, "-1", "96", "9" * 400]


def corrupt(folder: Path, field: str, text: str, base: Raw) -> None:
    """config.json with the JSON text `text` at `field`."""
    with_config(folder, {field: "HERE"}, base)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"HERE"', text))


def refuse_each(folder: Path, field: str, ours: str, texts: list[str], base: Raw) -> None:
    for text in texts:
        if field == "eos_token_id" and text == "[]":
            continue  # no end-of-text token: allowed
        if field == "eos_token_id" and text == "[4]":
            text = '["4"]'
        corrupt(folder, field, text, base)
        message = refuse(folder, str(folder / "config.json"))
        unreadable = ("NaN", "Infinity", "number too long")
        assert field in message or ours in message or any(w in message for w in unreadable), text


@pytest.mark.parametrize("field", DENSE_INTEGERS)
def test_a_size_that_is_none_is_refused(tmp_path: Path, field: str) -> None:
    refuse_each(tmp_path, field, DENSE_INTEGERS[field], NO_SIZE, folders.DENSE)


@pytest.mark.parametrize("field", MOGE_INTEGERS)
def test_a_size_of_moge_that_is_none_is_refused(tmp_path: Path, field: str) -> None:
    refuse_each(tmp_path, field, MOGE_INTEGERS[field], NO_SIZE, folders.MOGE)


@pytest.mark.parametrize("field", FLOATS)
def test_a_number_out_of_range_is_refused(tmp_path: Path, field: str) -> None:
    refuse_each(tmp_path, field, FLOATS[field], NO_SCALE, folders.DENSE)


@pytest.mark.parametrize("field", TOKEN_IDS)
def test_a_token_id_that_is_none_is_refused(tmp_path: Path, field: str) -> None:
    refuse_each(tmp_path, field, TOKEN_IDS[field], NO_TOKEN, folders.DENSE)


@pytest.mark.parametrize("field", [*DENSE_INTEGERS, *FLOATS, *TOKEN_IDS, "tie_word_embeddings"])
def test_a_complaint_names_the_field_as_config_json_spells_it(tmp_path: Path, field: str) -> None:
    """The user looks for it in config.json: `num_layers` is not to be found there."""
    corrupt(tmp_path, field, '"text"', folders.DENSE)
    refuse(tmp_path, "config.json", field)


@pytest.mark.parametrize("field", [name for name in MOGE_INTEGERS if name not in INTEGERS])
def test_a_complaint_names_the_field_of_moge_as_config_json_spells_it(
    tmp_path: Path, field: str
) -> None:
    corrupt(tmp_path, field, '"text"', folders.MOGE)
    refuse(tmp_path, "config.json", field)


def test_a_bad_eos_of_the_generation_config_names_that_file(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.DENSE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4096}')
    refuse(tmp_path, str(tmp_path / "generation_config.json"), "eos", "4096")


REQUIRED = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_theta"]
REQUIRED += ["max_position_embeddings"]
MISSING = [(folders.DENSE, name) for name in [*REQUIRED, "intermediate_size"]]
MISSING += [(folders.MOGE, name) for name in MOGE_INTEGERS if name not in INTEGERS]


@pytest.mark.parametrize(("base", "field"), MISSING)
@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_a_missing_field_is_refused(tmp_path: Path, base: Raw, field: str, value: Any) -> None:
    with_config(tmp_path, {field: value}, base)
    refuse(tmp_path, str(tmp_path / "config.json"), f"{field} is missing")


def test_the_kind_of_model_must_be_given(tmp_path: Path) -> None:
    with_config(tmp_path, {"architectures": ..., "model_type": ...})
    refuse(tmp_path, str(tmp_path / "config.json"), "model_type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 7),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0),
        ("bias", "true"),
        ("bias", 1),
        ("torch_dtype", "int8"),
        ("torch_dtype", "float64"),
        ("torch_dtype", 16),
        ("torch_dtype", ["float32"]),
        ("torch_dtype", {"": "float32"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": ["linear"]}),
        ("rope_scaling", {"factor": 8.0}),
        ("rope_scaling", {"rope_type": None, "type": "linear", "factor": 8.0}),
        ("rope_scaling", "linear"),
        ("rope_scaling", 2.0),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "rope_theta": 10000.0}}),
        ("mlp_bias", True),
        ("mlp_bias", "false"),
        ("sliding_window", 4096),
        ("sliding_window", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("hidden_act", ["silu"]),
        ("hidden_act", {"silu": 1}),
        ("sandwich_norm", True),
        ("mlp_only_layers", [0]),
        ("attention_sink", True),
        ("quantization_config", {"quant_method": "w8a8_dynamic", "bits": 8}),
        ("quantization_config", {}),
        ("quantization_config", "int8"),
        ("attention_bias", False),
        ("qkv_bias", False),
    ],
)
def test_what_is_not_supported_is_refused_and_never_ignored(
    tmp_path: Path, field: str, value: Any
) -> None:
    with_config(tmp_path, {field: value})
    message = refuse(tmp_path, str(tmp_path / "config.json"))
    also = {"tie_word_embeddings": "tie_embeddings", "torch_dtype": "dtype", **DENSE_INTEGERS}
    assert field in message or also[field] in message


def test_experts_must_fill_the_groups(tmp_path: Path) -> None:
    with_config(tmp_path, {"num_experts_per_tok": 5}, folders.MOGE)
    refuse(tmp_path, str(tmp_path / "config.json"), "num_experts (12)", "5")


UNHASHABLE: list[Raw] = [
    {"architectures": [["PanguEmbeddedForCausalLM"]]},
    {"architectures": [{}]},
    {"architectures": [None]},
    {"architectures": ..., "model_type": []},
    {"architectures": ..., "model_type": {}},
    {"architectures": ..., "model_type": ["PanguEmbedded"]},
    {"architectures": [], "model_type": {"a": 1}},
    {"model_type": ["PanguEmbedded"]},
    {"model_type": 3},
]


@pytest.mark.parametrize("change", UNHASHABLE, ids=repr)
def test_a_kind_of_model_that_is_no_text_is_refused(tmp_path: Path, change: Raw) -> None:
    with_config(tmp_path, change)
    refuse(tmp_path, str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "fields",
    [
        ["hidden_act"],
        ["torch_dtype"],
        ["vocab_size"],
        ["eos_token_id"],
        ["model_type"],
        ["rope_scaling"],
        ["bias", "attention_bias"],
    ],
    ids=" ".join,
)
def test_nesting_of_any_depth_is_refused(tmp_path: Path, fields: list[str]) -> None:
    """Also where the JSON can just be read and only the complaint would nest too deeply."""
    folders.write(tmp_path, folders.DENSE)

    def message(depth: int) -> str:
        nest = "[" * depth + "]" * depth
        rest = {name: value for name, value in folders.DENSE.items() if name not in fields}
        nested = "".join(f', "{name}": {nest}' for name in fields)
        (tmp_path / "config.json").write_text(json.dumps(rest)[:-1] + nested + "}")
        return refuse(tmp_path, str(tmp_path / "config.json"))

    readable, too_deep = 2, 200_000
    assert "deep" in message(too_deep)
    while too_deep - readable > 1:
        middle = (readable + too_deep) // 2
        if "deep" in message(middle):
            too_deep = middle
        else:
            readable = middle
    for depth in range(max(2, too_deep - 30), too_deep + 3):
        message(depth)


@contextlib.contextmanager
def little_memory(limit: int = 32 * 2**20) -> Iterator[None]:
    """Fails when Python and NumPy together take more than `limit`."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", [name for name in DENSE_INTEGERS if "position" not in name])
@pytest.mark.parametrize("size", [2**24, 2**20, 4096, 66])
def test_absurd_sizes_fail_before_anything_is_allocated(
    tmp_path: Path, field: str, size: int
) -> None:
    with_config(tmp_path, {field: size})
    with no_longer_than(5), little_memory():
        refuse(tmp_path, str(tmp_path))


@pytest.mark.parametrize("field", [name for name in MOGE_INTEGERS if name not in INTEGERS])
def test_absurd_sizes_of_moge_fail_before_anything_is_allocated(tmp_path: Path, field: str) -> None:
    change = {"num_experts": 2**24} if field == "num_experts_per_tok" else {}
    with_config(tmp_path, {**change, field: 2**24}, folders.MOGE)
    with no_longer_than(5), little_memory():
        refuse(tmp_path, str(tmp_path))


def test_no_layer_is_read_when_there_are_far_too_many(tmp_path: Path) -> None:
    with_config(tmp_path, {"num_hidden_layers": 4096})
    with no_longer_than(5), little_memory():
        refuse(tmp_path, str(tmp_path), "model.layers.2.input_layernorm.weight")


@pytest.fixture
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as soon as very many tensor names are made: 50 million of them would take gigabytes."""
    made = 0
    whole = names.Part

    def counted(*args: Any, **kwargs: Any) -> names.Part:
        nonlocal made
        made += 1
        assert made < 10_000, "lists every claimed tensor"
        return whole(*args, **kwargs)

    monkeypatch.setattr(names, "Part", counted)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("drop", ["model.layers.0.mlp.gate.weight", ".mlp."])
def test_millions_of_claimed_experts_are_never_listed(tmp_path: Path, drop: str) -> None:
    """The first missing tensors end the reading and the complaint."""
    tensors = folders.random_tensors(folders.MOGE)
    kept = {name: tensor for name, tensor in tensors.items() if drop not in name}
    folders.write(tmp_path, folders.MOGE, kept)
    with_config(tmp_path, {"num_experts": 2**24}, folders.MOGE)
    refuse(tmp_path, "missing", "model.layers.0.mlp.gate.weight")


@pytest.mark.usefixtures("few_parts")
def test_millions_of_experts_with_a_router_are_never_listed(tmp_path: Path) -> None:
    """The router is as large as it says, in a file with a hole; the experts are missing."""
    width, experts = 2, 2**24
    raw = {**folders.MOGE, "hidden_size": width, "num_attention_heads": 1}
    raw = {**raw, "num_key_value_heads": 1, "num_experts": 12, "num_hidden_layers": 1}
    shapes = {name: tensor.shape for name, tensor in folders.random_tensors(raw).items()}
    shapes = {name: shape for name, shape in shapes.items() if "expert" not in name}
    shapes["model.layers.0.mlp.gate.weight"] = (experts, width)
    shapes["model.layers.0.mlp.router_scale"] = (1, experts)
    raw_file(tmp_path / "model.safetensors", {n: ("F32", shape) for n, shape in shapes.items()})
    with_config(tmp_path, {"num_experts": experts}, raw)
    refuse(tmp_path, "missing", "model.layers.0.mlp.experts.0.gate_proj.weight")


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-3, 200),
        st.sampled_from([2**24, 2**24 + 1, 2**31, 2**63, 10**400, -(10**400)]),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from([*folders.DENSE.values(), *folders.MOGE.values()]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "rope_type", "rope_theta", "factor", "a", ""]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=5,
)
FIELDS = [*folders.MOGE, "bias", "intermediate_size", "head_dim", "rope_scaling", "rope_parameters"]
FIELDS += [
    "mlp_bias",
    "sliding_window",
    "attention_bias",
    "qkv_bias",
    "quantization_config",
    "dtype",
]
FIELDS += ["n_routed_experts", "kv_lora_rank", "mlp_only_layers", "attention_sink"]


@pytest.fixture(scope="module", params=["dense", "moge"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sound folder that each example gives another config.json, and its sound config."""
    folder = tmp_path_factory.mktemp(request.param)
    base = folders.DENSE if request.param == "dense" else folders.MOGE
    folders.write(folder, base)
    return folder, base


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(field=st.sampled_from(FIELDS), value=VALUES, drop=st.booleans())
def test_random_corruption_of_a_field_is_refused_or_harmless(
    sound: tuple[Path, Raw], field: str, value: Any, drop: bool
) -> None:
    folder, base = sound
    with_config(
        folder, {"architectures": ... if drop else base["architectures"], field: value}, base
    )
    message = None
    try:
        with no_longer_than(20):
            model = pangu_jax.load(folder)
    except pangu_jax.CheckpointError as error:
        message = str(error)
    if message is not None:
        check_message(message)
        assert str(folder) in message
    else:
        assert model.embed.shape == (base["vocab_size"], base["hidden_size"])
        assert len(model.blocks) == base["num_hidden_layers"]
        if field in DENSE_INTEGERS and field != "max_position_embeddings" and field in base:
            assert value == base[field] or value is None
