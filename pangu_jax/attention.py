"""Grouped-query attention: one fused q/k/v product, RoPE, causal softmax, output product."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pangu_jax import rope
from pangu_jax.cache import LayerCache, Meta
from pangu_jax.config import ModelConfig
from pangu_jax.kernels.attention import attend, attend_cached
from pangu_jax.linear import linear
from pangu_jax.paged import AnyMeta

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
        return attend_cached(queries, cache, meta, scales), cache
