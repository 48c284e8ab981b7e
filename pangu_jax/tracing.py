"""What every layer did with some tokens: the view for debugging and for parity tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pangu_jax import model as models
from pangu_jax.cache import Meta
from pangu_jax.model import Pangu
from pangu_jax.moge import Routing
from pangu_jax.pytree import pytree


@pytree
class Trace:
    """The residual stream and the routing of a full pass.

    hidden: L + 1 states: the embedding, then the residual stream after each layer, before the final
        norm
    final_norm: after the final norm
    router_logits: before the softmax; None for dense models, as are the next two
    experts: the chosen expert of each group, by its index among all experts
    weights: its share of the softmax over all experts, before `router_scale`
    """

    hidden: Float[Array, "states B T D"]
    final_norm: Float[Array, "B T D"]
    router_logits: Float[Array, "L B T E"] | None
    experts: Int[Array, "L B T G"] | None
    weights: Float[Array, "L B T G"] | None


def trace(
    model: Pangu,
    tokens: Int[Array | np.ndarray, "B T"],
    attention_mask: Bool[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, "B T"] | None = None,
) -> Trace:
    """The Trace of a full causal pass. Raises ValueError as the model's own call does."""
    return _trace(model, *models.check_tokens(model.config, tokens, attention_mask))


@jax.jit
def _trace(model: Pangu, tokens: Array, mask: Array) -> Trace:
    def local(model: Pangu, tokens: Array, mask: Array) -> Trace:
        keep = lambda x, routing: (x.astype(jnp.float32), routing)
        final, _, runs = models.tapped_forward(
            model, tokens.reshape(-1), Meta.from_mask(mask), None, keep
        )
        grid = lambda leaf: leaf.reshape(leaf.shape[0], *tokens.shape, leaf.shape[-1])
        layers: tuple[Array, Routing | None] = jax.tree.map(
            lambda *leaves: grid(jnp.concatenate(leaves)), *runs
        )
        streams, routing = layers
        embedded = grid(models.embed(model, tokens.reshape(-1)).astype(jnp.float32)[None])
        none: dict[str, Any] = dict(router_logits=None, experts=None, weights=None)
        routed = (
            none
            if routing is None
            else dict(
                router_logits=routing.logits, experts=routing.experts, weights=routing.weights
            )
        )
        return Trace(
            hidden=jnp.concatenate([embedded, streams]),
            final_norm=grid(final.astype(jnp.float32)[None])[0],
            **routed,
        )

    return models.on_mesh(model, local)(model, tokens, mask)
