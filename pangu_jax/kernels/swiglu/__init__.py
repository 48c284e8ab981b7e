"""The SwiGLU MLP of a layer, or of one expert."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pangu_jax.adapted import Adapted
from pangu_jax.kernels import native
from pangu_jax.kernels.choice import Kernel, choose
from pangu_jax.kernels.native import matrices
from pangu_jax.linear import linear
from pangu_jax.quant.weight import Weight

Implementation = Literal["xla", "native"]


def swiglu(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "2 F D"] | Weight | Adapted,
    down: Float[Array, "D F"] | Weight | Adapted,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """down(silu(gate(x)) * up(x)).

    `native` (CPU) is the kernel of routed experts with one expert: what is between the products
    stays in float32, or is rounded once to what the second one multiplies (int8; bf16 where the
    processor multiplies it).
    """

    def why_not() -> str:
        fits = matrices.alike(x, gate_up, down)
        return native.why_not() or ("" if fits else "matrices of these kinds")

    kernels = {"native": Kernel(_native, "cpu", why_not)}
    return choose(_xla, implementation, kernels)(x, gate_up, down)


def _xla(x: Array, gate_up: Array | Weight | Adapted, down: Array | Weight | Adapted) -> Array:
    y = linear(x, gate_up)
    return linear(jax.nn.silu(y[:, 0]) * y[:, 1], down)


def _native(x: Array, gate_up: Array | Weight, down: Array | Weight) -> Array:
    as_one = lambda matrix: jax.tree.map(lambda leaf: leaf[None], matrix)
    rows = x.shape[0]
    only, whole = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), jnp.float32)
    return matrices.experts(x, only, whole, as_one(gate_up), as_one(down), None)
