"""The one product of activations with weights kept in [out, in] order."""

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pangu_jax.adapted import Adapted
from pangu_jax.kernels.matmul import matmul
from pangu_jax.quant import product
from pangu_jax.quant.weight import Weight


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
    y = matmul(x, weight.reshape(-1, weight.shape[-1]), dtype)
    return y.reshape(x.shape[0], *weight.shape[:-1])
