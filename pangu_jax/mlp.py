"""The dense SwiGLU MLP: the Embedded models' whole MLP, and the shared experts of Pro MoE."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from pangu_jax.kernels.swiglu import swiglu


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases. gate_up [2, F, D] and down [D, F] split over devices
    along F.
    """

    def __init__(self, hidden_size: int, width: int, param: Any):
        self.gate_up = param(2, width, hidden_size, ffn=1, fsdp=2)
        self.down = param(hidden_size, width, ffn=1, fsdp=0)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """This device's partial sum of the output."""
        return swiglu(x, self.gate_up[...], self.down[...])
