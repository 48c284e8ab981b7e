"""Attention to cached keys and values on NVIDIA's Hopper, wherever their slots lie.

A program has up to 64 queries of one row that share a head of keys, as the rows of a tensor core:
grouped heads and successive tokens alike. It goes through its slots in blocks and keeps running
sums (online softmax, arXiv 1805.02867), several blocks under way at once. Where there are too few
such programs for the card, each has a part of the slots (split-KV, "flash decoding"), and XLA puts
the parts together.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.cache import LayerCache
from pangu_jax.kernels import mosaic
from pangu_jax.paged import Grid
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant.cached import Rows

QUERIES = 64
SLOTS = 64  # that are multiplied at once
HIDDEN = -1e30

# Planned from an H200's 132 processors and their shared memory, not measured.
PROGRAMS = 264
LOADS = 4
LEAST_BLOCKS = 4  # of a part


def can(queries: Float[Array, "R T K g H"], keys: Any) -> bool:
    """bf16 queries, and a cache of bf16 or int8 whose heads and pages come in whole blocks."""
    held = keys.numbers if isinstance(keys, Rows) else keys
    known = queries.dtype == jnp.bfloat16 and held.dtype in (jnp.bfloat16, jnp.int8)
    whole = queries.shape[-1] % 32 == 0 and keys.shape[-2] % SLOTS == 0
    return known and whole and queries.size > 0


def attend(
    queries: Float[Array, "R T K g H"], cache: LayerCache, grid: Grid, scales: Array | None
) -> Float[Array, "R T K g H"]:
    """`attend_cached` of one grid's rows; no gradient."""
    if scales is not None:  # a head's channels: of keys in the queries, of values in the result
        wide = queries.astype(jnp.float32) * scales[:, 0][None, None, :, None]
        own = _attend(wide.astype(queries.dtype), cache, grid).astype(jnp.float32)
        return (own * scales[:, 1][None, None, :, None]).astype(queries.dtype)
    return _attend(queries, cache, grid).astype(queries.dtype)


def _attend(queries: Array, cache: LayerCache, grid: Grid) -> Array:
    R, T, K, g, H = queries.shape
    count = T * g
    rows = min(QUERIES, -(-count // 8) * 8)
    tiles = -(-count // rows)
    queries = queries.transpose(0, 2, 1, 3, 4).reshape(R, K, count, H)
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, tiles * rows - count), (0, 0)])

    positions = jnp.where(grid.valid, grid.positions, -1).astype(jnp.int32)
    positions = jnp.repeat(positions, g, axis=1)
    positions = jnp.pad(positions, [(0, 0), (0, tiles * rows - count)], constant_values=-1)
    lengths = positions.reshape(R, tiles, rows).max(-1) + 1
    spare = [(0, 0), (0, 0), (0, QUERIES - rows)]
    positions = jnp.pad(positions.reshape(R, tiles, rows), spare, constant_values=-1)

    pages = grid.tables.astype(jnp.int32)
    if cache.layer is not None:
        pages = pages + cache.layer.astype(jnp.int32) * cache.keys.shape[1]
    parts = _parts(R * K * tiles, pages.shape[1] * cache.keys.shape[-2])
    made = _kernel(queries, cache, pages, positions, lengths, rows, parts)
    mixed = made[:, :, :count].reshape(R, K, T, g, H)
    return mixed.transpose(0, 2, 1, 3, 4)


