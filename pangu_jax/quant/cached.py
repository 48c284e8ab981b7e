"""Keys and values in int8, and attention's two products with them.

No float copy of a cache is made. XLA for GPU and TPU takes the numbers to floats inside of the
product; on CPU it would copy them first, so there they go through in blocks of SLOTS (of a capacity
that such blocks divide: generation's are powers of two), and in
float32 (XLA of JAX 0.10 has no such product of bf16).
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pangu_jax.pytree import pytree
from pangu_jax.quant import rows

# Slots whose floats are held at once on CPU (own choice).
SLOTS = 256


@pytree
class Rows:
    """numbers * scale * channels: int8, and what they are worth.

    scale: of every token and head; None where channels say all
    channels: of every head and channel, fixed; None where there are none (they are the model's, and
        not part of a cache)
    """

    numbers: Int8[Array, "*L B K S H"]
    scale: Float[Array, "*L B K S"] | None = None
    channels: Float[Array, "K H"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the float array."""
        return self.numbers.shape

    @property
    def ndim(self) -> int:
        """Axes of the float array."""
        return self.numbers.ndim


def to_rows(x: Float[Array, "B K T H"], channels: Float[Array, "K H"] | None) -> Rows:
    """Keys or values rounded to nearest, with a scale per token and head, or fixed ones (beyond
    which they are cut).
    """
    if channels is None:
        numbers, scale = rows.quantize(x)
        return Rows(numbers, scale[..., 0])
    ratio = x.astype(jnp.float32) / jnp.where(channels > 0, channels, 1)[None, :, None]
    return Rows(rows.to_numbers(ratio, "int8"), channels=channels)


def with_channels(held: Rows, channels: Float[Array, "K H"] | None) -> Rows:
    """The same numbers with the fixed scales that they were written with."""
    return dataclasses.replace(held, channels=channels)


def to_floats(held: Rows, dtype: DTypeLike) -> Float[Array, "B K S H"]:
    """The floats that some rows stand for."""
    _check(held)
    wide = held.numbers.astype(jnp.float32)
    if held.scale is not None:
        wide = wide * held.scale[..., None]
    if held.channels is not None:
        wide = wide * held.channels[None, :, None, :]
    return wide.astype(dtype)


def scores(queries: Float[Array, "B T K g H"], keys: Rows) -> Float[Array, "B K g T S"]:
    """queries @ keys^T in float32, a head at a time."""
    _check(keys)
    if keys.channels is not None:
        wide = queries.astype(jnp.float32) * keys.channels[None, None, :, None]
        queries = wide.astype(queries.dtype)

    def product(numbers: Array, queries: Array) -> Array:
        floats = numbers.astype(queries.dtype)
        return jnp.einsum("btkgh,bksh->bkgts", queries, floats, preferred_element_type=jnp.float32)

    def in_blocks(numbers: Array, queries: Array) -> Array:
        size, wide = _block(numbers), queries.astype(jnp.float32)
        blocks = lax.map(lambda i: product(_slots(numbers, i, size), wide), _count(numbers, size))
        return jnp.moveaxis(blocks, 0, -2).reshape(*blocks.shape[1:-1], -1)

    found: Array = lax.platform_dependent(keys.numbers, queries, cpu=in_blocks, default=product)
    return found if keys.scale is None else found * keys.scale[:, :, None, None]


def mix(
    weights: Float[Array, "B K g T S"], values: Rows, dtype: DTypeLike
) -> Float[Array, "B T K g H"]:
    """weights @ values, a head at a time; products in `dtype`, sums in float32."""
    _check(values)
    largest = None
    if values.scale is not None:  # in parts of the largest: float16 could not hold them else
        largest = jnp.max(values.scale, axis=-1)
        part = values.scale / jnp.where(largest > 0, largest, 1)[..., None]
        weights = weights * part[:, :, None, None]
    weights = weights.astype(dtype)

    def product(numbers: Array, weights: Array) -> Array:
        floats = numbers.astype(weights.dtype)
        return jnp.einsum("bkgts,bksh->btkgh", weights, floats, preferred_element_type=jnp.float32)

    def in_blocks(numbers: Array, weights: Array) -> Array:
        size, wide = _block(numbers), weights.astype(jnp.float32)
        cut = lambda i: lax.dynamic_slice_in_dim(wide, i * size, size, axis=-1)
        of_block = lambda i: product(_slots(numbers, i, size), cut(i))
        add = lambda total, i: (total + of_block(i), None)
        return lax.scan(add, of_block(jnp.int32(0)), _count(numbers, size)[1:])[0]

    found: Array = lax.platform_dependent(values.numbers, weights, cpu=in_blocks, default=product)
    if largest is not None:
        found = found * largest[:, None, :, None, None]
    if values.channels is not None:
        found = found * values.channels[None, None, :, None]
    return found.astype(dtype)


def _check(held: Rows) -> None:
    if held.scale is None and held.channels is None:
        raise ValueError("numbers without scales: the cache was written with fixed ones")


def _block(numbers: Array) -> int:
    """The slots of a block, which divide the cache; all of them where it is small or odd."""
    size = math.gcd(numbers.shape[2], SLOTS)
    return size if size >= SLOTS // 4 else numbers.shape[2]


def _count(numbers: Array, size: int) -> Array:
    return jnp.arange(numbers.shape[2] // size)


def _slots(numbers: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(numbers, index * size, size, axis=2)
