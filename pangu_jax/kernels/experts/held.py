"""The weights of a layer's routed experts, wherever they are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.adapted import Adapted
from pangu_jax.pytree import pytree
from pangu_jax.quant.weight import Weight


@pytree
class Experts:
    """The routed experts of one layer: its own weights, or those of a run of stacked layers and its
    place there.

    A loop over experts inside a loop over layers would first copy the layer's weights out of the
    stack, all of them in every step; it does not when it reads each expert from the stack itself.
    """

    gate_up: Float[Array, "*L E 2 F D"] | Weight | Adapted
    down: Float[Array, "*L E D F"] | Weight | Adapted
    layer: Int[Array, ""] | None = None

    @property
    def count(self) -> int:
        """E, the experts on this device."""
        return self.down.shape[-3]

    def of(self, expert: Int[Array, ""]) -> tuple[Any, Any]:
        """gate_up [2, F, D] and down [D, F] of one expert."""
        own = lambda stack: take(stack, expert, self.layer)
        return jax.tree.map(own, self.gate_up), jax.tree.map(own, self.down)


def take(stack: Array, index: Array, layer: Array | None = None) -> Array:
    """stack[index], or stack[layer, index]."""
    if layer is None:
        return lax.dynamic_index_in_dim(stack, index, keepdims=False)
    start = (layer, index, *[jnp.zeros_like(index)] * (stack.ndim - 2))
    return lax.dynamic_slice(stack, start, (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])
