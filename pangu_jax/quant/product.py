"""Products of activations with quantised matrices.

    float activations      (x @ numbers^T) * scale, numbers taken to x's dtype; of int4
                           x @ (numbers * scale)^T
    dynamic, static        integers times integers, summed in int32 and scaled once; fp8 likewise,
                           summed in float32

What a product reads is the numbers: XLA for GPU and TPU takes them to floats inside of the product
(measured on an H100, and seen in the programs for v5p). XLA on CPU makes a float copy of the matrix
first. There a kernel does it, but for static activations; without one, few rows of float
activations are written as three digits of 8 bits each, which makes an integer product of them too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32, Shaped

from pangu_jax.kernels import native
from pangu_jax.kernels.matmul import scaled_matmul
from pangu_jax.kernels.native import matrices
from pangu_jax.parallel import boundary
from pangu_jax.precision import exact_if_float32, wants_same_bits
from pangu_jax.quant import rows
from pangu_jax.quant.weight import KINDS, Weight

# Rows up to which three products of integers are faster on CPU than a float copy of the matrix
# (measured; docs/benchmarks.md).
DIGIT_ROWS = 12


def linear(
    x: Float[Array, "N D"], weight: Weight, dtype: DTypeLike | None = None
) -> Float[Array, "N *out"]:
    """x @ weight^T; `linear.linear` of a quantised matrix.

    The gradient is that of the float matrix, for x alone: a quantised matrix is frozen.
    """
    x, flat = boundary.varying((x, weight.flat()))
    y: Array = _product(x, flat, jnp.dtype(dtype or x.dtype))
    return y.reshape(x.shape[0], *weight.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, weight: Weight, dtype: jnp.dtype) -> Array:
    plain = lambda x, weight: _xla(x, weight, dtype)
    if not _kernel_can(x, weight, dtype):
        return plain(x, weight)
    kernel = lambda x, weight: scaled_matmul(x, weight, dtype)
    return lax.platform_dependent(x, weight, cpu=kernel, default=plain)


def _kernel_can(x: Array, weight: Weight, dtype: jnp.dtype) -> bool:
    fits = matrices.kind(x, weight) is not None and dtype in matrices.FLOATS
    return fits and x.shape[0] > 0 and native.available()


def _xla(x: Array, weight: Weight, dtype: jnp.dtype) -> Array:
    scheme = weight.scheme
    if scheme.activations == "float":
        y = _floats(x, weight)
    elif scheme.activations == "static":
        y = _static(x, weight)
    else:
        numbers, scale = rows.quantize(x, KINDS[scheme.numbers])
        y = _sums(numbers, weight.numbers).astype(jnp.float32) * scale * weight.scale[:, 0][None]
    return y.astype(dtype)


def _forward(x: Array, weight: Weight, dtype: jnp.dtype) -> tuple[Array, Any]:
    # Not the kernel: a product is what the backward pass need not compute again (`model.Remat`).
    with exact_if_float32(x.dtype):  # traced outside of the model's own request
        return _xla(x, weight, dtype), (weight, jnp.zeros((), x.dtype))


def _backward(dtype: jnp.dtype, kept: Any, grad: Array) -> tuple[Array, None]:
    weight, like = kept
    floats = weight.floats(like.dtype)
    with exact_if_float32(like.dtype):  # traced outside of the model's own request
        return jnp.einsum("ne,ed->nd", grad.astype(like.dtype), floats), None


_product.defvjp(_forward, _backward)


def static_numbers(x: Float[Array, "N D"], weight: Weight) -> Int8[Array, "N D"]:
    """x in the fixed numbers of a weight with static activations: rounded, then offset, then cut
    (msModelSlim's order).
    """
    assert weight.input_scale is not None
    assert weight.offset is not None
    ratio = x.astype(jnp.float32) / weight.input_scale
    moved = jnp.round(ratio) + weight.offset.astype(jnp.float32)
    return jnp.clip(moved, -128, 127).astype(jnp.int8)


def _static(x: Array, weight: Weight) -> Array:
    assert weight.bias is not None
    total = _sums(static_numbers(x, weight), weight.numbers) + weight.bias.sum(-1)[None]
    return total.astype(jnp.float32) * weight.scale[:, 0][None]


def _sums(
    x: Shaped[Array, "N D"], numbers: Shaped[Array, "out D"]
) -> Int32[Array, "N out"] | Float[Array, "N out"]:
    """The products of numbers, exact in int32 for integers (D < 2^17), float32 for fp8."""
    if x.dtype != jnp.int8:
        wide = lambda part: part.astype(jnp.bfloat16)  # which holds every fp8 number
        return jnp.einsum("nd,ed->ne", wide(x), wide(numbers), preferred_element_type=jnp.float32)
    if x.shape[0] > 1:
        return _integers(x, numbers)
    # XLA on CPU multiplies two rows of integers 20 times as fast as one.
    two_rows = lambda x, w: _integers(jnp.concatenate([x, x]), w)[:1]
    return lax.platform_dependent(x, numbers, cpu=two_rows, default=_integers)


def _integers(x: Array, numbers: Array) -> Array:
    return jnp.einsum("nd,ed->ne", x, numbers, preferred_element_type=jnp.int32)


def _floats(x: Array, weight: Weight) -> Array:
    """float32"""
    if weight.scheme.numbers == "int4":
        # After x: else XLA unpacks every matrix before a decode loop, and keeps all their floats.
        weight, x = lax.optimization_barrier((weight, x))
        floats = weight.floats(x.dtype)
        return jnp.einsum("nd,ed->ne", x, floats, preferred_element_type=jnp.float32)
    if weight.scheme.numbers == "fp8" or x.shape[0] > DIGIT_ROWS or wants_same_bits():
        return _taken_to_floats(x, weight)
    return lax.platform_dependent(x, weight, cpu=_in_digits, default=_taken_to_floats)


def _taken_to_floats(x: Array, weight: Weight) -> Array:
    numbers = weight.numbers.astype(x.dtype)  # exact: 8 bits fit bf16, fp8 numbers too
    y = jnp.einsum("nd,ed->ne", x, numbers, preferred_element_type=jnp.float32)
    return y * weight.scale[:, 0][None]


def _in_digits(x: Array, weight: Weight) -> Array:
    """x = (first + second / 254 + third / 254^2) * scale, up to 2^-23 of a row's largest."""
    wide, digits = x.astype(jnp.float32), []
    scale = rows.scales(wide, "int8")
    left = wide / jnp.where(scale > 0, scale, 1)
    for _ in range(3):
        digit = rows.to_numbers(left, "int8")
        digits.append(digit)
        left = (left - digit.astype(jnp.float32)) * 254
    sums = _integers(jnp.concatenate(digits), weight.numbers).astype(jnp.float32)
    first, second, third = jnp.split(sums, 3)
    return (first + (second + third / 254) / 254) * scale * weight.scale[:, 0][None]
