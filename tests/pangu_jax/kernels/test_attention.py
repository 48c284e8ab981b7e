"""Attention to caches of every kind and form against a loop over queries in NumPy float64."""

import dataclasses
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
from pangu_jax.kernels import native
from pangu_jax.kernels.attention import attend_cached
from pangu_jax.precision import same_bits
from tests.pangu_jax.kernels import cached, oracle
from tests.pangu_jax.kernels.cached import KINDS, SHAPES, Case, Shape, attend, case, spoil, unused

IMPLEMENTATIONS = ("native", "xla", None)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
unnamed_or_plain = pytest.mark.parametrize("implementation", [None, "xla"])
SOME = ("float32", "bfloat16", "slots float32", "fixed bfloat16")
all_kinds = pytest.mark.parametrize("kind", SOME)
some_kinds = oracle.kinds(SOME[1:3], SOME[::3])
run = jax.jit(attend, static_argnames="implementation")

PAGED, CONTIGUOUS = SHAPES["odd pages"], SHAPES["contiguous"]
both_forms = pytest.mark.parametrize("form", ["odd pages", "contiguous"])


def attention(own: Case, implementation: Any, layered: bool = False) -> Any:
    of = own.of_layer if layered else lambda held: held
    layer = np.int32(1) if layered else None
    held = of(own.keys), of(own.values)
    return run(own.queries, *held, own.meta(), own.scales, implementation, layer)


def check(kind: str, own: Case, got: Any, exact: bool = False, sharp: float = 1) -> None:
    """Of queries that are not padding. XLA rounds scores and weights to bf16, and both do queries
    times fixed scales; the kernel rounds nothing else but the result.
    """
    exact = exact and not kind.startswith("fixed")
    tolerance = 1e-5 if "float32" in kind else 2**-8 if exact else 0.015 * max(1, sharp)
    assert got.dtype == own.queries.dtype
    oracle.close(np.asarray(got)[own.valid], cached.wanted(own)[own.valid], tolerance)


@settings(max_examples=12)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 999),
    st.sampled_from(list(SHAPES)),
    st.sampled_from([0.1, 1, 8]),
    st.booleans(),
)
def test_shapes_and_kinds(kind: str, seed: int, name: str, sharp: float, layered: bool) -> None:
    """Weights that are nearly equal, and such that are almost 0 or 1."""
    own = case(kind, seed, SHAPES[name], sharp)
    check(kind, own, attention(own, "native", layered), True, sharp)
    check(kind, own, attention(own, "xla", layered), False, sharp)


@some_kinds
@both_forms
def test_unnamed(kind: str, form: str) -> None:
    own = case(kind, 0, SHAPES[form])
    check(kind, own, attention(own, None))


def of_single_queries(own: Case) -> Any:
    """The kernel's results for one query after the other."""

    def one(column: tuple) -> Any:
        query, positions, valid = (x[:, None] for x in column)
        meta = dataclasses.replace(own, positions=positions, valid=valid).meta()
        return attend(query, own.keys, own.values, meta, own.scales, "native")[:, 0]

    columns = [np.moveaxis(x, 1, 0) for x in (own.queries, own.positions, own.valid)]
    return np.moveaxis(jax.jit(lambda columns: lax.map(one, columns))(columns), 0, 1)


@all_kinds
@pytest.mark.parametrize("name", ["pages beyond a vector", "many queries", "pages of one slot"])
def test_a_query_does_not_depend_on_the_others(kind: str, name: str) -> None:
    """To the last bit, however many of its row there are and how many rows."""
    own = case(kind, 0, SHAPES[name])
    with same_bits():
        whole = np.asarray(attention(own, "native"))
        oracle.same(of_single_queries(own)[own.valid], whole[own.valid])
        same_alone(own, whole)


@all_kinds
@pytest.mark.parametrize("name", ["contiguous, many queries", "many rows of many queries"])
def test_a_row_does_not_depend_on_the_others(kind: str, name: str) -> None:
    """Its bits may depend on how many queries it has."""
    own = case(kind, 0, SHAPES[name])
    same_alone(own, np.asarray(attention(own, "native")))


