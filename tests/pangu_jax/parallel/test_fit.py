"""What fits a layout, what is padded or repeated for it, and that nothing is lost by that."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pangu_jax
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.errors import ConfigError
from pangu_jax.parallel import fit, layout
from pangu_jax.parallel.layout import (
    AttentionRoles,
    ExpertRoles,
    FFNRoles,
    Layout,
    MeshShape,
    ParamRoles,
)
from tests import layouts

sizes = st.integers(1, 24)


def over(x: int, y: int, **roles: Any) -> Layout:
    """H2P over x * y devices, with other roles."""
    return dataclasses.replace(layout.load("h2p-8"), mesh=MeshShape(1, x, y), **roles)


def dense(**fields: Any) -> ModelConfig:
    return dataclasses.replace(layouts.DENSE, **fields)


def moge(**fields: Any) -> ModelConfig:
    assert layouts.MOGE.moge is not None
    return dataclasses.replace(layouts.MOGE, moge=dataclasses.replace(layouts.MOGE.moge, **fields))


# --- what devices hold


def smallest_multiple(ranks: int, size: int) -> int:
    return next(n for n in range(size, size + ranks) if n % ranks == 0)


@settings(deadline=None)
@given(sizes, st.sampled_from([1, 2, 4, 8]), sizes, sizes)
def test_vocabulary_and_widths_are_padded_to_equal_parts(
    x: int, y: int, width: int, vocab: int
) -> None:
    whole = dense(intermediate_size=width, vocab_size=vocab, eos_token_ids=(), bos_token_id=None)
    held = fit.held(whole, over(x, y))
    assert held.intermediate_size == smallest_multiple(x * y, width)
    assert held.vocab_size == smallest_multiple(x * y, vocab)
    assert held.num_kv_heads == max(2, y)
    changed = ("intermediate_size", "vocab_size", "num_kv_heads")
    assert dataclasses.replace(held, **{name: getattr(whole, name) for name in changed}) == whole


@settings(deadline=None)
@given(sizes, st.sampled_from([1, 2, 4, 8]), sizes, sizes)
def test_experts_and_shared_experts_are_padded_each_by_its_own_axes(
    x: int, y: int, expert: int, shared: int
) -> None:
    whole = moge(expert_width=expert, shared_width=shared)
    held = fit.held(whole, over(x, y)).moge
    assert held is not None
    assert held.expert_width == smallest_multiple(x, expert)
    assert held.shared_width == smallest_multiple(x * y, shared)
    assert dataclasses.replace(held, expert_width=expert, shared_width=shared) == whole.moge


@pytest.mark.parametrize("config", layouts.MODELS.values(), ids=layouts.MODELS)
def test_one_device_holds_the_model_itself(config: ModelConfig) -> None:
    assert fit.held(config, layout.load("single")) == config


# --- leaves: K key/value heads of `per` queries each, and a key and a value


def some_numbers(*shape: int) -> np.ndarray:
    """All different, and none is zero."""
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


Projection = tuple[str, np.ndarray, tuple[int, ...]]


@st.composite
def projections(draw: Callable[..., Any]) -> Projection:
    """A fused projection or its bias, of one layer or a stack: (name, own, shape held)."""
    K, per_rank, repeats = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    before = draw(st.sampled_from([(), (1,), (3,)]))
    name, after = draw(st.sampled_from([("qkv", (2, 3)), ("qkv_bias", (2,))]))
    own = some_numbers(*before, K, per_rank * repeats + 2, *after)
    return f"blocks.0.attention.{name}", own, (*before, K * repeats, per_rank + 2, *after)


@st.composite
def padded(draw: Callable[..., Any]) -> Projection:
    own = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape = tuple(size + draw(st.integers(0, 3)) for size in own)
    names = ["embed", "blocks.0.mlp.gate_up", "blocks.1.attention.out", "blocks.0.mlp.shared.down"]
    return draw(st.sampled_from(names)), some_numbers(*own), shape


@settings(deadline=None)
@given(projections() | padded())
def test_a_models_own_numbers_come_back(case: Projection) -> None:
    name, own, shape = case
    held = fit.hold(name, own, shape)
    assert held.shape == shape
    back = fit.own_numbers(name, held, own.shape)
    assert isinstance(back, np.ndarray)
    assert back.dtype == own.dtype
    np.testing.assert_array_equal(back, own)


@settings(deadline=None)
@given(padded())
def test_padding_is_zeros_behind_the_numbers(case: Projection) -> None:
    name, own, shape = case
    held = fit.hold(name, own, shape)
    for place in np.ndindex(shape):
        inside = all(i < size for i, size in zip(place, own.shape, strict=True))
        assert held[place] == (own[place] if inside else 0)


@settings(deadline=None)
@given(projections())
def test_every_rank_has_its_queries_and_the_key_and_value_they_ask(case: Projection) -> None:
    name, own, shape = case
    axis = len(shape) - (4 if name.endswith("qkv") else 3)
    own = np.moveaxis(own, (axis, axis + 1), (0, 1))
    held = np.moveaxis(fit.hold(name, case[1], shape), (axis, axis + 1), (0, 1))
    per, per_rank = own.shape[1] - 2, held.shape[1] - 2
    for rank in range(len(held)):
        for i in range(per_rank):
            query = rank * per_rank + i
            head = query // per
            np.testing.assert_array_equal(held[rank, i], own[head, query % per])
            np.testing.assert_array_equal(held[rank, -2:], own[head, -2:])


@pytest.mark.parametrize(
    ("name", "own", "shape"),
    [
        ("blocks.0.attention.qkv", some_numbers(2, 2, 6, 2, 3), (2, 8, 3, 2, 3)),
        ("blocks.0.attention.qkv_bias", some_numbers(2, 6, 2), (4, 4, 2)),
        ("embed", some_numbers(5, 3), (8, 3)),
    ],
)
def test_arrays_of_jax_are_treated_alike(name: str, own: np.ndarray, shape: Any) -> None:
    """And the gradient of a repeated number is the sum over its copies; padding has none."""
    on_device = jnp.asarray(own, jnp.bfloat16)
    held = fit.hold(name, on_device, shape)
    assert isinstance(held, jax.Array)
    assert held.dtype == jnp.bfloat16
    np.testing.assert_array_equal(held, fit.hold(name, np.asarray(on_device), shape))
    np.testing.assert_array_equal(fit.own_numbers(name, held, own.shape), on_device)

    weight = some_numbers(*shape)
    to_own = jax.grad(lambda own: jnp.vdot(fit.hold(name, own, shape), weight))(jnp.asarray(own))
    places = fit.hold(name, np.arange(own.size).reshape(own.shape) + 1, shape)  # 0 is padding
    sums = [weight[places == i + 1].sum() for i in range(own.size)]
    np.testing.assert_array_equal(to_own, np.reshape(sums, own.shape))


def test_what_fits_already_is_not_copied() -> None:
    own = some_numbers(2, 6, 2)
    for name in ("blocks.0.attention.qkv_bias", "embed"):
        assert fit.hold(name, own, own.shape) is own
        assert fit.own_numbers(name, own, own.shape) is own


# --- what does not fit


def check_refusal(config: ModelConfig, where: Layout, fits: list[int], ranks: int) -> None:
    """Accepted where `ranks` is among those that fit; else one line that names the nearest."""
    if ranks in fits:
        fit.held(config, where)
        return
    with pytest.raises(ConfigError) as caught:
        fit.held(config, where)
    text = str(caught.value)
    assert "\n" not in text
    assert f": {ranks} ranks)" in text
    found = re.search(r"the nearest number that can is (\d+)$", text)
    assert found
    assert int(found[1]) in fits
    assert abs(int(found[1]) - ranks) == min(abs(n - ranks) for n in fits)


def alike(Q: int, K: int, ranks: int) -> bool:
    """Whether all ranks have as many queries, which ask as many key/value heads, each as often."""
    if Q % ranks:
        return False
    asked = [[query * K // Q for query in part] for part in np.split(np.arange(Q), ranks)]
    counts = [tuple(heads.count(head) for head in sorted(set(heads))) for heads in asked]
    return len(set(counts)) == 1 and len(set(counts[0])) == 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), sizes)
def test_heads_are_split_evenly_or_not_at_all(K: int, per: int, ranks: int) -> None:
    Q = K * per
    config = dense(num_heads=Q, num_kv_heads=K)
    fits = [n for n in range(1, Q + 1) if alike(Q, K, n)]
    check_refusal(config, over(1, ranks), fits, ranks)


EXPERTS_ONLY: dict[str, Any] = dict(
    attention=AttentionRoles(("data", "x", "y"), ()), shared=FFNRoles(())
)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), sizes, st.booleans())
def test_groups_stay_whole(groups: int, size: int, ranks: int, topk: bool) -> None:
    """The conventional router has no groups: its experts may be split as they come."""
    E = groups * size
    router = MoGEConfig(E, 1, 4, 4, router="topk") if topk else MoGEConfig(E, groups, 4, 4)
    config = dataclasses.replace(layouts.MOGE, moge=router)
    pieces = E if topk else groups
    fits = [n for n in range(1, pieces + 1) if pieces % n == 0]
    check_refusal(config, over(1, ranks, **EXPERTS_ONLY), fits, ranks)


@settings(deadline=None)
@given(st.integers(1, 40), sizes)
def test_every_server_has_an_equal_part_of_the_hidden_size(hidden: int, ranks: int) -> None:
    where = dataclasses.replace(layout.load("fsdp"), mesh=MeshShape(ranks, 1, 1))
    fits = [n for n in range(1, hidden + 1) if hidden % n == 0]
    check_refusal(dense(hidden_size=hidden), where, fits, ranks)


@pytest.mark.parametrize(
    ("config", "where", "complaint"),
    [
        (
            dense(num_heads=12, num_kv_heads=6),
            over(1, 8),
            "attention.heads (y: 8 ranks) cannot split 12 query and 6 key/value heads evenly; the "
            "nearest number that can is 6",
        ),
        (
            dense(num_heads=8, num_kv_heads=8),
            over(
                2,
                3,
                attention=AttentionRoles(("data",), ("x", "y")),
                experts=ExpertRoles((), ()),
            ),
            "attention.heads (x, y: 6 ranks) cannot split 8 query and 8 key/value heads evenly; "
            "the nearest number that can is 4",
        ),
        (
            moge(num_groups=2),
            over(1, 4),
            "experts.expert (y: 4 ranks) cannot hold 2 whole groups of experts evenly; the nearest "
            "number that can is 2",
        ),
        (
            layouts.TOPK,
            over(1, 6, **EXPERTS_ONLY),
            "experts.expert (y: 6 ranks) cannot hold 16 whole experts evenly; the nearest number "
            "that can is 4",
        ),
        (
            dense(hidden_size=36),
            over(
                8,
                1,
                experts=ExpertRoles((), ()),
                shared=FFNRoles(()),
                vocab=(),
                params=ParamRoles(("x",)),
            ),
            "params.fsdp (x: 8 ranks) cannot split a hidden size of 36 evenly; the nearest number "
            "that can is 9",
        ),
    ],
    ids=["kv heads", "heads of two axes", "groups", "experts", "fsdp"],
)
def test_refusals_say_all_numbers(config: ModelConfig, where: Layout, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit.held(config, where)
    assert str(caught.value) == complaint


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_held_heads_are_those_of_the_leaves(K: int, per: int, ranks: int) -> None:
    """`held` and `hold` agree: a projection of the held heads holds the model's."""
    Q = K * per
    assume(alike(Q, K, ranks))
    held = fit.held(dense(num_heads=Q, num_kv_heads=K), over(1, ranks)).num_kv_heads
    own = some_numbers(K, per + 2, 2)
    shape = (held, Q // held + 2, 2)
    assert fit.hold("attention.qkv_bias", own, shape).shape == shape
    assert held % ranks == 0


# --- the published models

# Embedded-1B has 12 query heads, which eight and four ranks with six key/value heads cannot split.
NEAREST = {("embedded-1b", "tp8"): 6, ("embedded-1b", "h2p-8"): 3, ("embedded-1b", "fsdp-h2p-8"): 3}


@pytest.mark.parametrize("name", ["embedded-1b", "embedded-7b", "pro-moe-72b"])
@pytest.mark.parametrize("where", ["single", "ep8", "fsdp", "tp8", "h2p-8", "fsdp-h2p-8"])
def test_published_models_fit_the_published_layouts(name: str, where: str) -> None:
    """Exactly: nothing is padded or repeated. All but the smallest under heads of many ranks."""
    config, found = pangu_jax.preset(name), layout.load(where).over(8)
    if (name, where) in NEAREST:
        complaint = f"cannot split 12 query .* can is {NEAREST[name, where]}$"
        with pytest.raises(ConfigError, match=complaint):
            fit.held(config, found)
    else:
        assert fit.held(config, found) == config


def test_published_models_on_more_devices() -> None:
    """The vocabulary is 32 * 4793; 7B's width is 12800 and Pro MoE's experts' 1344 and 5376."""
    small, large = pangu_jax.preset("embedded-7b"), pangu_jax.preset("pro-moe-72b")
    assert fit.held(small, over(1, 32)) == dataclasses.replace(small, num_kv_heads=32)
    held = fit.held(small, over(3, 16))
    assert (held.num_kv_heads, held.intermediate_size) == (16, 48 * 267)
    assert held.vocab_size == 48 * 3196
    held = fit.held(large, over(8, 8))
    assert held == dataclasses.replace(large, vocab_size=64 * 2397)
    with pytest.raises(ConfigError, match=r"cannot hold 8 whole groups .* number that can is 8"):
        fit.held(large, over(1, 40))
