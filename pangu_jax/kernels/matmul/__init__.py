"""Rows of activations times a matrix of weights kept in [out, in] order."""

import functools
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.kernels import native
from pangu_jax.kernels.choice import Kernel, choose
from pangu_jax.kernels.matmul import xla
from pangu_jax.kernels.native import matrices
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant.weight import Weight

Implementation = Literal["xla", "native"]


def matmul(
    x: Float[Array, "N D"],
    weight: Float[Array, "E D"],
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "N E"]:
    """x @ weight^T, sums in float32.

    dtype: of the result, when it is not that of the factors

    `native` (CPU) is as fast as XLA or faster (docs/benchmarks.md) for all but a single float32
    row, which XLA multiplies as fast as memory is. Within `precision.same_bits` a row's results are
    the same to the last bit however many rows there are.
    """

    def why_not() -> str:
        fits = matrices.kind(x, weight) is not None and min(*x.shape, *weight.shape) > 0
        fast = x.shape[0] > 1 or x.dtype != jnp.float32
        wanted = fast or wants_same_bits() or implementation == "native"
        return native.why_not() or ("" if fits and wanted else f"{x.dtype} times {weight.dtype}")

    def kernel(x: Array, weight: Array) -> Array:
        none = jnp.zeros(0, jnp.float32)
        return _call(x, weight, none, dtype or x.dtype, rounds=False)

    plain = functools.partial(xla.matmul, dtype=dtype)
    return choose(plain, implementation, {"native": Kernel(kernel, "cpu", why_not)})(x, weight)


def scaled_matmul(x: Float[Array, "N D"], weight: Weight, dtype: DTypeLike) -> Float[Array, "N E"]:
    """x @ weight^T of a quantised matrix [E, D] on CPU, by the kernel; no gradient.

    With dynamic activations x is rounded to int8 or fp8 first, with a scale for each row, as
    `quant.rows.quantize` does. The numbers of int4 times their scale are rounded to bf16 where x is
    bf16 and the processor multiplies it.
    """
    rounds = weight.scheme.activations == "dynamic"
    return _call(x, weight.numbers, weight.scale, dtype, rounds)


def _call(x: Array, matrix: Array, scale: Array, dtype: DTypeLike, rounds: bool) -> Array:
    return native.call(
        "pangu_matmul",
        (x.shape[0], matrix.shape[0]),
        dtype,
        x,
        matrix,
        scale,
        rounds=rounds,
        same_bits=wants_same_bits(),
    )
