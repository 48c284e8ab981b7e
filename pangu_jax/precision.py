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


_same_bits = jax.make_user_context(False)


def same_bits() -> contextlib.AbstractContextManager:
    """Within, what a token gets does not depend on how many others there are, to the last bit: rows
    are multiplied as rows (by the CPU's kernels in the form that is for few of them), experts take
    them in blocks of one size, and every query is alone.

    There must be two rows at least: one is another kind of product.
    """
    return _same_bits(True)


def wants_same_bits() -> bool:
    """Whether the program that is being traced was asked for that."""
    return bool(_same_bits.value)