def _parts(programs: int, slots: int) -> int:
    """Of the slots, for programs of their own; one where bits must not depend on other rows."""
    if wants_same_bits():
        return 1
    most = max(1, slots // (SLOTS * LEAST_BLOCKS))
    return min(most, max(1, PROGRAMS // programs))


def _kernel(
    queries: Float[Array, "R K M H"],
    cache: LayerCache,
    pages: Int[Array, "R P"],
    positions: Int[Array, "R tiles 64"],
    lengths: Int[Array, "R tiles"],
    rows: int,
    parts: int,
) -> Float[Array, "R K M H"]:
    """Of queries in tiles of `rows`, each at its position."""
    R, K, M, H = queries.shape
    page = cache.keys.shape[-2]
    kept = [*map(_numbers, (cache.keys, cache.values)), *_scales(cache)]
    scaled = len(kept) > 2
    program = functools.partial(_program, page=page, rows=rows, parts=parts, width=H)
    dtype = queries.dtype if parts == 1 else jnp.float32
    mixed, sums = mosaic.call(
        program,
        [((parts, R, K, M, H), dtype), ((parts, R, K, M), jnp.float32)],
        [queries, pages, positions, lengths, *kept],
        {"row": R, "head": K, "piece": M // rows * parts},
        _scratch(H, kept[0].dtype, queries.dtype, dtype, scaled),
    )
    if parts == 1:
        return mixed[0]
    shares = jnp.exp(sums - sums.max(0, keepdims=True))[..., None]
    return (mixed * shares).sum(0) / shares.sum(0)


def _numbers(held: Array | Rows) -> Array:
    """[LM, K, Z, H] of all layers."""
    numbers = held.numbers if isinstance(held, Rows) else held
    return numbers.reshape(-1, *numbers.shape[-3:])


def _scales(cache: LayerCache) -> list[Array]:
    """[LM, K, Z] of keys and of values; none where slots have no scale of their own."""
    own = [getattr(held, "scale", None) for held in (cache.keys, cache.values)]
    return [scale.reshape(-1, *scale.shape[-2:]) for scale in own if scale is not None]


def _scratch(H: int, held: Any, dtype: Any, result: Any, scaled: bool) -> dict[str, Any]:
    """The shared memory of a program."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    memory: dict[str, Any] = {
        "queries_in": gpu.SMEM((QUERIES, H), dtype),
        "at_in": gpu.SMEM((QUERIES,), jnp.int32),
        "first_loaded": gpu.Barrier(num_arrivals=2),
        "keys_in": gpu.SMEM((LOADS, SLOTS, H), held),
        "values_in": gpu.SMEM((LOADS, SLOTS, H), held),
        "loaded": gpu.Barrier(num_arrivals=4 if scaled else 2, num_barriers=LOADS),
        "mixed_out": gpu.SMEM((QUERIES, H), result),
        "sums_out": gpu.SMEM((QUERIES,), jnp.float32),
    }
    if scaled:
        memory["scales_in"] = [gpu.SMEM((LOADS, SLOTS), jnp.float32)] * 2
    if held == jnp.int8:
        memory["floats"] = [gpu.SMEM((SLOTS, H), dtype)] * 2
    if mosaic.is_interpreted():  # a left factor comes from registers else
        memory["weights_in"] = gpu.SMEM((QUERIES, SLOTS), dtype)
    return memory


def _program(
    queries: Any,
    pages: Any,
    positions: Any,
    lengths: Any,
    keys: Any,
    values: Any,
    *others: Any,
    page: int,
    rows: int,
    parts: int,
    width: int,
    **memory: Any,
) -> None:
    """One tile of queries and one part of its slots."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    *scales, mixed_out, sums_out = others
    r, k, piece = (lax.axis_index(name) for name in ("row", "head", "piece"))
    tile, part = piece // parts, piece % parts
    length = lengths[r, tile]
    each = (pl.cdiv(length, SLOTS) + parts - 1) // parts
    first = part * each
    last = jnp.minimum(first + each, pl.cdiv(length, SLOTS))

    def load(j: Array) -> None:
        slot = (j - first) % LOADS
        here = pages[r, j * SLOTS // page], k, pl.ds(j * SLOTS % page, SLOTS)
        into = [memory["keys_in"], memory["values_in"], *_scales_in(memory)]
        for pool, own in zip((keys, values, *scales), into, strict=True):
            gpu.copy_gmem_to_smem(pool.at[here], own.at[slot], memory["loaded"].at[slot])

    own = pl.ds(tile * rows, rows)
    begun = memory["first_loaded"]
    gpu.copy_gmem_to_smem(queries.at[r, k, own], memory["queries_in"].at[pl.ds(0, rows)], begun)
    gpu.copy_gmem_to_smem(positions.at[r, tile], memory["at_in"], begun)
    for ahead in range(LOADS):
        pl.when(first + ahead < last)(functools.partial(load, first + ahead))
    gpu.barrier_wait(begun)
    at = gpu.layout_cast(memory["at_in"][...], gpu.Layout.WGMMA.reduce(1))

    def step(j: Array, sums: tuple) -> tuple:
        slot = (j - first) % LOADS
        gpu.barrier_wait(memory["loaded"].at[slot])
        sums = _add_block(memory, slot, at - j * SLOTS, length - j * SLOTS, sums)
        pl.when(j + LOADS < last)(functools.partial(load, j + LOADS))
        return sums

    _finish(memory, lax.fori_loop(first, last, step, _no_sums(width)), mixed_out.dtype)
    for made, into in (("mixed_out", mixed_out), ("sums_out", sums_out)):
        gpu.copy_smem_to_gmem(memory[made].at[pl.ds(0, rows)], into.at[part, r, k, own])
    gpu.wait_smem_to_gmem(0)


def _no_sums(width: int) -> tuple[Array, Array, Array]:
    """Of each query, of no slots: values times weights, the highest score, the weights."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    whole, of_rows = gpu.Layout.WGMMA, gpu.Layout.WGMMA.reduce(1)
    cast = lambda shape, value, layout: gpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return (
        cast((QUERIES, width), 0, whole),
        cast((QUERIES,), HIDDEN, of_rows),
        cast((QUERIES,), 0, of_rows),
    )


def _add_block(memory: dict[str, Any], slot: Array, at: Array, left: Array, sums: tuple) -> tuple:
    """The sums with a block's slots, which lie in `slot` of the memory.

    at: the last slot of the block that each query sees
    left: slots of the block that are the row's own
    """
    from jax.experimental.pallas import mosaic_gpu as gpu

    mixed, highest, total = sums
    queries, width = memory["queries_in"], mixed.shape[1]
    keys, values = _floats(memory, slot, left)
    across = lambda x: lax.broadcast_in_dim(x, (QUERIES, SLOTS), [0])
    scales = [lax.broadcast_in_dim(own[slot], (QUERIES, SLOTS), [1]) for own in _scales_in(memory)]

    scores = _product(queries, keys.transpose((1, 0)), (QUERIES, SLOTS)) * width**-0.5
    if scales:
        scores = scores * scales[0]
    slots = gpu.broadcasted_iota(jnp.int32, (QUERIES, SLOTS), 1, layout=gpu.Layout.WGMMA)
    seen = slots <= across(at)
    scores = jnp.where(seen, scores, HIDDEN)
    higher = jnp.maximum(highest, scores.max(axis=1))
    weights = jnp.exp(scores - across(higher))
    before = jnp.exp(highest - higher)
    total = total * before + weights.sum(axis=1)
    if scales:  # a slot that is not seen may hold no number
        weights = jnp.where(seen, weights * scales[1], 0)
    weights = weights.astype(queries.dtype)
    if "weights_in" in memory:
        memory["weights_in"][...] = weights
        gpu.commit_smem()
        weights = memory["weights_in"]
    added = _product(weights, values, (QUERIES, width))
    return mixed * lax.broadcast_in_dim(before, mixed.shape, [0]) + added, higher, total


def _scales_in(memory: dict[str, Any]) -> list[Any]:
    """Of keys and of values; none where slots have no scale of their own."""
    return memory.get("scales_in", [])


def _product(left: Any, right: Any, shape: tuple[int, int]) -> Array:
    """left @ right on the tensor core."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    def sums(total: Any) -> Array:
        gpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(sums, gpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _finish(memory: dict[str, Any], sums: tuple, dtype: Any) -> None:
    """Means, and the logarithm of the weights' sum by which parts are put together."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    mixed, highest, total = sums
    divisor = jnp.where(total > 0, total, 1)
    mixed = mixed / lax.broadcast_in_dim(divisor, mixed.shape, [0])
    memory["mixed_out"][...] = mixed.astype(dtype)
    memory["sums_out"][...] = jnp.where(total > 0, highest + jnp.log(divisor), HIDDEN)
    gpu.commit_smem()


def _floats(memory: dict[str, Any], slot: Array, left: Array) -> tuple[Any, Any]:
    """The block's keys and values as a tensor core takes them. `left` slots of it are a row's own:
    the others may hold what somebody before left there; were it no number, 0 times it would not be
    0.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    own = memory["keys_in"].at[slot], memory["values_in"].at[slot]
    if "floats" in memory:
        for numbers, floats in zip(own, memory["floats"], strict=True):
            floats[...] = numbers[...].astype(floats.dtype)
        gpu.commit_smem()
        return tuple(memory["floats"])

    @pl.when(left < own[1].shape[0])
    def _() -> None:
        values = own[1][...]
        at = gpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=gpu.Layout.WGMMA)
        own[1][...] = jnp.where(at < left, values, jnp.zeros((), values.dtype))
        gpu.commit_smem()

    return own
