"""Attention to keys and values in pages, in plain XLA.

It goes through a row's pages in blocks and keeps running sums (online softmax, arXiv 1805.02867):
it stops behind the longest row, and nothing is copied that is not read. What a row gets depends on
its own pages alone, not on how many rows or pages there are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pangu_jax.cache import LayerCache
from pangu_jax.paged import Grid
from pangu_jax.parallel import boundary
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant import cached
from pangu_jax.quant.cached import Rows

# Slots of a block at least (own choice). A block on CPU is a page: many small products there cost
# more than the loop, but larger ones do not stay in the processor's cache (docs/benchmarks.md).
BLOCK = {"cpu": 1, "default": 1024}

HIDDEN = -1e30


def attend(
    queries: Float[Array, "R T K g H"],
    cache: LayerCache,
    grid: Grid,
    scales: Float[Array, "K 2 H"] | None,
) -> Float[Array, "R T K g H"]:
    """`attend_cached` of one grid's rows."""
    if wants_same_bits():
        shape = queries.shape
        alone = queries.reshape(-1, 1, *shape[2:])
        return _attend(alone, cache, _one_by_one(grid), scales).reshape(shape)
    return _attend(queries, cache, grid, scales)


def _attend(queries: Array, cache: LayerCache, grid: Grid, scales: Array | None) -> Array:
    def in_blocks(pages: int) -> Array:
        return _online(queries, cache, grid, scales, pages)

    slots, most = cache.keys.shape[-2], grid.tables.shape[1]
    sizes = {name: min(most, math.ceil(least / slots)) for name, least in BLOCK.items()}
    if sizes["cpu"] == sizes["default"] or wants_same_bits():  # every token is a row then
        return in_blocks(sizes["cpu"])
    cpu, default = (functools.partial(in_blocks, sizes[name]) for name in ("cpu", "default"))
    return lax.platform_dependent(cpu=cpu, default=default)


def _one_by_one(grid: Grid) -> Grid:
    """Every token as a row of its own: a product of one query is another one than of several."""
    length = grid.positions.shape[1]
    alone = lambda array: array.reshape(-1, 1)
    tables = jnp.repeat(grid.tables, length, axis=0)
    return Grid(alone(grid.positions), alone(grid.valid), tables)


def _online(
    queries: Array, cache: LayerCache, grid: Grid, scales: Array | None, pages: int
) -> Array:
    """`pages` pages of every row at a time."""
    R, T, K, g, H = queries.shape
    slots = cache.keys.shape[-2]
    size = pages * slots
    tables = jnp.pad(grid.tables, [(0, 0), (0, -grid.tables.shape[1] % pages)])
    lengths = jnp.max(jnp.where(grid.valid, grid.positions + 1, 0), axis=1)
    blocks = (jnp.max(lengths) + size - 1) // size
    queries = (queries.astype(jnp.float32) * H**-0.5).astype(queries.dtype)

    def step(i: Array, carry: tuple) -> tuple:
        highest, total, mixed = carry
        own = lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        keys = _floats(cache.keys, cache.layer, own, scales, 0, queries.dtype)
        values = _floats(cache.values, cache.layer, own, scales, 1, queries.dtype)
        scores = jnp.einsum("rtkgh,rksh->rkgts", queries, keys, preferred_element_type=jnp.float32)
        at = i * size + jnp.arange(size)
        # A page may hold what somebody before left there: were that no number, 0 times it would not
        # be 0.
        own_slots = (at[None, :] < lengths[:, None])[:, None, :, None]
        values = jnp.where(own_slots, values, jnp.zeros((), values.dtype))
        seen = at[None, None, :] <= grid.positions[:, :, None]  # [R, T, size]
        scores = jnp.where(seen[:, None, None], scores, HIDDEN)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        before = jnp.exp(highest - higher)
        added = jnp.einsum(
            "rkgts,rksh->rkgth",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        total = total * before + jnp.sum(weights, axis=-1)
        return higher, total, mixed * before[..., None] + added

    zeros = jnp.zeros((R, K, g, T), jnp.float32)
    start = (zeros + HIDDEN, zeros, jnp.zeros((R, K, g, T, H), jnp.float32))
    start = boundary.varying((start, queries, cache.keys))[0]
    _, total, mixed = lax.fori_loop(0, blocks, step, start)
    mixed = mixed / jnp.where(total > 0, total, 1)[..., None]
    return mixed.transpose(0, 3, 1, 2, 4).astype(queries.dtype)


def _floats(
    pool: Array | Rows,
    layer: Array | None,
    tables: Int[Array, "R P"],
    scales: Array | None,
    which: int,
    dtype: DTypeLike,
) -> Float[Array, "R K S H"]:
    """A block of keys or values: all slots of the given pages, as floats."""

    def take(leaf: Array) -> Array:
        found = leaf[tables] if layer is None else leaf[layer, tables]  # [R, P, K, Z, ..]
        found = found.swapaxes(1, 2)
        return found.reshape(*found.shape[:2], -1, *found.shape[4:])

    held = jax.tree.map(take, pool)
    if not isinstance(held, Rows):
        return held
    channels = None if scales is None else scales[:, which]
    return cached.to_floats(cached.with_channels(held, channels), dtype)
