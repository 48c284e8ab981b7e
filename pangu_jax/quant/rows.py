"""Rounding of rows: numbers of few bits and one scale for each row, numbers * scale ~ row.

Symmetric, to the nearest, of two as near to the even one (own choice; what compressed-tensors and
msModelSlim call symmetric min-max). A row of zeros has a scale of 0.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

# The largest number of each kind. -128 is not used: |error| <= scale / 2 on both sides.
LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
FP8 = jnp.float8_e4m3fn


def quantize(
    x: Float[Array, "*rows D"], kind: str = "int8"
) -> tuple[Shaped[Array, "*rows D"], Float[Array, "*rows 1"]]:
    """Numbers of a `kind` of LARGEST and a float32 scale per row.

    int4 comes as int8 from -7 to 7. Errors are at most half a scale for integers, and 2^-4 of the
    value (or 2^-10 of the scale) for fp8.
    """
    wide = x.astype(jnp.float32)
    scale = scales(wide, kind)
    # Times a reciprocal: XLA would make that of a division, but not everywhere.
    inverse = 1 / jnp.where(scale > 0, scale, 1)
    return to_numbers(wide * inverse, kind), scale


def scales(wide: Float[Array, "*rows D"], kind: str) -> Float[Array, "*rows 1"]:
    """Of each row: its largest number, times the reciprocal of the kind's largest (XLA would make
    that of a division).
    """
    return jnp.max(jnp.abs(wide), axis=-1, keepdims=True) * np.float32(1 / LARGEST[kind])


def to_numbers(ratio: Float[Array, "*shape"], kind: str) -> Shaped[Array, "*shape"]:
    """The nearest numbers of a kind, clipped to its largest."""
    largest = LARGEST[kind]
    if kind == "float8_e4m3fn":
        return _nearest_fp8(jnp.clip(ratio, -largest, largest)).astype(FP8)
    return jnp.clip(jnp.round(ratio), -largest, largest).astype(jnp.int8)


def _nearest_fp8(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest e4m3 number: four bits from the leading one on, down to 2^-9.

    Written out, because XLA's own conversions round twice on some platforms.
    """
    exponent = jnp.maximum(jnp.frexp(x)[1] - 1, -6)
    quantum = jnp.ldexp(jnp.float32(1), exponent - 3)
    return jnp.round(x / quantum) * quantum


def dequantize(
    numbers: Shaped[Array, "*rows D"], scale: Float[Array, "*rows 1"], dtype: DTypeLike
) -> Float[Array, "*rows D"]:
    """What `quantize` left of its argument."""
    return (numbers.astype(jnp.float32) * scale).astype(dtype)
