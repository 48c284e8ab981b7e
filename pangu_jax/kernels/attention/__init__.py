"""Attention of new tokens, to each other or to everything that is cached of their sequences."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangu_jax.cache import LayerCache, Meta
from pangu_jax.kernels import mosaic as hopper
from pangu_jax.kernels import native
from pangu_jax.kernels.attention import cudnn, full, mosaic, pages
from pangu_jax.kernels.choice import Kernel, choose
from pangu_jax.kernels.native import matrices
from pangu_jax.paged import AnyMeta, Grid, PagedMeta
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant.cached import Rows

Implementation = Literal["xla", "native", "mosaic"]


def attend(
    queries: Float[Array, "B T K g H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T K g H"]:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query's position, of the same
    example where rows hold several (`full.attend`).
    """

    def why_not() -> str:
        if hopper.is_interpreted():
            return "nothing interprets cuDNN"
        return hopper.why_not() or _unless(cudnn.can(queries, keys), queries)

    kernels = {"cudnn": Kernel(cudnn.attend, "cuda", why_not, has_gradient=True)}
    attend = choose(full.attend, implementation, kernels)
    return attend(queries, keys, values, query_positions, key_positions, segments)


def attend_cached(
    queries: Float[Array, "B T K g H"],
    cache: LayerCache,
    meta: AnyMeta,
    scales: Float[Array, "K 2 H"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T K g H"]:
    """softmax(q k^T / sqrt(H)) v over the slots at or before each query's position; softmax and
    sums in float32. What a query of padding gets is unspecified.

    meta: a Meta of a contiguous cache, or a PagedMeta, whose tokens are queries [1, N, K, g, H]
    scales: fixed ones of an int8 cache, of each head's keys and values

    `native` (CPU) reads slots where they lie, up to the last one that a row's queries may see. What
    a row gets does not depend on other rows or pages; within `precision.same_bits`, nor on how many
    of its queries come at once, to the last bit (where all that they see are numbers). `mosaic`
    (NVIDIA's Hopper) reads them there too.
    """
    keys = cache.keys
    if isinstance(keys, Rows) and keys.scale is None and keys.channels is None and scales is None:
        raise ValueError("numbers without scales: the cache was written with fixed ones")
    if isinstance(meta, PagedMeta):
        return _paged(queries, cache, meta, scales, implementation)
    if meta.segments is not None:
        raise ValueError("packed examples and a cache do not go together")
    one_page = jnp.arange(queries.shape[0], dtype=jnp.int32)[:, None]
    grid = Grid(meta.positions, meta.valid, one_page)
    return _choose(_contiguous, queries, cache, grid, scales, implementation)


def _contiguous(queries: Array, cache: LayerCache, grid: Grid, scales: Array | None) -> Array:
    held = cache.read(scales)
    B, _, S, _ = held[0].shape
    at = jnp.broadcast_to(jnp.arange(S), (B, S))
    return full.attend(queries, *held, grid.positions, at)


def _paged(
    queries: Array,
    cache: LayerCache,
    meta: PagedMeta,
    scales: Array | None,
    implementation: Implementation | None,
) -> Array:
    done, mixed = 0, []
    for grid in meta.grids:
        rows, length = grid.positions.shape
        own = queries[0, done : done + rows * length].reshape(rows, length, *queries.shape[2:])
        found = _choose(pages.attend, own, cache, grid, scales, implementation)
        mixed.append(found.reshape(1, rows * length, *own.shape[2:]))
        done += rows * length
    return jnp.concatenate(mixed, axis=1)


def _choose(
    plain: Any,
    queries: Float[Array, "R T K g H"],
    cache: LayerCache,
    grid: Grid,
    scales: Array | None,
    implementation: Implementation | None,
) -> Array:
    kernels = {
        "mosaic": Kernel(
            mosaic.attend,
            "cuda",
            lambda: hopper.why_not() or _unless(mosaic.can(queries, cache.keys), queries),
        ),
        "native": Kernel(
            _native,
            "cpu",
            lambda: native.why_not() or _unless(_native_can(queries, cache.keys), queries),
        ),
    }
    return choose(plain, implementation, kernels)(queries, cache, grid, scales)


def _unless(can: bool, queries: Array) -> str:
    return "" if can else f"{queries.dtype} heads of {queries.shape[-1]} with this cache"


def _native_can(queries: Array, keys: Any) -> bool:
    held = jnp.dtype(jnp.int8) if isinstance(keys, Rows) else keys.dtype
    fits = queries.dtype in matrices.FLOATS and held in (queries.dtype, jnp.int8)
    return fits and queries.shape[-1] % 16 == 0 and queries.size > 0


def _native(queries: Array, cache: LayerCache, grid: Grid, scales: Array | None) -> Array:
    dtype, layer = queries.dtype, jnp.zeros((), jnp.int32)
    if scales is not None:  # a head's channels: of keys in the queries, of values in the result
        queries = queries.astype(jnp.float32) * scales[:, 0][None, None, :, None]
    mixed = native.call(
        "pangu_attention",
        queries.shape,
        dtype if scales is None else jnp.float32,
        queries,
        *map(_numbers, (cache.keys, cache.values)),
        *map(_scale, (cache.keys, cache.values)),
        grid.tables.astype(jnp.int32),
        jnp.where(grid.valid, grid.positions, -1).astype(jnp.int32),
        layer if cache.layer is None else cache.layer.astype(jnp.int32),
        same_bits=wants_same_bits(),
    )
    if scales is None:
        return mixed
    return (mixed * scales[:, 1][None, None, :, None]).astype(dtype)


def _numbers(held: Any) -> Array:
    return held.numbers if isinstance(held, Rows) else held


def _scale(held: Any) -> Array:
    """Of each slot; nothing where there is none."""
    if isinstance(held, Rows) and held.scale is not None:
        return held.scale
    return jnp.zeros(0, jnp.float32)
