"""Keys and values put into caches, bit by bit, against loops over tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.cache import LayerCache
from pangu_jax.kernels import native
from pangu_jax.kernels.write import write
from pangu_jax.quant.cached import Rows
from tests.pangu_jax.kernels import cached, oracle
from tests.pangu_jax.kernels.cached import Shape

IMPLEMENTATIONS = ("native", "xla", None)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
unnamed_or_plain = pytest.mark.parametrize("implementation", [None, "xla"])
DTYPES = ("float32", "bfloat16", "int8")
run = jax.jit(write, static_argnames="implementation")


def numbers(seed: int, dtype: str, *shape: int) -> jax.Array:
    """Whole numbers up to 127, which every dtype holds; some of no other worth than their bits."""
    found = np.random.default_rng(seed).integers(-127, 128, shape)
    return oracle.array(found if dtype == "int8" else np.where(found > 100, np.nan, -found), dtype)


def places(seed: int, B: int, T: int, M: int, Z: int, one_page: bool) -> tuple[Any, Any]:
    """A page and slot of every token, each its own; some tokens are padding, slot Z or more."""
    rng = np.random.default_rng(seed)
    if one_page:  # a sequence is a page
        pages = rng.permutation(M)[:B, None]
        slots = np.stack([rng.permutation(Z)[:T] for _ in range(B)])
    else:
        pages, slots = np.divmod(rng.permutation(M * Z)[: B * T].reshape(B, T), Z)
    slots = np.where(rng.uniform(size=slots.shape) < 0.3, Z + rng.integers(0, 3), slots)
    return oracle.array(pages, "int32"), oracle.array(slots, "int32")


def written(cache: Any, added: Any, pages: Any, slots: Any, layer: int | None = None) -> Any:
    """Token by token."""
    out = np.array(cache)
    own = out if layer is None else out[layer]
    for b, t in np.ndindex(*slots.shape):
        if slots[b, t] < own.shape[2]:
            own[np.broadcast_to(pages, slots.shape)[b, t], :, slots[b, t]] = added[b, :, t]
    return out


# B, K, T, M, Z and what follows: channels, or nothing where scales are written.
SHAPES = [
    (1, 1, 1, 1, 1, (1,)),
    (2, 3, 2, 5, 7, (17,)),
    (3, 2, 5, 3, 16, (64,)),
    (3, 2, 4, 20, 1, ()),
    (1, 4, 40, 6, 16, (7,)),
]


@settings(max_examples=25)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 999),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_shapes(shape: tuple, seed: int, dtype: str, layer: int | None, one_page: bool) -> None:
    B, K, T, M, Z, rest = shape
    lead = () if layer is None else (3,)
    cache = numbers(seed, dtype, *lead, M, K, Z, *rest)
    added = numbers(seed + 1, dtype, B, K, T, *rest)
    where = places(seed, B, T, M, Z, one_page and M >= B and Z >= T)
    of_layer = None if layer is None else np.int32(layer)
    for implementation in ("native", "xla"):
        got = run(cache, added, *where, of_layer, implementation)
        oracle.same(got, written(cache, added, *where, layer), implementation)


def case(seed: int, dtype: str = "float32", pages: int = 9) -> tuple[Any, ...]:
    """Two sequences with three tokens each, eight heads."""
    cache = numbers(seed, dtype, pages, 8, 4, 16)
    return cache, numbers(seed + 1, dtype, 2, 8, 3, 16), *places(seed, 2, 3, pages, 4, False)


@every_implementation
def test_a_cache_that_is_not_given_away_stays(implementation: Any) -> None:
    """Compiled or not."""
    cache, *rest = case(0)
    before = np.array(cache)
    for function in (run, write):
        oracle.same(function(cache, *rest, None, implementation), written(before, *rest))
        oracle.same(cache, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("implementation", "layered"), [("native", True), (None, False)])
def test_a_cache_that_is_given_away_is_changed_in_place(
    dtype: str, implementation: Any, layered: bool
) -> None:
    """In bf16 too, of which XLA makes a float32 copy; and where a loop carries it."""
    cache, added, pages, slots = case(0, dtype, pages=500)
    layer = jnp.int32(1) if layered else None
    cache = jnp.stack([cache] * 3) if layered else cache

    def step(t: Any, cache: Any) -> Any:
        token = lax.dynamic_slice_in_dim(added, t, 1, 2), lax.dynamic_slice_in_dim(slots, t, 1, 1)
        page = lax.dynamic_slice_in_dim(pages, t, 1, 1)
        return write(cache, token[0], page, token[1], layer, implementation)

    wanted = written(cache, added, pages, slots, 1 if layered else None)
    once = lambda cache: write(cache, added, pages, slots, layer, implementation)
    for function in (once, lambda cache: lax.fori_loop(0, 3, step, cache)):
        compiled = jax.jit(function, donate_argnums=0).lower(cache).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == cache.nbytes
        assert memory.temp_size_in_bytes < cache.nbytes / 10
        oracle.same(compiled(cache.copy()), wanted)


@unnamed_or_plain
def test_under_vmap(implementation: Any) -> None:
    """Over caches, and over what is written to one."""
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[case(i) for i in range(3)])
    one = lambda *given: write(*given, None, implementation)
    shared = jax.jit(jax.vmap(one, (None, 0, 0, 0)))(batch[0][0], *batch[1:])
    for i, got in enumerate(jax.jit(jax.vmap(one))(*batch)):
        own = [leaf[i] for leaf in batch]
        oracle.same(got, written(*own))
        oracle.same(shared[i], written(batch[0][0], *own[1:]))


@unnamed_or_plain
@pytest.mark.parametrize("split", ["heads", "pages"])
def test_over_devices(implementation: Any, split: str) -> None:
    """Of heads; or of pages, which every device has of its own."""
    cache, added, pages, slots = case(0)
    if split == "heads":
        specs = (P(None, "x"), P(None, "x"), P(), P())
        wanted = written(cache, added, pages, slots)
    else:
        cache, added = (jnp.concatenate([leaf + i for i in range(8)]) for leaf in (cache, added))
        pages, slots = (jnp.concatenate([leaf] * 8) for leaf in (pages, slots))
        specs = (P("x"),) * 4
        of_all = pages + jnp.repeat(9 * jnp.arange(8), 2)[:, None]
        wanted = written(cache, added, of_all, slots)
    local = lambda *given: write(*given, None, implementation)
    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=specs[0])
    oracle.same(jax.jit(over)(cache, added, pages, slots), wanted)


def test_gradients_are_those_of_plain_xla() -> None:
    """To what is written, and to what stays of the cache."""
    cache, added, pages, slots = jax.tree.map(jnp.nan_to_num, case(0))

    def gradients(implementation: Any) -> Any:
        loss = lambda *two: jnp.sin(write(*two, pages, slots, None, implementation)).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(cache, added)

    for got, wanted in zip(gradients(None), gradients("xla"), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_numbers_of_another_dtype_are_not_copied_as_they_are() -> None:
    """Their bits mean nothing there, and wider ones lie beyond the end."""
    cache, _, pages, slots = case(0)
    added, narrow = jnp.ones((2, 8, 3, 16), jnp.bfloat16), cache.astype(jnp.bfloat16)
    by_name = lambda *given: write(*given, pages, slots, None, "native")
    for pair in ((cache, added), (narrow, added.astype(jnp.float32))):
        with pytest.raises(NotImplementedError):
            jax.eval_shape(by_name, *pair)
    with pytest.raises(ValueError, match="promotion"):
        write(cache, added, pages, slots, None)


@unnamed_or_plain
@pytest.mark.parametrize("Z", [None, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "slots bfloat16", "fixed float32"])
def test_a_layers_cache(kind: str, Z: int | None, implementation: Any) -> None:
    """Contiguous or in pages, of floats or rounded to int8; padding is not written."""
    own = cached.case(kind, 0, Shape(2, 4, 2, 1, 16, 10, Z))
    rng, scales = np.random.default_rng(1), own.scales
    dtype, pages = kind.split()[-1], own.tables
    new = [jnp.asarray(rng.normal(size=(2, 2, 4, 16)), dtype) for _ in range(2)]
    valid = own.valid & (np.arange(2)[:, None] == 0) if Z else own.valid  # pages are shared
    own.valid = valid
    flat = lambda x: x.transpose(1, 0, 2, 3).reshape(1, 2, 8, 16) if Z else x
    held = own.of_layer(own.keys), own.of_layer(own.values)

    def put(keys: Any, values: Any, new: Any, meta: Any, scales: Any) -> Any:
        cache = LayerCache(keys, values, jnp.int32(1))
        return cache.write(*map(flat, new), meta, scales)

    if implementation == "xla":
        with native.without():
            got = jax.jit(put)(*held, new, own.meta(), scales)
    else:
        got = jax.jit(put)(*held, new, own.meta(), scales)
    at = own.positions % (Z or 10)
    where = np.take_along_axis(pages, own.positions // (Z or 10), 1), np.where(valid, at, 99)
    for which, (before, after) in enumerate(zip(held, (got.keys, got.values), strict=True)):
        if not isinstance(before, Rows):
            oracle.same(after, written(before, new[which], *where, 1))
            continue
        if scales is None:
            rounded, scale = oracle.rounded(new[which])
            oracle.same(after.scale, written(before.scale, scale[..., 0], *where, 1))
        else:
            ratio = np.asarray(new[which]) / np.asarray(scales)[:, which, None]
            rounded = np.clip(np.round(ratio), -127, 127)
            assert np.abs(ratio).max() > 127  # and is cut
        oracle.same(after.numbers, written(before.numbers, rounded, *where, 1))


@unnamed_or_plain
def test_in_a_loop_over_layers(implementation: Any) -> None:
    _, added, pages, slots = case(0)
    stack = numbers(5, "float32", 3, 9, 8, 4, 16)
    step = lambda held, layer: (write(held, added, pages, slots, layer, implementation), None)
    got = jax.jit(lambda held: lax.scan(step, held, jnp.array([2, 0]))[0])(stack)
    wanted = written(written(stack, added, pages, slots, 0), added, pages, slots, 2)
    oracle.same(got, wanted)


def uses_kernel(*arguments: Any, platform: str = "cpu") -> bool:
    lowered = run.trace(*arguments, None).lower(lowering_platforms=(platform,))
    return "pangu_write" in lowered.as_text()


def test_where_the_kernel_is_taken() -> None:
    assert uses_kernel(*case(0))
    assert not uses_kernel(*case(0), platform="tpu")


def test_without_kernels(plain_xla: None) -> None:
    assert not uses_kernel(*case(0))
    oracle.same(run(*case(0), None), written(*case(0)))


def test_by_name_what_it_cannot_do() -> None:
    cache, added, pages, slots = case(0)
    with pytest.raises(NotImplementedError):
        write(cache, added[:, :, :0], pages[:, :0], slots[:, :0], None, "native")
    oracle.same(run(cache, added[:, :, :0], pages[:, :0], slots[:, :0], None), cache)
    with native.without(), pytest.raises(NotImplementedError):
        write(cache, added, pages, slots, None, "native")
