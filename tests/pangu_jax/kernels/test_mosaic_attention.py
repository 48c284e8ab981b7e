"""Attention on a Hopper against a loop over queries in NumPy float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.cache import LayerCache, Meta
from pangu_jax.kernels import mosaic as hopper_kernels
from pangu_jax.kernels.attention import attend as attend_whole
from pangu_jax.kernels.attention import attend_cached, cudnn, full, mosaic
from pangu_jax.precision import same_bits
from tests.pangu_jax.kernels import cached, hopper, oracle
from tests.pangu_jax.kernels.cached import Case, Shape, attend, case, spoil, unused

SLOW = pytest.mark.slow
interpreted = hopper.needs_one

KINDS = ("bfloat16", "slots bfloat16", "fixed bfloat16")
SHAPES = {
    "one query each": Shape(3, 1, 2, 5, 64, 192, 64),
    "large pages": Shape(2, 1, 2, 2, 128, 256, 128),
    "contiguous": Shape(2, 3, 2, 1, 32, 192),
    "more queries than a tile": Shape(1, 40, 1, 4, 96, 128, 64),
    "parts": Shape(1, 2, 1, 4, 64, 1024, 64),
}


def run(own: Case, implementation: Any = "mosaic", layered: bool = False) -> Any:
    of = own.of_layer if layered else lambda held: held
    layer = jnp.int32(1) if layered else None
    arguments = own.queries, of(own.keys), of(own.values), own.meta(), own.scales
    with hopper.here():
        return jax.jit(lambda *given: attend(*given, implementation, layer))(*arguments)


def check(own: Case, got: Any, sharp: float = 1) -> None:
    assert got.dtype == own.queries.dtype
    wanted = cached.wanted(own)[own.valid]
    oracle.close(np.asarray(got)[own.valid], wanted, 0.015 * max(1, sharp))


@interpreted
@settings(max_examples=4)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 999),
    st.sampled_from(list(SHAPES)),
    st.sampled_from([0.1, 1, 8]),
    st.booleans(),
)
def test_shapes_and_kinds(kind: str, seed: int, name: str, sharp: float, layered: bool) -> None:
    own = case(kind, seed, SHAPES[name], sharp)
    check(own, run(own, layered=layered), sharp)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_in_parts(kind: str) -> None:
    """Few rows and many slots: each part has a program of its own."""
    own = case(kind, 0, SHAPES["parts"])
    assert mosaic._parts(1, 1024) == 4
    check(own, run(own))


def test_parts() -> None:
    """As many as the card has room for, of 256 slots at least; one where bits must be the same."""
    assert [mosaic._parts(n, 2048) for n in (1, 100, 264, 5000)] == [8, 2, 1, 1]
    with same_bits():
        assert mosaic._parts(1, 2048) == 1


@interpreted
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", ["one query each", "contiguous"])
def test_what_lies_behind_a_row_is_not_seen(kind: str, name: str) -> None:
    """And what pages that are not in the table hold: no numbers."""
    own = case(kind, 1, SHAPES[name])
    behind = unused(own, beyond_own=False)
    assert behind.any()
    wanted = cached.wanted(own)[own.valid]
    own.keys, own.values = (spoil(held, behind) for held in (own.keys, own.values))
    oracle.close(np.asarray(run(own))[own.valid], wanted, 0.015)


@interpreted
def test_a_query_that_is_no_number_spoils_no_other() -> None:
    own = case("bfloat16", 2, SHAPES["contiguous"], padding=False)
    own.queries = own.queries.at[1, 1, 0, 0, 3].set(jnp.nan)
    bad = np.isnan(oracle.wide(run(own)))
    only = np.zeros(bad.shape, bool)
    only[1, 1, 0, 0] = True
    np.testing.assert_array_equal(bad, only)


@interpreted
def test_the_same_bits_alone() -> None:
    own = case("bfloat16", 0, dataclasses.replace(SHAPES["parts"], R=3))
    with same_bits():
        whole, alone = run(own), run(own.rows(slice(1, 2)))
    oracle.same(np.asarray(alone)[0][own.valid[1]], np.asarray(whole)[1][own.valid[1]])


@interpreted
def test_gradients_are_those_of_plain_xla() -> None:
    own = case("bfloat16", 3, SHAPES["contiguous"])

    def gradients(implementation: str) -> Any:
        def loss(queries: Any, keys: Any, values: Any, meta: Any) -> Any:
            mixed = attend(queries, keys, values, meta, None, implementation)
            seen = meta.valid[..., None, None, None]
            return jnp.where(seen, mixed, 0).astype(jnp.float32).sum()

        with hopper.here():
            gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
            return gradient(own.queries, own.keys, own.values, own.meta())

    for got, wanted in zip(gradients("mosaic"), gradients("xla"), strict=True):
        oracle.close(got, oracle.wide(wanted), 1e-5)


MORE = {
    "ten queries of a head": Shape(2, 1, 2, 10, 32, 128, 64),
    "a tile and some": Shape(2, 13, 1, 5, 128, 192, 64),  # 65 queries
    "contiguous in parts": Shape(1, 1, 2, 1, 128, 512),
    "one slot": Shape(1, 1, 1, 1, 64, 64),
    "large pages in parts": Shape(2, 3, 1, 5, 96, 640, 128),
    "two whole tiles": Shape(1, 128, 1, 1, 32, 192, 64),
}


def parts(own: Case) -> int:
    """How many programs share a tile's slots."""
    R, T, K, g, Z = own.shape.R, own.shape.T, own.shape.K, own.shape.g, own.shape.Z
    rows = R if Z is None else -(-R // 2)  # two grids
    return mosaic._parts(rows * K * -(-T * g // 64), own.shape.pages * (Z or own.shape.S))


@interpreted
@pytest.mark.parametrize(
    "name", [*list(MORE)[:3], *(pytest.param(name, marks=SLOW) for name in list(MORE)[3:])]
)
def test_more_shapes(name: str) -> None:
    """Each with another kind, most of a stack; parts where the name says so."""
    i = list(MORE).index(name)
    own = case(KINDS[i % 3], i, MORE[name])
    assert (parts(own) > 1) == ("parts" in name)
    check(own, run(own, layered=i % 2 == 0))


@interpreted
@oracle.kinds(KINDS[1:2], KINDS[::2])
def test_parts_beyond_a_row(kind: str) -> None:
    """Of a row of two slots the second part has none, of one of padding nobody has; what they
    could read is no number.
    """
    own = case(kind, 4, Shape(3, 2, 1, 2, 64, 512), padding=False)
    own.positions = np.array([[0, 1], [510, 511], [300, 301]], np.int32)
    own.valid = np.array([[True] * 2, [True] * 2, [False] * 2])
    assert parts(own) == 2
    wanted = cached.wanted(own)[own.valid]
    if kind != "fixed bfloat16":
        behind = unused(own, beyond_own=False)
        own.keys, own.values = (spoil(held, behind) for held in (own.keys, own.values))
    got = oracle.wide(run(own))
    oracle.close(got[own.valid], wanted, 0.015)
    assert np.isfinite(got).all()


@interpreted
@oracle.kinds(KINDS[1:2], KINDS[2:])
def test_a_query_of_pages_that_is_no_number_spoils_no_other(kind: str) -> None:
    own = case(kind, 2, Shape(2, 2, 1, 3, 32, 320, 64), padding=False)
    own.queries = own.queries.at[1, 1, 0, 2, 3].set(jnp.nan)
    bad = np.isnan(oracle.wide(run(own)))
    only = np.zeros(bad.shape, bool)
    only[1, 1, 0, 2] = True
    np.testing.assert_array_equal(bad, only)


@SLOW
@interpreted
@pytest.mark.parametrize(("kind", "name"), [(KINDS[1], "large pages"), (KINDS[2], "contiguous")])
def test_the_same_bits_of_int8(kind: str, name: str) -> None:
    """Of a row alone, and wherever its pages lie."""
    own = case(kind, 0, SHAPES[name])
    with same_bits():
        whole, alone = run(own), run(own.rows(slice(0, 1)))
    oracle.same(np.asarray(alone)[0][own.valid[0]], np.asarray(whole)[0][own.valid[0]])


@SLOW
@interpreted
def test_where_pages_lie_makes_no_difference() -> None:
    own = case("bfloat16", 0, SHAPES["parts"])
    order = np.random.default_rng(1).permutation(len(own.keys))
    tables = np.argsort(order)[own.tables].astype(np.int32)
    moved = dataclasses.replace(own, keys=own.keys[order], values=own.values[order], tables=tables)
    oracle.same(*(np.asarray(run(c))[own.valid] for c in (own, moved)))


@interpreted
def test_token_by_token_in_a_loop() -> None:
    """Written and attended to in a scan; the cache begins empty."""
    own = case("bfloat16", 6, Shape(2, 6, 1, 2, 32, 64), padding=False)
    own.positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))

    def step(held: tuple, token: tuple) -> Any:
        query, key, value, t = token
        meta = Meta(jnp.full((2, 1), t), jnp.ones((2, 1), bool))
        cache = LayerCache(held[0], held[1], None).write(key[:, :, None], value[:, :, None], meta)
        mixed = attend_cached(query[:, None], cache, meta, None, "mosaic")
        return (cache.keys, cache.values), mixed[:, 0]

    new = [jnp.moveaxis(held[:, :, :6], 2, 0) for held in (own.keys, own.values)]
    in_turn = jnp.moveaxis(own.queries, 1, 0), *new, jnp.arange(6)
    empty = jnp.zeros_like(own.keys)
    with hopper.here():
        _, mixed = jax.jit(lambda *xs: lax.scan(step, (empty, empty), xs))(*in_turn)
    check(own, jnp.moveaxis(mixed, 0, 1))


@interpreted
@hopper.several_devices
@pytest.mark.parametrize(
    ("split", "kind"),
    [("heads", KINDS[2]), ("heads of pages", KINDS[1]), ("rows", KINDS[0])],
)
def test_traced_over_devices(split: str, kind: str) -> None:
    """Results vary over the devices they should: nothing interprets several."""
    own = case(kind, 5, Shape(8, 2, 8, 2, 32, 64, 64 if "pages" in split else None))
    rows, heads = ("x", None) if split == "rows" else (None, "x")
    held, where = P(rows, heads), P(rows)
    specs = (P(rows, None, heads), held, held, where, P(heads))
    local = functools.partial(attend, implementation="mosaic")
    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=specs[0])
    with hopper_kernels.compiled():
        made = jax.eval_shape(over, own.queries, own.keys, own.values, own.meta(), own.scales)
    assert (made.shape, made.dtype) == (own.queries.shape, own.queries.dtype)


