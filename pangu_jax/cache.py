"""The KV cache: contiguous, head-major, updated by pure functions.

A sequence's token at position p lies in slot p: padding is never stored, so left-padded, right-
padded and incremental calls leave the same cache behind. A cache has one pair of arrays per run of
layers of the model, `[L, B, K, S, H]` for stacked layers and `[B, K, S, H]` for a separate one;
both are updated in place when donated. An int8 cache has `quant.cached.Rows` in their place.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pangu_jax.config import ModelConfig
from pangu_jax.kernels.write import write
from pangu_jax.parallel.layout import Layout
from pangu_jax.pytree import pytree, unchecked
from pangu_jax.quant import cached
from pangu_jax.quant.cached import Rows
from pangu_jax.quant.scheme import Recipe


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

    def places(self, slots: int) -> tuple[Int[Array, "B #T"], Int[Array, "B T"]]:
        """The sequence of every token, and its slot there; padding lies behind the last slot."""
        rows = jnp.arange(self.positions.shape[0])[:, None]
        return rows, jnp.where(self.valid, self.positions, slots)

    def lengths(self, before: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many slots of each sequence are filled after the call."""
        filled = jnp.max(jnp.where(self.valid, self.positions + 1, 0), axis=1)
        return jnp.maximum(before, filled)

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

    keys: tuple[Array | Rows, ...]
    values: tuple[Array | Rows, ...]
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

    keys: Array | Rows
    values: Array | Rows
    layer: Int[Array, ""] | None

    def write(
        self,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
        meta: Any,
        scales: Float[Array, "K 2 H"] | None = None,
    ) -> "LayerCache":
        """The cache with the valid tokens in the slots of their positions.

        meta: a Meta, or a `paged.PagedMeta`

        scales: fixed ones of an int8 cache, of each head's keys and values
        """
        places = meta.places(self.keys.shape[-2])

        def put(buffer: Array | Rows, new: Array, which: int) -> Array | Rows:
            if isinstance(buffer, Rows):
                own = cached.to_rows(new, None if scales is None else scales[:, which])
                added: Array | Rows = cached.with_channels(own, None)
            else:
                added = new
            one = lambda old, new: write(old, new, places[0], places[1], self.layer)
            return jax.tree.map(one, buffer, added)

        written = dict(keys=put(self.keys, keys, 0), values=put(self.values, values, 1))
        return dataclasses.replace(self, **written)

    def read(
        self, scales: Float[Array, "K 2 H"] | None = None
    ) -> tuple[Float[Array, "B K S H"] | Rows, Float[Array, "B K S H"] | Rows]:
        """This layer's keys and values; `scales` as they were written with."""

        def take(buffer: Array | Rows, which: int) -> Array | Rows:
            if self.layer is not None:
                of_layer = lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
                buffer = jax.tree.map(of_layer, buffer)
            if isinstance(buffer, Rows) and scales is not None:
                return cached.with_channels(buffer, scales[:, which])
            return buffer

        return take(self.keys, 0), take(self.values, 1)


def empty(
    config: ModelConfig,
    runs: tuple[int | None, ...],
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    recipe: Recipe,
) -> Cache:
    """An empty cache of `capacity` slots for each of `batch` sequences.

    runs: the length of every run of stacked layers, None for a separate layer (`Pangu.runs`)
    dtype: of its numbers, unless the recipe says int8
    """
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)

    def buffer(run: int | None) -> Array | Rows:
        own = shape if run is None else (run, *shape)
        if recipe.cache is None:
            return jnp.zeros(own, dtype)
        scale = None if recipe.cache_scales else jnp.zeros(own[:-1], jnp.float32)
        return Rows(jnp.zeros(own, jnp.int8), scale)

    buffers = lambda: tuple(map(buffer, runs))
    return Cache(buffers(), buffers(), jnp.zeros(batch, jnp.int32))


def specs(cache: Cache, where: Layout) -> Any:
    """How a mesh splits a cache, a tree like it with PartitionSpecs: sequences over replicas of
    attention, heads within one.
    """
    batch, heads = where.of("batch") or None, where.of("heads") or None
    place = lambda leaf, before: PartitionSpec(*[None] * before, batch, heads)
    return unchecked(
        Cache,
        keys=_each(cache.keys, place),
        values=_each(cache.values, place),
        length=PartitionSpec(batch),
    )


def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` slots."""

    def pad(leaf: Array, before: int) -> Array:
        width = [(0, 0)] * leaf.ndim
        width[before + 2] = (0, capacity - leaf.shape[before + 2])
        return jnp.pad(leaf, width)

    return Cache(_each(cache.keys, pad), _each(cache.values, pad), cache.length)


def take_rows(cache: Cache, rows: Int[Array, " R"]) -> Cache:
    """A cache of R sequences: the given rows, in that order, as often as they are named."""
    take = lambda leaf, before: jnp.take(leaf, rows, axis=before)
    return Cache(_each(cache.keys, take), _each(cache.values, take), cache.length[rows])


def _each(buffers: tuple[Any, ...], change: Callable[[Any, int], Any]) -> Any:
    """`change(leaf, axes before the batch)` of every array [.., B, K, S, ..] of the buffers."""
    of_one = lambda buffer: jax.tree.map(lambda leaf: change(leaf, buffer.ndim - 4), buffer)
    return tuple(map(of_one, buffers))
