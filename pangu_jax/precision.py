"""How exactly products are computed."""

import contextlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def exact_if_float32(dtype: DTypeLike) -> contextlib.AbstractContextManager:
    """Full float32 products for a float32 model on every platform: TF32 and bf16 passes break
    parity.
    """
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
