"""Attention to keys and values that lie in one piece, in plain XLA."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.quant import cached
from pangu_jax.quant.cached import Rows

# Queries whose scores are held at once: bounds the [B, Q, block, S] float32 scores of long prompts
# (own choice).
QUERY_BLOCK = 128


def attend(
    queries: Float[Array, "B T K g H"],
    keys: Float[Array, "B K S H"] | Rows,
    values: Float[Array, "B K S H"] | Rows,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T K g H"]:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query's position; softmax in
    float32.

    segments: where queries and keys are the same tokens (T = S) and rows hold several packed
        examples, the example of each; keys of other examples are not seen

    Long calls go through in blocks of queries, so that scores take QUERY_BLOCK x S and not T x S;
    the backward pass computes each block again. A query that may see no key gets the mean of the
    values, which is finite.
    """
    B, T = query_positions.shape
    if T <= QUERY_BLOCK:
        pair = None if segments is None else (segments, segments)
        return _attend_block(queries, keys, values, query_positions, key_positions, pair)
    blocks = math.ceil(T / QUERY_BLOCK)
    of_blocks = lambda x: _cut(x, blocks)

    @jax.checkpoint
    def block(queries: Array, positions: Array, own: Array | None) -> Array:
        pair = None if own is None or segments is None else (own, segments)
        return _attend_block(queries, keys, values, positions, key_positions, pair)

    parts = jax.tree.map(of_blocks, (queries, query_positions, segments))
    out = lax.map(lambda part: block(*part), parts)
    return out.swapaxes(0, 1).reshape(B, -1, *queries.shape[2:])[:, :T]


def _cut(x: Array, blocks: int) -> Array:
    """[B, T, ...] in blocks of queries, [blocks, B, QUERY_BLOCK, ...], the last one padded."""
    B, T = x.shape[:2]
    pad = [(0, 0), (0, blocks * QUERY_BLOCK - T), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, pad).reshape(B, blocks, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)


def _attend_block(
    queries: Array,
    keys: Array | Rows,
    values: Array | Rows,
    query_positions: Array,
    key_positions: Array,
    segments: tuple[Array, Array] | None,
) -> Array:
    """segments: of the queries and of the keys"""
    if isinstance(keys, Rows):
        scores = cached.scores(queries, keys)
    else:
        scores = jnp.einsum("btkgh,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32)
    visible = key_positions[:, None, :] <= query_positions[:, :, None]  # [B, T, S]
    if segments is not None:
        visible &= segments[0][:, :, None] == segments[1][:, None, :]
    scores = jnp.where(visible[:, None, None], scores * queries.shape[-1] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    if isinstance(values, Rows):
        return cached.mix(weights, values, queries.dtype)
    # Summed in float32 and in the order of the operands: XLA for CPU, from JAX 0.11 on, sums some
    # bf16 products of several batch axes in bf16, which costs a per cent, and lacks others.
    mixed = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return mixed.astype(values.dtype).transpose(0, 3, 1, 2, 4)
