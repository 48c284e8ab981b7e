"""Rows of activations times a matrix of weights kept in [out, in] order."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.kernels import native
from pangu_jax.kernels.matmul import xla
from pangu_jax.kernels.native import matrices
from pangu_jax.parallel import boundary
from pangu_jax.precision import exact_if_float32, wants_same_bits
from pangu_jax.quant.weight import Weight

Implementation = Literal["xla", "native"]

# Rows up to which the kernel is at least as fast on CPU as XLA (measured; docs/benchmarks.md), but
# for a single float32 row, which XLA multiplies as fast as memory is.
MOST_ROWS = 64
MOST_ROWS_OF_FLOAT32 = 8
MOST_ROWS_OF_INT4 = 256


def few(x: Float[Array, "N D"], weight: Any) -> bool:
    """Whether there are so few rows that the kernel is at least as fast with such a matrix."""
    if isinstance(weight, Weight):
        most = MOST_ROWS_OF_INT4 if weight.scheme.numbers == "int4" else MOST_ROWS
    else:
        float32 = getattr(weight, "dtype", None) == jnp.float32
        most = MOST_ROWS_OF_FLOAT32 if float32 else MOST_ROWS
    return x.shape[0] <= most


def matmul(
    x: Float[Array, "N D"],
    weight: Float[Array, "E D"],
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "N E"]:
    """x @ weight^T, sums in float32.

    dtype: of the result, when it is not that of the factors

    On CPU, `native` reads bf16 weights as fast as memory gives them, where XLA makes a float32 copy
    first. A row's results there are the same to the last bit however many rows there are.
    """
    if implementation == "xla" or not _can(x, weight, implementation):
        return xla.matmul(x, weight, dtype)
    x, weight = boundary.varying((x, weight))
    return _best(x, weight, jnp.dtype(dtype or x.dtype), implementation == "native")


def _can(x: Array, weight: Array, implementation: Implementation | None) -> bool:
    fits = (
        x.dtype in matrices.FLOATS and weight.dtype == x.dtype and min(*x.shape, *weight.shape) > 0
    )
    if implementation == "native":
        if not (fits and native.available()):
            raise NotImplementedError(native.why_not() or f"{x.dtype} times {weight.dtype}")
        return True
    wanted = few(x, weight) and not (x.shape[0] == 1 and x.dtype == jnp.float32)
    return fits and (wanted or wants_same_bits()) and native.available()


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _best(x: Array, weight: Array, dtype: jnp.dtype, forced: bool) -> Array:
    def kernel(x: Array, weight: Array) -> Array:
        none = jnp.zeros(0, jnp.float32)
        shape = x.shape[0], weight.shape[0]
        return native.call("pangu_matmul", shape, dtype, x, weight, none, integers=False)

    if forced:
        return kernel(x, weight)
    plain = functools.partial(xla.matmul, dtype=dtype)
    return lax.platform_dependent(x, weight, cpu=kernel, default=plain)


@_best.defjvp
def _best_jvp(dtype: jnp.dtype, forced: bool, primals: tuple, tangents: tuple) -> tuple:
    (x, weight), (to_x, to_weight) = primals, tangents
    with exact_if_float32(x.dtype):  # traced outside of the model's own request
        tangent = xla.plain(to_x, weight, dtype) + xla.plain(x, to_weight, dtype)
        return _best(x, weight, dtype, forced), tangent


def scaled_matmul(x: Float[Array, "N D"], weight: Weight, dtype: DTypeLike) -> Float[Array, "N E"]:
    """x @ weight^T of a quantised matrix [E, D] on CPU, by the kernel; no gradient.

    With dynamic activations x is rounded to int8 first, with a scale for each row, as
    `quant.rows.quantize` does. The numbers of int4 times their scale are rounded to bf16 where x is
    bf16 and the processor multiplies it.
    """
    shape = x.shape[0], weight.shape[0]
    integers = weight.scheme.activations == "dynamic"
    numbers, scale = weight.numbers, weight.scale
    return native.call("pangu_matmul", shape, dtype, x, numbers, scale, integers=integers)
