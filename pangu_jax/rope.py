"""Rotary position embedding, rotate-half ("neox") pairing, no scaling."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Table = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]


def inverse_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2j / H) for the H/2 pairs, float32.

    The power is rounded to float32 and then inverted in float32, as the reference does: at position
    32,000 one unit in the last place is already a visible angle.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.float32(1) / np.power(np.float64(theta), exponents).astype(np.float32)


def table(positions: Int[Array, "B T"], theta: float, head_dim: int, dtype: DTypeLike) -> Table:
    """Cosine and sine of every position's angles: computed in float32, cast to the activations'
    dtype.
    """
    frequencies = jnp.asarray(inverse_frequencies(theta, head_dim))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B T heads H"], angles: Table) -> Float[Array, "B T heads H"]:
    """Each pair (j, j + H/2) of the last axis turned by its position's angle j."""
    cos, sin = (part[:, :, None, :] for part in angles)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