def same_alone(own: Case, whole: np.ndarray) -> None:
    for r in range(len(own.tables)):
        alone = np.asarray(attention(own.rows(slice(r, r + 1)), "native"))
        oracle.same(alone[0][own.valid[r]], whole[r][own.valid[r]])


def test_where_pages_lie_makes_no_difference() -> None:
    own = case("float32", 0, PAGED)
    order = np.random.default_rng(1).permutation(len(own.keys))
    moved = dataclasses.replace(
        own,
        keys=own.keys[order],
        values=own.values[order],
        tables=np.argsort(order)[own.tables].astype(np.int32),
    )
    for implementation in ("native", "xla"):
        results = [np.asarray(attention(c, implementation))[own.valid] for c in (own, moved)]
        oracle.same(*results)


@pytest.mark.parametrize("kind", ["float32", "slots float32"])
@pytest.mark.parametrize(
    ("form", "implementation"),
    [("odd pages", "native"), ("odd pages", "xla"), ("contiguous", "native")],
)
def test_what_lies_behind_a_row_is_not_seen(kind: str, form: str, implementation: Any) -> None:
    """And what pages that are not in the table hold. Not even where it is no number, but in plain
    XLA's contiguous form: such a cache begins with zeros and belongs to one sequence.
    """
    own = case(kind, 1, SHAPES[form])
    wanted, behind = cached.wanted(own)[own.valid], unused(own, beyond_own=False)
    assert behind.any()
    spoilt = [spoil(held, behind) for held in (own.keys, own.values)]
    got = run(own.queries, *spoilt, own.meta(), own.scales, implementation)
    oracle.close(np.asarray(got)[own.valid], wanted, 1e-5)


@some_kinds
@both_forms
@every_implementation
def test_a_query_that_is_no_number_spoils_no_other(
    kind: str, form: str, implementation: Any
) -> None:
    own = case(kind, 2, SHAPES[form], padding=False)
    own.queries = own.queries.at[1, 1, 0, 0, 3].set(jnp.nan)
    bad = np.isnan(oracle.wide(attention(own, implementation)))
    only = np.zeros(bad.shape, bool)
    only[1, 1, 0, 0] = True
    np.testing.assert_array_equal(bad, only)


@pytest.mark.parametrize("kind", ["float32", "slots float32", "fixed float32"])
def test_gradients_are_those_of_plain_xla(kind: str) -> None:
    """Of a contiguous cache: XLA's loop over pages has none."""
    own = case(kind, 3, CONTIGUOUS)
    argnums = (0, 1, 2) if kind == "float32" else 0

    def gradients(implementation: Any) -> Any:
        def loss(*arguments: Any) -> Any:
            mixed = attend(*arguments, own.meta(), own.scales, implementation)
            return jnp.sin(jnp.where(own.valid[..., None, None, None], mixed, 0)).sum()

        return jax.jit(jax.grad(loss, argnums))(own.queries, own.keys, own.values)

    compare = lambda got, wanted: oracle.close(got, oracle.wide(wanted), 1e-5)
    jax.tree.map(compare, gradients(None), gradients("xla"))


@both_forms
@unnamed_or_plain
def test_under_vmap(form: str, implementation: Any) -> None:
    """Over queries and caches; tables and positions are shared."""
    cases = [case("slots float32", 4, SHAPES[form]) for _ in range(2)]
    cases[1].queries = -cases[1].queries
    batch = [(c.queries, c.keys, c.values) for c in cases]
    meta = cases[0].meta()
    one = lambda *given: attend(*given, meta, None, implementation)
    got = jax.jit(jax.vmap(one))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch))
    for own, mixed in zip(cases, got, strict=True):
        check("slots float32", own, mixed)


