"""`matmul` in plain XLA, in the form that XLA for CPU does not stumble over."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.precision import wants_same_bits

# XLA for CPU makes a float32 copy of a bf16 weight for a single row; for more, before JAX 0.11,
# unless the result is float32 (and the processor multiplies bf16).
BF16_RESULTS = jax.__version_info__ >= (0, 11)

# Few float32 rows on CPU are multiplied as columns, up to this many (measured; docs/benchmarks.md).
MOST_COLUMNS = 64


def matmul(
    x: Float[Array, "N D"], weight: Float[Array, "E D"], dtype: DTypeLike | None = None
) -> Float[Array, "N E"]:
    """x @ weight^T."""
    if x.dtype == jnp.bfloat16 and (x.shape[0] == 1 or not BF16_RESULTS):
        sums = lambda x, w: _sums_first(x, w).astype(dtype or x.dtype)
        rows = lambda x, w: plain(x, w, dtype)
        return lax.platform_dependent(x, weight, cpu=sums, default=rows)
    if 1 < x.shape[0] <= MOST_COLUMNS and x.dtype == jnp.float32 and not wants_same_bits():
        rows = lambda x, w: plain(x, w, dtype)
        return lax.platform_dependent(x, weight, cpu=_by_columns, default=rows)
    return plain(x, weight, dtype)


def plain(
    x: Float[Array, "N D"], weight: Float[Array, "E D"], dtype: DTypeLike | None = None
) -> Float[Array, "N E"]:
    """The product as one would write it: the reference."""
    return jnp.einsum("nd,ed->ne", x, weight, preferred_element_type=dtype)


def _sums_first(x: Array, weight: Array) -> Array:
    """The product of two rows at least, in float32: two to twenty times as fast (measured)."""
    rows = jnp.concatenate([x, x]) if x.shape[0] == 1 else x
    return plain(rows, weight, jnp.float32)[: x.shape[0]]


def _by_columns(x: Array, weight: Array) -> Array:
    """weight @ x^T, transposed: up to twice as fast, when the columns are few or a multiple of 8.
    XLA would make the usual product of it again, were it not held back.
    """
    count = x.shape[0]
    padded = count if count <= 4 else -(-count // 8) * 8
    columns = jnp.pad(x, [(0, padded - count), (0, 0)])
    y = jnp.einsum("ed,nd->en", weight, columns, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T[:count]
