"""RMSNorm."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, statistics in float32, rounded to x's dtype *before* the weight (as the
    reference).
    """

    def __init__(self, width: int, eps: float, param: Any):
        self.weight = param(width)
        self.eps = eps

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...][None, :]
