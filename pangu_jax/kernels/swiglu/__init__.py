"""The SwiGLU MLP of a layer, or of one expert."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pangu_jax.adapted import Adapted
from pangu_jax.kernels import native
from pangu_jax.kernels.matmul import MOST_ROWS
from pangu_jax.kernels.native import matrices
from pangu_jax.linear import linear
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant.weight import Weight

Implementation = Literal["xla", "native"]


def swiglu(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "2 F D"] | Weight | Adapted,
    down: Float[Array, "D F"] | Weight | Adapted,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """down(silu(gate(x)) * up(x)).

    `native` (CPU, few rows) is the kernel of routed experts with one expert: what is between the
    products stays in float32.
    """
    fits = matrices.alike(x, gate_up, down) and native.available()
    if implementation == "native" and not fits:
        raise NotImplementedError(native.why_not() or "matrices of these kinds")
    few = x.shape[0] <= MOST_ROWS or wants_same_bits() or implementation == "native"
    if implementation == "xla" or not (fits and few):
        return _xla(x, gate_up, down)
    kernel = native.with_gradient_of(_xla, _native)
    if implementation == "native":
        return kernel(x, gate_up, down)
    return lax.platform_dependent(x, gate_up, down, cpu=kernel, default=_xla)


def _xla(x: Array, gate_up: Array | Weight | Adapted, down: Array | Weight | Adapted) -> Array:
    y = linear(x, gate_up)
    return linear(jax.nn.silu(y[:, 0]) * y[:, 1], down)


def _native(x: Array, gate_up: Array | Weight, down: Array | Weight) -> Array:
    as_one = lambda matrix: jax.tree.map(lambda leaf: leaf[None], matrix)
    rows = x.shape[0]
    only, whole = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), jnp.float32)
    return matrices.experts(x, only, whole, as_one(gate_up), as_one(down), None)
