"""Grouped-query attention: one fused q/k/v product, RoPE, causal softmax, output product."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pangu_jax import paged, rope
from pangu_jax.cache import LayerCache, Meta
from pangu_jax.config import ModelConfig
from pangu_jax.linear import linear
from pangu_jax.paged import AnyMeta, PagedMeta
from pangu_jax.quant import cached
from pangu_jax.quant.cached import Rows

# Queries whose scores are held at once: bounds the [B, Q, block, S] float32 scores of long prompts
# (own choice).
QUERY_BLOCK = 128

# What a backward pass may keep in place of attending again (model.py).
ATTENTION_OUTPUT = "attention"

# A position no query reaches: hides padding from the causal comparison.
NEVER = 2**30


class Attention(nnx.Module):
    """The attention of one layer on this device's heads.

    qkv [K, Q/K + 2, H, D] holds, for every kv head, its query heads, then its key, then its value:
    a slice of the first axis is a whole piece of work, so splitting heads over devices is splitting
    that axis. cache_scale [K, 2, H] are the scales of an int8 cache, where they were calibrated.
    """

    def __init__(self, config: ModelConfig, param: Any):
        K, H, D = config.num_kv_heads, config.head_dim, config.hidden_size
        fused = config.num_heads // K + 2
        self.qkv = param(K, fused, H, D, heads=0, fsdp=3)
        self.qkv_bias = param(K, fused, H, heads=0) if config.attention_bias else None
        self.out = param(D, config.num_heads * H, heads=1, fsdp=0)
        self.out_bias = param(D) if config.attention_bias else None
        self.cache_scale: nnx.Param | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "N D"], angles: rope.Table, meta: AnyMeta, cache: LayerCache | None
    ) -> tuple[Float[Array, "N D"], LayerCache | None]:
        """The output product without its bias (added once, where devices' partial sums have met),
        and the cache.
        """
        B, T = meta.positions.shape
        K, fused, H, _ = self.qkv.shape
        y = linear(x, self.qkv[...])
        if self.qkv_bias is not None:
            y = y + self.qkv_bias[...][None]
        y = y.reshape(B, T, K, fused, H)
        queries = rope.rotate(y[..., :-2, :].reshape(B, T, -1, H), angles)
        keys = rope.rotate(y[..., -2, :], angles).transpose(0, 2, 1, 3)  # [B, K, T, H]
        values = y[..., -1, :].transpose(0, 2, 1, 3)
        queries = queries.reshape(B, T, K, fused - 2, H)
        mixed, cache = self._mix(queries, keys, values, meta, cache)
        return linear(mixed.reshape(B * T, -1), self.out[...]), cache

    def _mix(
        self, queries: Array, keys: Array, values: Array, meta: AnyMeta, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T K g H"], LayerCache | None]:
        """What the queries see: the new keys and values alone, or all that are cached."""
        if cache is None:
            assert isinstance(meta, Meta)
            at = jnp.where(meta.valid, meta.positions, NEVER)
            mixed = attend(queries, keys, values, meta.positions, at, meta.segments)
            return checkpoint_name(mixed, ATTENTION_OUTPUT), None
        scales = None if self.cache_scale is None else self.cache_scale[...]
        cache = cache.write(keys, values, meta, scales)
        if isinstance(meta, PagedMeta):
            return paged.attend(queries, cache, meta, scales), cache
        if meta.segments is not None:
            raise ValueError("packed examples and a cache do not go together")
        held = cache.read(scales)
        B, _, S, _ = held[0].shape
        at = jnp.broadcast_to(jnp.arange(S), (B, S))
        return attend(queries, *held, meta.positions, at), cache


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
    return jnp.einsum("bkgts,bksh->btkgh", weights.astype(values.dtype), values)