@interpreted
def test_where_it_is_taken() -> None:
    """Within, for what it can do; by name it says what it cannot."""

    def text(own: Case, implementation: Any = None) -> str:
        own_arguments = own.keys, own.values, own.meta(), own.scales, implementation
        return str(jax.make_jaxpr(lambda q: attend(q, *own_arguments))(own.queries))

    own = case("bfloat16", 0, SHAPES["one query each"])
    with hopper.here():
        assert "wgmma" in text(own)
    assert "wgmma" not in text(own)
    with pytest.raises(NotImplementedError):
        text(own, "mosaic")
    small = dataclasses.replace(SHAPES["one query each"], Z=16)
    narrow = dataclasses.replace(SHAPES["one query each"], H=48)
    for kind, shape in (
        ("float32", SHAPES["large pages"]),
        *((KINDS[0], s) for s in (small, narrow)),
    ):
        cannot = case(kind, 0, shape)
        with hopper.here():
            assert "wgmma" not in text(cannot)
            with pytest.raises(NotImplementedError, match="with this cache"):
                text(cannot, "mosaic")


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_handed_to_cudnn(packed: bool) -> None:
    """The same arguments and mask, to another library: values and gradients of `full.attend`."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: oracle.array(rng.normal(size=shape), "float32")
    q, k, v = draw(2, 6, 2, 3, 16), draw(2, 2, 6, 16), draw(2, 2, 6, 16)
    at = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]], jnp.int32)
    segments = jnp.asarray([[0] * 6, [0, 0, 0, 1, 1, 1]], jnp.int32) if packed else None
    pull = draw(*q.shape)

    def both(attend: Any, **options: Any) -> Any:
        loss = lambda q, k, v: (attend(q, k, v, at, at, segments, **options) * pull).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    got = jax.tree.leaves(both(cudnn.attend, library="xla"))
    for own, wanted in zip(got, jax.tree.leaves(both(full.attend)), strict=True):
        oracle.close(own, oracle.wide(wanted), 1e-5)


def cudnn_can(B: int, T: int, S: int, H: int = 64, dtype: str = "bfloat16") -> bool:
    found: list[bool] = []
    queries, keys = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, 2, 3, H), (B, 2, S, H))
    )
    jax.eval_shape(lambda *given: found.append(cudnn.can(*given)), queries, keys)
    return found[0]


def test_what_cudnn_can_do() -> None:
    assert cudnn_can(2, 64, 64)
    assert not cudnn_can(2, 1, 64)
    assert not cudnn_can(2, 63, 64)
    assert not cudnn_can(2, 64, 64, H=192)
    assert not cudnn_can(2, 64, 64, dtype="float32")
    assert not cudnn_can(8, 2**14, 2**14)  # a mask of 4 GiB
    own = case("bfloat16", 0, SHAPES["contiguous"])
    at = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 192), jnp.int32)
    with pytest.raises(NotImplementedError):
        attend_whole(own.queries, own.keys, own.values, *at, implementation="cudnn")
