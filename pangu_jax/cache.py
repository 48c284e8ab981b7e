"""The KV cache: contiguous, head-major, updated by pure functions.

A sequence's token at position p lies in slot p: padding is never stored, so left-padded, right-
padded and incremental calls leave the same cache behind. A cache has one pair of arrays per run of
layers of the model, `[L, B, K, S, H]` for stacked layers and `[B, K, S, H]` for a separate one;
both are updated in place when donated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pangu_jax.config import ModelConfig
from pangu_jax.parallel.layout import Layout
from pangu_jax.pytree import pytree


@pytree
class Meta:
    """Where the tokens of one call stand: a grid of B sequences by T tokens, padding anywhere.

    positions: the RoPE position, and cache slot, of each token
    valid: False for padding: never attended to, never cached
    segments: which of several packed examples each token belongs to, where a row holds more than
        one: tokens attend within their segment only. Not with a cache.
    """

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None = None

    @classmethod
    def from_mask(cls, mask: Bool[Array, "B T"], start: Int[Array, " B"] | None = None) -> "Meta":
        """Positions `max(cumsum(mask) - 1, 0)`, counted from each sequence's `start`."""
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        if start is not None:
            positions = positions + start[:, None]
        return cls(positions, mask)


@pytree
class Cache:
    """Keys and values of every run of layers, and how many slots of each sequence are filled."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """S, the number of slots of each sequence."""
        return self.keys[0].shape[-2]


@pytree
class LayerCache:
    """One layer's part of a run's arrays; `layer` is its index in the run, None for a separate
    layer.
    """

    keys: Array
    values: Array
    layer: Int[Array, ""] | None

    def write(
        self,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
        meta: Meta,
    ) -> "LayerCache":
        """The cache with the valid tokens in the slots of their positions."""
        slots = jnp.where(meta.valid, meta.positions, self.keys.shape[-2])  # past the end: dropped
        put = lambda buffer, new: _put(buffer, new, slots, self.layer)
        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """This layer's keys and values."""
        if self.layer is None:
            return self.keys, self.values
        take = lambda buffer: lax.dynamic_index_in_dim(buffer, self.layer, keepdims=False)
        return take(self.keys), take(self.values)


def _put(buffer: Array, new: Array, slots: Array, layer: Array | None) -> Array:
    B, K, _, _ = new.shape
    index = (jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None], slots[:, None, :])
    if layer is not None:
        index = (layer, *index)
    return buffer.at[index].set(new, mode="drop")


def empty(
    config: ModelConfig, runs: tuple[int | None, ...], batch: int, capacity: int, dtype: DTypeLike
) -> Cache:
    """An empty cache of `capacity` slots for each of `batch` sequences.

    runs: the length of every run of stacked layers, None for a separate layer (`Pangu.runs`)
    """
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    buffers = lambda: tuple(
        jnp.zeros(shape if run is None else (run, *shape), dtype) for run in runs
    )
    return Cache(buffers(), buffers(), jnp.zeros(batch, jnp.int32))


def specs(cache: Cache, where: Layout) -> Any:
    """How a mesh splits a cache, a tree like it with PartitionSpecs: sequences over replicas of
    attention, heads within one.
    """
    batch, heads = where.of("batch") or None, where.of("heads") or None
    of_buffer = lambda ndim: PartitionSpec(*[None] * (ndim - 4), batch, heads)
    return jax.tree.map(
        lambda leaf: PartitionSpec(batch) if leaf.ndim == 1 else of_buffer(leaf.ndim), cache
    )


def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` slots."""

    def pad(buffer: Array) -> Array:
        width = [(0, 0)] * buffer.ndim
        width[-2] = (0, capacity - buffer.shape[-2])
        return jnp.pad(buffer, width)

    return Cache(tuple(map(pad, cache.keys)), tuple(map(pad, cache.values)), cache.length)


def take_rows(cache: Cache, rows: Int[Array, " R"]) -> Cache:
    """A cache of R sequences: the given rows, in that order, as often as they are named."""
    take = lambda buffer: jnp.take(buffer, rows, axis=buffer.ndim - 4)
    return Cache(tuple(map(take, cache.keys)), tuple(map(take, cache.values)), cache.length[rows])
