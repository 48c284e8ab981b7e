"""Folders under layouts: read into the right places, the same numbers, written back bit for bit."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import pangu_jax
from pangu_jax import build
from pangu_jax.checkpoint import hf
from pangu_jax.errors import ConfigError
from pangu_jax.model import Pangu
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Layout
from tests import folders, layouts

MORE = {"num_attention_heads": 8, "vocab_size": 97}
RAWS: dict[str, dict[str, Any]] = {
    "dense": {**folders.DENSE, **MORE, "intermediate_size": 44},
    "moge": {
        **folders.MOGE,
        **MORE,
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 11,
    },
}
TOKENS = layouts.random_tokens(3, 5)


Case = tuple[str, str, str]


def cases(fast: set[Case]) -> list[Any]:
    """All families, layouts and forms; those that are not `fast` are slow."""
    every = [(n, w, f) for n in RAWS for w in layouts.NAMES for f in ("separate", "stacked")]
    assert fast <= set(every)
    return [
        pytest.param(case, marks=() if case in fast else pytest.mark.slow, id="-".join(case))
        for case in every
    ]


LOADED = {
    ("dense", "tp8", "separate"),
    ("dense", "fsdp", "separate"),
    ("moge", "tp8", "stacked"),
    ("moge", "ep8", "separate"),
    ("moge", "h2p-8", "separate"),
    ("moge", "h2p-8", "stacked"),
    ("moge", "fsdp-h2p-4x2", "stacked"),
}


@pytest.fixture(scope="module", params=cases(LOADED))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    found = {name: tmp_path_factory.mktemp(name) for name in RAWS}
    for name, path in found.items():
        folders.write(path, RAWS[name])
    return found


@pytest.fixture(scope="module")
def model(case: Case, homes: dict[str, Path]) -> Pangu:
    name, where, form = case
    return pangu_jax.load(homes[name], layout=layouts.named(where), form=form)


def leaves(model: Pangu) -> dict[str, Any]:
    return dict(build.named_leaves(model))


def equal_weights(one: Pangu, other: Pangu) -> None:
    got, wanted = build.weights(one), build.weights(other)
    assert list(got) == list(wanted)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def test_the_weights_are_those_of_one_device(
    model: Pangu, case: Case, homes: dict[str, Path]
) -> None:
    equal_weights(model, pangu_jax.load(homes[case[0]], form=model.form))


def test_every_leaf_lies_where_the_abstract_tree_says(model: Pangu) -> None:
    wanted = leaves(build.abstract(model.config, form=model.form, where=model.layout))
    for name, leaf in leaves(model).items():
        assert leaf.shape == wanted[name].shape
        assert leaf.dtype == wanted[name].dtype
        assert leaf.sharding == wanted[name].sharding, name


def test_saving_gives_the_source_back(
    model: Pangu, case: Case, homes: dict[str, Path], tmp_path: Path
) -> None:
    pangu_jax.save_hf(model, tmp_path / "saved", shard_bytes=40_000)
    got: dict[str, np.ndarray] = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        got |= safetensors.numpy.load_file(file)
    wanted = safetensors.numpy.load_file(homes[case[0]] / "model.safetensors")
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    config, _ = hf.read_config(tmp_path / "saved")
    assert config == model.config


def test_converting_keeps_numbers_and_places(model: Pangu) -> None:
    form: Any = "stacked" if model.form == "separate" else "separate"
    other = pangu_jax.convert(model, form)
    wanted = leaves(build.abstract(model.config, form=form, where=model.layout))
    for name, leaf in leaves(other).items():
        assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name
    before = leaves(model)
    for name, leaf in leaves(pangu_jax.convert(other, model.form)).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
        assert leaf.sharding.is_equivalent_to(before[name].sharding, leaf.ndim), name


SAME_LOGITS = {("dense", "tp8", "separate"), ("moge", "h2p-8", "stacked")}


@pytest.mark.parametrize("case", cases(SAME_LOGITS), scope="function")
def test_the_logits_are_those_of_one_device(case: Case, homes: dict[str, Path]) -> None:
    name, where, form = case
    model = pangu_jax.load(homes[name], layout=layouts.named(where), form=form)
    layouts.close(model(TOKENS), pangu_jax.load(homes[name], form=form)(TOKENS))


def test_a_name_of_a_layout_will_do(tmp_path: Path) -> None:
    folders.write(tmp_path, RAWS["moge"])
    equal_weights(pangu_jax.load(tmp_path, layout="h2p-8"), pangu_jax.load(tmp_path))
    file = tmp_path / "mine.toml"
    file.write_text(layout.config.named_file("layouts", "ep8").read_text())
    assert pangu_jax.load(tmp_path, layout=str(file)).layout == layout.load("ep8")


def test_what_a_rank_has_of_a_fused_projection(tmp_path: Path) -> None:
    """Against the file: rank r of tp8 has query head r, and the key and value head it asks; both
    are there as often as they are asked.
    """
    folders.write(tmp_path, RAWS["dense"])
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    of = lambda kind: stored[f"model.layers.1.self_attn.{kind}_proj.weight"].reshape(-1, 4, 32)
    model = pangu_jax.load(tmp_path, layout="tp8", form="separate")
    shards = leaves(model)["blocks.1.attention.qkv"].addressable_shards
    assert len(shards) == 8
    for shard in shards:
        r = shard.index[0].start
        wanted = np.stack([of("q")[r], of("k")[r // 4], of("v")[r // 4]])
        np.testing.assert_array_equal(shard.data[0], wanted)


def test_padding_is_zeros(tmp_path: Path) -> None:
    folders.write(tmp_path, RAWS["dense"])
    held = leaves(pangu_jax.load(tmp_path, layout="tp8", form="stacked"))
    for name, axis, size in (
        ("embed", 0, 97),
        ("head", 0, 97),
        ("blocks.0.mlp.gate_up", 2, 44),
        ("blocks.0.mlp.down", 2, 44),
    ):
        added = np.moveaxis(np.asarray(held[name]), axis, 0)[size:]
        assert added.size
        assert not added.any()


INITIALISED = {("dense", "tp8"), ("moge", "h2p-8"), ("moge", "another order")}


def initialised() -> list[Any]:
    every = [(n, w) for n in RAWS for w in (*layouts.NAMES, *layouts.ODD)]
    return [
        pytest.param(*each, marks=() if each in INITIALISED else pytest.mark.slow) for each in every
    ]


@pytest.mark.parametrize(("name", "where"), initialised())
def test_init_gives_the_same_numbers_everywhere(name: str, where: str) -> None:
    config = layouts.MODELS[name]
    model = layouts.init(config, layouts.named(where))
    equal_weights(model, layouts.init(config))
    for leaf, like in zip(
        jax.tree.leaves(model), jax.tree.leaves(layouts.abstract(config, model.layout)), strict=True
    ):
        assert leaf.sharding == like.sharding


@pytest.mark.parametrize(
    "where", ["tp8", *(pytest.param(w, marks=pytest.mark.slow) for w in ("h2p-8", "fsdp-h2p-4x2"))]
)
def test_a_models_weights_go_to_their_places_and_back(where: str) -> None:
    """`with_weights` undoes `weights`, padding and all."""
    model = layouts.init(layouts.MOGE, layouts.named(where))
    own, places = build.weights(model), build.places(model)
    for name, leaf in own.items():
        assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name
    again = build.with_weights(model, own)
    for (name, leaf), other in zip(build.named_leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=name)


def changed(**fields: Any) -> Any:
    return dataclasses.replace(layouts.named("h2p-8"), **fields)


@pytest.mark.parametrize(
    ("raw", "where", "complaint"),
    [
        (
            {**folders.DENSE, "num_attention_heads": 12, "hidden_size": 48},
            layouts.named("tp8"),
            r"attention\.heads \(y: 8 ranks\) cannot split 12 query and 2 key/value heads evenly; "
            r"the nearest number that can is 6",
        ),
        (
            {
                **folders.DENSE,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "hidden_size": 24,
            },
            changed(),
            r"attention\.heads \(y: 4 ranks\) cannot split 6 query and 3 key/value heads",
        ),
        (
            folders.MOGE,
            layouts.named("ep8"),
            r"experts\.expert \(y: 8 ranks\) cannot hold 4 whole groups of experts evenly; the "
            r"nearest number that can is 4",
        ),
        (
            {**folders.DENSE, "hidden_size": 36, "num_attention_heads": 2},
            layouts.named("fsdp"),
            r"params\.fsdp \(data: 8 ranks\) cannot split a hidden size of 36 evenly; the nearest "
            r"number that can is 9",
        ),
        (
            folders.DENSE,
            changed(mesh=layout.MeshShape(2, 2, 4)),
            r"the layout needs 16 devices; JAX sees 8; JAX_NUM_CPU_DEVICES=16",
        ),
    ],
    ids=["heads", "kv heads", "groups", "fsdp", "devices"],
)
def test_what_does_not_fit_is_one_line(
    raw: dict[str, Any], where: Layout, complaint: str, tmp_path: Path
) -> None:
    folders.write(tmp_path, raw)
    config, _ = hf.read_config(tmp_path)
    for attempt in (
        lambda: pangu_jax.load(tmp_path, layout=where),
        lambda: pangu_jax.init(config, jax.random.key(0), where=where),
    ):
        with pytest.raises(ConfigError, match=complaint) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_topk_router_may_split_its_only_group() -> None:
    config = dataclasses.replace(layouts.TOPK.moge, num_experts=12)
    with pytest.raises(ConfigError, match="cannot hold 12 whole experts evenly") as caught:
        layouts.init(dataclasses.replace(layouts.TOPK, moge=config), layouts.named("ep8"))
    assert "\n" not in str(caught.value)


def test_a_number_of_devices_that_is_no_multiple() -> None:
    own = changed(mesh=layout.MeshShape(-1, 3, 1))
    with pytest.raises(ConfigError, match="needs a multiple of 3 devices, not 8"):
        layouts.init(layouts.DENSE, own)
