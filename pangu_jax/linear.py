"""The one product of activations with weights kept in [out, in] order."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.adapted import Adapted
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant import product
from pangu_jax.quant.weight import Weight

# From JAX 0.11 XLA on CPU multiplies bf16 as it is when there are two rows or more; a single row,
# and any bf16 product before, is done on a float32 copy of the whole weight.
NATIVE_CPU_BF16 = jax.__version_info__ >= (0, 11)

# Few float32 rows on CPU are multiplied as columns, up to this many (measured; docs/benchmarks.md).
MOST_COLUMNS = 64


def linear(
    x: Float[Array, "N D"],
    weight: Float[Array, "*out D"] | Weight | Adapted,
    dtype: DTypeLike | None = None,
) -> Float[Array, "N *out"]:
    """x @ weight^T over the last axis of a weight, float, quantised or adapted, with any number of
    output axes.

    The product is always of two matrices: given more output axes, XLA on CPU first transposes the
    whole weight (measured: 2 to 8 GB/s of weights where this form reads 40).

    dtype: of the result, when it is not that of the factors; sums are float32 in any case
    """
    if isinstance(weight, Adapted):
        y = linear(x, lax.stop_gradient(weight.base), dtype)
        return y + weight.scale * linear(linear(x, weight.a), weight.b, y.dtype)
    if isinstance(weight, Weight):
        return product.linear(x, weight, dtype)
    flat = weight.reshape(-1, weight.shape[-1])
    if NATIVE_CPU_BF16 and x.shape[0] == 1 and x.dtype == jnp.bfloat16:
        two_rows = lambda x, w: _product(jnp.concatenate([x, x]), w, dtype)[:1]
        one_row = lambda x, w: _product(x, w, dtype)
        y = lax.platform_dependent(x, flat, cpu=two_rows, default=one_row)
    elif _few(x) and not wants_same_bits():
        rows = lambda x, w: _product(x, w, dtype)
        y = lax.platform_dependent(x, flat, cpu=_by_columns, default=rows)
    else:
        y = _product(x, flat, dtype)
    return y.reshape(x.shape[0], *weight.shape[:-1])


def _product(x: Array, weight: Array, dtype: DTypeLike | None) -> Array:
    return jnp.einsum("nd,ed->ne", x, weight, preferred_element_type=dtype)


def _few(x: Array) -> bool:
    return 1 < x.shape[0] <= MOST_COLUMNS and x.dtype == jnp.float32


def _by_columns(x: Array, weight: Array) -> Array:
    """weight @ x^T, transposed: up to twice as fast, when the columns are few or a multiple of 8.
    XLA would make the usual product of it again, were it not held back.
    """
    count = x.shape[0]
    padded = count if count <= 4 else -(-count // 8) * 8
    columns = jnp.pad(x, [(0, padded - count), (0, 0)])
    y = jnp.einsum("ed,nd->en", weight, columns, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T[:count]