@pytest.mark.parametrize(
    ("split", "kind"),
    [("heads", "fixed float32"), ("heads of pages", "slots float32"), ("rows", "float32")],
)
def test_over_devices(split: str, kind: str) -> None:
    Z = 7 if split == "heads of pages" else None
    own = case(kind, 5, Shape(8, 2, 8, 2, 16, 20, Z))
    rows, heads = ("x", None) if split == "rows" else (None, "x")
    held, where = P(rows, heads), P(rows)
    specs = (P(rows, None, heads), held, held, where, P(heads))
    for implementation in ("native", None):
        local = lambda *given, i=implementation: attend(*given, i)
        over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=specs[0])
        got = jax.jit(over)(own.queries, own.keys, own.values, own.meta(), own.scales)
        check(kind, own, got)


@unnamed_or_plain
def test_token_by_token_in_a_loop(implementation: Any) -> None:
    """Written and attended to in a scan; the cache begins empty."""
    own = case("float32", 6, Shape(2, 12, 2, 2, 16, 12), padding=False)

    def step(held: tuple, token: tuple) -> Any:
        query, key, value, t = token
        meta = Meta(jnp.full((2, 1), t), jnp.ones((2, 1), bool))
        cache = LayerCache(*held, None).write(key[:, :, None], value[:, :, None], meta)
        mixed = attend_cached(query[:, None], cache, meta, None, implementation)
        return (cache.keys, cache.values), mixed[:, 0]

    in_turn = [jnp.moveaxis(x, i, 0) for x, i in ((own.queries, 1), (own.keys, 2), (own.values, 2))]
    empty = jnp.zeros_like(own.keys)
    held, mixed = jax.jit(lambda *xs: lax.scan(step, (empty, empty), xs))(*in_turn, jnp.arange(12))
    own.positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    check("float32", own, jnp.moveaxis(mixed, 0, 1))
    oracle.same(held[0], own.keys)
    oracle.same(held[1], own.values)


def uses_kernel(own: Case, platform: str = "cpu") -> bool:
    arguments = own.queries, own.keys, own.values, own.meta(), own.scales
    lowered = jax.jit(attend).trace(*arguments).lower(lowering_platforms=(platform,))
    return "pangu_attention" in lowered.as_text()


@both_forms
def test_where_the_kernel_is_taken(form: str) -> None:
    own = case("float32", 0, SHAPES[form])
    assert uses_kernel(own)
    assert not uses_kernel(own, "tpu")


@some_kinds
@both_forms
def test_without_kernels(kind: str, form: str, plain_xla: None) -> None:
    own = case(kind, 0, SHAPES[form])
    assert not uses_kernel(own)
    check(kind, own, attention(own, None))


@both_forms
def test_by_name_what_it_cannot_do(form: str) -> None:
    """Without being named it is passed over."""
    own, narrow = (case("float32", 0, dataclasses.replace(SHAPES[form], H=h)) for h in (16, 12))
    half = dataclasses.replace(own, queries=own.queries.astype(jnp.float16))
    another = dataclasses.replace(own, queries=own.queries.astype(jnp.bfloat16))
    none = own.rows(slice(0, 0))
    for unfit in (narrow, half, another, none):
        with pytest.raises(NotImplementedError):
            attention(unfit, "native")
    with native.without(), pytest.raises(NotImplementedError):
        attention(own, "native")
    check("float32", narrow, attention(narrow, None))


@both_forms
@every_implementation
def test_fixed_scales_must_be_given(form: str, implementation: Any) -> None:
    own = case("fixed float32", 0, SHAPES[form])
    with pytest.raises(ValueError, match="numbers without scales"):
        run(own.queries, own.keys, own.values, own.meta(), None, implementation)


def test_no_packed_examples() -> None:
    own = case("float32", 0, CONTIGUOUS)
    meta = dataclasses.replace(own.meta(), segments=jnp.zeros_like(own.positions))
    with pytest.raises(ValueError, match="packed examples"):
        attend(own.queries, own.keys, own.values, meta)
