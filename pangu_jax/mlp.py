"""The dense SwiGLU MLP: the Embedded models' whole MLP, and the shared experts of Pro MoE."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases. gate_up [2, F, D] and down [D, F] split over devices
    along F.
    """

    def __init__(self, hidden_size: int, width: int, param: Any):
        self.gate_up = param(2, width, hidden_size)
        self.down = param(hidden_size, width)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """This device's partial sum of the output."""
        gate, up = jnp.moveaxis(jnp.einsum("nd,pfd->npf", x, self.gate_up[...]), 1, 0)
        return jnp.einsum("nf,df->nd", jax.nn.silu(gate) * up, self.down[...])
