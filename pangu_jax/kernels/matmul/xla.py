"""`matmul` in plain XLA, in the form that XLA for CPU does not stumble over."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.precision import wants_same_bits

# From JAX 0.11 XLA on CPU multiplies bf16 as it is when there are two rows or more; a single row,
# and any bf16 product before, is done on a float32 copy of the whole weight.
NATIVE_CPU_BF16 = jax.__version_info__ >= (0, 11)

# Few float32 rows on CPU are multiplied as columns, up to this many (measured; docs/benchmarks.md).
MOST_COLUMNS = 64


def matmul(
    x: Float[Array, "N D"], weight: Float[Array, "E D"], dtype: DTypeLike | None = None
) -> Float[Array, "N E"]:
    """x @ weight^T."""
    if NATIVE_CPU_BF16 and x.shape[0] == 1 and x.dtype == jnp.bfloat16:
        two_rows = lambda x, w: plain(jnp.concatenate([x, x]), w, dtype)[:1]
        one_row = lambda x, w: plain(x, w, dtype)
        return lax.platform_dependent(x, weight, cpu=two_rows, default=one_row)
    if 1 < x.shape[0] <= MOST_COLUMNS and x.dtype == jnp.float32 and not wants_same_bits():
        rows = lambda x, w: plain(x, w, dtype)
        return lax.platform_dependent(x, weight, cpu=_by_columns, default=rows)
    return plain(x, weight, dtype)


def plain(
    x: Float[Array, "N D"], weight: Float[Array, "E D"], dtype: DTypeLike | None = None
) -> Float[Array, "N E"]:
    """The product as one would write it: the reference."""
    return jnp.einsum("nd,ed->ne", x, weight, preferred_element_type=dtype)


def _by_columns(x: Array, weight: Array) -> Array:
    """weight @ x^T, transposed: up to twice as fast, when the columns are few or a multiple of 8.
    XLA would make the usual product of it again, were it not held back.
    """
    count = x.shape[0]
    padded = count if count <= 4 else -(-count // 8) * 8
    columns = jnp.pad(x, [(0, padded - count), (0, 0)])
    y = jnp.einsum("ed,nd->en", weight, columns, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T[:count]
