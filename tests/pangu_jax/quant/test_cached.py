"""An int8 cache: attention's products with it, writing, growing and reordering it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pangu_jax import cache
from pangu_jax.cache import Cache, LayerCache, Meta
from pangu_jax.kernels.attention import full
from pangu_jax.quant import cached
from pangu_jax.quant.cached import Rows
from pangu_jax.quant.scheme import Recipe
from tests import layouts

B, K, G, H = 2, 3, 2, 8  # G queries' heads for each of K of keys
BF16 = ml_dtypes.bfloat16

both_scales = pytest.mark.parametrize("fixed", [False, True], ids=["per token", "per channel"])

to_rows = jax.jit(cached.to_rows)
mix = jax.jit(cached.mix, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames="dtype")
def products(queries: Any, keys: Rows, weights: Any, values: Rows, dtype: Any) -> Any:
    return cached.scores(queries, keys), cached.mix(weights, values, dtype)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def channels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.005, 0.02, (K, H)).astype(np.float32)


def held(seed: int, S: int, fixed: bool) -> Rows:
    """Any numbers, -128 too, that are worth 0 to 2."""
    rng = np.random.default_rng(seed)
    numbers = jnp.asarray(rng.integers(-128, 128, (B, K, S, H)), jnp.int8)
    if fixed:
        return Rows(numbers, channels=jnp.asarray(channels(seed)))
    return Rows(numbers, jnp.asarray(rng.uniform(0, 1 / 64, (B, K, S)), jnp.float32))


def worth(rows: Rows) -> np.ndarray:
    """The floats that they stand for."""
    found = np.asarray(rows.numbers, np.float64)
    if rows.scale is not None:
        found = found * np.asarray(rows.scale)[..., None]
    return found if rows.channels is None else found * np.asarray(rows.channels)[:, None]


# --- rounding


def test_a_scale_for_every_token_and_head() -> None:
    x = normal(0, B, K, 5, H) * np.geomspace(1e-3, 1e3, B * K * 5).reshape(B, K, 5, 1)
    x[1, 2, 3] = 0
    rows = to_rows(x.astype(np.float32), None)
    assert (rows.shape, rows.ndim, rows.channels) == (x.shape, 4, None)
    assert (rows.scale.shape, rows.scale.dtype) == ((B, K, 5), jnp.float32)
    assert not np.asarray(rows.scale)[1, 2, 3]
    np.testing.assert_allclose(rows.scale, np.abs(x).max(-1) / 127, rtol=1e-6)
    bound = np.abs(x).max(-1, keepdims=True) / 127 / 2
    assert (np.abs(worth(rows) - x) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fixed_scales_cut_what_is_beyond(dtype: Any) -> None:
    x, scale = normal(1, B, K, 5, H).astype(dtype), channels(1)
    rows = to_rows(x, scale)
    assert rows.scale is None
    wanted = np.round(np.float32(x) / scale[:, None])
    assert np.abs(wanted).max() > 127
    np.testing.assert_array_equal(rows.numbers, np.clip(wanted, -127, 127))
    np.testing.assert_array_equal(rows.channels, scale)


def test_a_channel_without_a_scale_is_nothing() -> None:
    scale = channels(2)
    scale[1, 3] = 0
    rows = to_rows(normal(2, B, K, 5, H), scale)
    assert not worth(rows)[:, 1, :, 3].any()
    got = jax.jit(cached.scores)(normal(3, B, 1, K, G, H), rows)
    assert np.isfinite(np.asarray(got)).all()


@both_scales
def test_halves_go_to_the_even_number(fixed: bool) -> None:
    x = np.zeros((1, K, 4, H), np.float32)
    x[..., 0], x[..., 1] = 127, np.array([0.5, 1.5, -2.5, 125.5])
    rows = to_rows(x, np.ones((K, H), np.float32) if fixed else None)
    np.testing.assert_array_equal(rows.numbers[0, 0, :, 1], [0, 2, -2, 126])


# --- the two products


# Whole on every platform; in blocks on CPU.
SLOTS = [7, 100, cached.SLOTS, 2 * cached.SLOTS, 3 * cached.SLOTS, 192]


@pytest.mark.parametrize("S", SLOTS)
@both_scales
def test_products_equal_numpys(S: int, fixed: bool) -> None:
    T = 1 if S % 2 else 3
    keys, values = held(4, S, fixed), held(5, S, fixed)
    queries, weights = normal(6, B, T, K, G, H), np.abs(normal(7, B, K, G, T, S))
    got, mixed = products(queries, keys, weights, values, jnp.float32)
    assert (got.dtype, mixed.dtype) == (jnp.float32, jnp.float32)
    of_keys, of_values = worth(keys), worth(values)
    wanted = np.einsum("btkgh,bksh->bkgts", queries, of_keys)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    wanted = np.einsum("bkgts,bksh->btkgh", weights, of_values)
    size = np.einsum("bkgts,bksh->btkgh", weights, np.abs(of_values))
    assert (np.abs(np.asarray(mixed) - wanted) <= 2e-6 * size).all()


@pytest.mark.parametrize("S", [7, 512])
@both_scales
def test_bf16_products_are_summed_in_float32(S: int, fixed: bool) -> None:
    """One rounding of the factors and one of the result."""
    keys, values = held(4, S, fixed), held(5, S, fixed)
    queries, weights = normal(6, B, 2, K, G, H, dtype=BF16), np.abs(normal(7, B, K, G, 2, S))
    got, mixed = products(queries, keys, weights, values, jnp.bfloat16)
    assert (got.dtype, mixed.dtype) == (jnp.float32, jnp.bfloat16)
    of_keys, of_values, queries = worth(keys), worth(values), np.float64(queries)
    error = got - np.einsum("btkgh,bksh->bkgts", queries, of_keys)
    size = np.einsum("btkgh,bksh->bkgts", np.abs(queries), np.abs(of_keys))
    assert (np.abs(error) <= (2.0**-8 if fixed else 1e-6) * size).all()
    error = np.float64(mixed) - np.einsum("bkgts,bksh->btkgh", weights, of_values)
    size = np.einsum("bkgts,bksh->btkgh", weights, np.abs(of_values))
    assert (np.abs(error) <= 2.0**-7 * size).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=lambda d: np.dtype(d).name)
@both_scales
def test_small_values_of_many_slots_are_not_lost(dtype: Any, fixed: bool) -> None:
    """A weight of 1/1024 times a scale of 1e-4 is no number in float16."""
    S = 1024
    values = normal(8, B, K, S, H) * 0.003 + 0.01
    rows = to_rows(values.astype(np.float32), channels(8) * 0.02 if fixed else None)
    mixed = mix(np.full((B, K, G, 1, S), 1 / S, np.float32), rows, jnp.dtype(dtype))
    wanted = worth(rows).mean(2)[:, None, :, None]
    np.testing.assert_allclose(np.float64(mixed), np.broadcast_to(wanted, mixed.shape), rtol=0.01)


def test_with_channels_keeps_the_numbers() -> None:
    rows = held(0, 7, True)
    bare = cached.with_channels(rows, None)
    assert len(jax.tree.leaves(bare)) == 1
    again = cached.with_channels(bare, rows.channels)
    np.testing.assert_array_equal(worth(again), worth(rows))


# --- attention


def rounding_bound(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: Any) -> Any:
    """How far half steps of keys and values may move attention's result: scores by e, and so
    weights by a factor of up to exp(2 e).
    """
    step = lambda x: np.abs(x).max(-1, keepdims=True) / 127 / 2
    logits = np.einsum("btkgh,bksh->bkgts", queries, keys) * H**-0.5
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    moved = np.einsum("btkgh,bksh->bkgts", np.abs(queries), step(keys) + 0 * keys) * H**-0.5
    factor = np.exp(2 * np.where(seen, moved, 0).max(-1, keepdims=True))
    mixed = lambda w, v: np.einsum("bkgts,bksh->btkgh", w, v + 0 * values)
    bound = mixed(weights * (factor - 1), np.abs(values)) + mixed(weights * factor, step(values))
    return mixed(weights, values), bound


@pytest.mark.parametrize(("T", "S"), [(3, 7), (1, 512), (full.QUERY_BLOCK + 2, 512)])
def test_attention_is_within_half_steps_of_floats(T: int, S: int) -> None:
    """Queries at the end of the cache; the last slots are of other tokens, which none may see."""
    queries, keys, values = normal(9, B, T, K, G, H), normal(10, B, K, S, H), normal(11, B, K, S, H)
    positions = np.broadcast_to(np.arange(S - T - 1, S - 1), (B, T)).astype(np.int32)
    slots = np.broadcast_to(np.arange(S), (B, S)).astype(np.int32)
    rows = to_rows(keys, None), to_rows(values, None)
    got = jax.jit(full.attend)(queries, *rows, positions, slots)
    seen = (slots[:, None] <= positions[..., None])[:, None, None]
    wanted, bound = rounding_bound(*map(np.float64, (queries, keys, values)), seen)
    assert bound.mean() < 0.1  # of values of 1
    assert (np.abs(got - wanted) <= bound + 1e-5).all()


@pytest.mark.usefixtures("optimised")
def test_no_float_copy_of_the_cache_is_made() -> None:
    shape, sd = (2, 4, 4096, 64), jax.ShapeDtypeStruct
    numbers, scale = sd(shape, jnp.int8), sd(shape[:3], jnp.float32)

    def attend(queries: Any, keys: Rows, values: Rows) -> Any:
        return cached.mix(jax.nn.softmax(cached.scores(queries, keys)), values, queries.dtype)

    rows = jax.eval_shape(Rows, numbers, scale)
    fixed = jax.eval_shape(lambda n, c: Rows(n, channels=c), numbers, sd((4, 64), jnp.float32))
    for dtype, own in ((jnp.bfloat16, rows), (jnp.float32, fixed)):
        lowered = jax.jit(attend).lower(sd((2, 1, 4, 1, 64), dtype), own, own)
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        assert temporary < np.prod(shape)  # half of one bf16 copy


# --- the cache around it

CAPACITY, L = 11, 2
PER_TOKEN, PER_CHANNEL = Recipe(cache="int8"), Recipe(cache="int8", cache_scales=True)

both_forms = pytest.mark.parametrize("run", [None, L], ids=["separate", "stacked"])


def filled(run: int | None, fixed: bool, seed: int = 0) -> tuple[Rows, Rows]:
    """Keys and values of a cache full of old numbers."""
    rng = np.random.default_rng(seed)
    shape = (*(() if run is None else (run,)), B, K, CAPACITY, H)

    def one() -> Rows:
        numbers = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        scale = jnp.asarray(rng.uniform(1, 2, shape[:-1]), jnp.float32)
        return Rows(numbers, None if fixed else scale)

    return one(), one()


@functools.partial(jax.jit, donate_argnums=0)
def write(own: LayerCache, keys: Any, values: Any, meta: Meta, scales: Any) -> LayerCache:
    return own.write(keys, values, meta, scales)


read = jax.jit(LayerCache.read)


def expected(old: Rows, new: Rows, meta: Meta, layer: int | None) -> list[np.ndarray]:
    """The parts of a cache after a write, in a loop."""
    parts = []
    for before, added in ((old.numbers, new.numbers), (old.scale, new.scale)):
        if before is None:
            continue
        after = np.array(before)
        own = after if layer is None else after[layer]
        for b, t in np.argwhere(np.asarray(meta.valid)):
            own[b, :, int(meta.positions[b, t])] = np.asarray(added)[b, :, t]
        parts.append(after)
    return parts


@both_forms
@both_scales
def test_valid_tokens_alone_are_written(run: int | None, fixed: bool) -> None:
    """Padding on either side, and a token in the last slot."""
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    scales = np.stack([channels(1), channels(2)], 1) if fixed else None
    for starts in ([0, 0], [CAPACITY - 3, 4]):
        meta = jax.jit(Meta.from_mask)(mask, np.array(starts, np.int32))
        layer = None if run is None else jnp.int32(1)
        own = LayerCache(*filled(run, fixed), layer)
        new = normal(12, B, K, 5, H), normal(13, B, K, 5, H)
        before = jax.tree.map(np.array, (own.keys, own.values))
        wrote = write(own, *new, meta, scales)
        for which, got in enumerate((wrote.keys, wrote.values)):
            rows = to_rows(new[which], None if scales is None else scales[:, which])
            index = None if run is None else 1
            wanted = expected(before[which], rows, meta, index)
            assert got.channels is None
            for one, two in zip(jax.tree.leaves(got), wanted, strict=True):
                np.testing.assert_array_equal(one, two)


@both_forms
@both_scales
def test_what_was_written_is_read(run: int | None, fixed: bool) -> None:
    scales = np.stack([channels(1), channels(2)], 1) * 20 if fixed else None
    layer = None if run is None else jnp.int32(0)
    new = [normal(seed, B, K, CAPACITY, H) for seed in (14, 15)]
    meta = jax.jit(Meta.from_mask)(np.ones((B, CAPACITY), bool))
    wrote = write(LayerCache(*filled(run, fixed), layer), *new, meta, scales)
    for which, (got, floats) in enumerate(zip(read(wrote, scales), new, strict=True)):
        assert got.shape == floats.shape
        step = np.abs(floats).max(-1, keepdims=True) / 127
        if scales is not None:
            step = scales[:, which][:, None]
        assert (np.abs(worth(got) - floats) <= step / 2 * (1 + 1e-5)).all()


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=2 * 6, max_size=2 * 6), st.integers(0, CAPACITY - 6))
def test_any_mask(mask: list[bool], start: int) -> None:
    meta = Meta.from_mask(jnp.array(mask).reshape(2, 6), jnp.full(2, start, jnp.int32))
    own = LayerCache(*filled(None, False), None)
    before, new = jax.tree.map(np.array, own.keys), normal(16, B, K, 6, H)
    got = write(own, new, new, meta, None).keys
    for one, two in zip(
        jax.tree.leaves(got), expected(before, to_rows(new, None), meta, None), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def whole(fixed: bool) -> Cache:
    """A separate layer, and a run of two."""
    parts = [filled(run, fixed, seed) for seed, run in enumerate((None, L))]
    return Cache(*map(tuple, zip(*parts, strict=True)), jnp.array([4, 7], jnp.int32))


@both_scales
def test_an_empty_cache(fixed: bool) -> None:
    recipe = PER_CHANNEL if fixed else PER_TOKEN
    blank = cache.empty(layouts.DENSE, (None, L), B, CAPACITY, jnp.bfloat16, recipe)
    assert blank.capacity == CAPACITY
    for buffers in (blank.keys, blank.values):
        assert [buffer.shape for buffer in buffers] == [(B, 2, CAPACITY, 4), (L, B, 2, CAPACITY, 4)]
        for buffer in buffers:
            assert buffer.numbers.dtype == jnp.int8
            assert (buffer.scale is None) == fixed
            assert fixed or buffer.scale.shape == buffer.shape[:-1]
            assert buffer.channels is None
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(blank))


@both_scales
def test_a_grown_cache_has_the_old_slots_first(fixed: bool) -> None:
    old = whole(fixed)
    new = jax.jit(cache.grow, static_argnames="capacity")(old, capacity=16)
    assert new.capacity == 16
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for one, two in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
        slots = one.ndim - 2
        for before, after in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            first, rest = np.split(np.asarray(after), [CAPACITY], axis=slots)
            np.testing.assert_array_equal(first, before)
            assert rest.shape[slots] == 5
            assert not rest.any()


@both_scales
def test_rows_are_taken_with_their_scales(fixed: bool) -> None:
    old, order = whole(fixed), np.array([1, 1, 0], np.int32)
    new = jax.jit(cache.take_rows)(old, order)
    np.testing.assert_array_equal(new.length, [7, 7, 4])
    for one, two in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
        for before, after in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            wanted = np.take(np.asarray(before), order, axis=one.ndim - 4)
            np.testing.assert_array_equal(after, wanted)


@both_scales
def test_numbers_and_scales_lie_in_the_same_places(fixed: bool) -> None:
    where = layouts.named("h2p-8")
    batch, heads = where.of("batch") or None, where.of("heads") or None
    assert batch or heads
    held = whole(fixed)
    specs = cache.specs(held, where)
    assert jax.tree.structure(specs) == jax.tree.structure(held)
    assert specs.length == PartitionSpec(batch)
    for separate, stacked in (specs.keys, specs.values):
        assert {*jax.tree.leaves(separate)} == {PartitionSpec(batch, heads)}
        assert {*jax.tree.leaves(stacked)} == {PartitionSpec(None, batch, heads)}
