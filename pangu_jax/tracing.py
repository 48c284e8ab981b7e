"""What every layer did with some tokens: the view for debugging and for parity tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pangu_jax import model as models
from pangu_jax import tokens_and_mask
from pangu_jax.cache import Meta
from pangu_jax.model import Pangu
from pangu_jax.moge import Routing
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh, pad_rows
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
    return _trace(model, *tokens_and_mask.check(model.config, tokens, attention_mask))


@jax.jit
def _trace(model: Pangu, tokens: Array, mask: Array) -> Trace:
    where = model.layout
    tokens, mask, count = pad_rows(where, tokens, mask)
    B, T = tokens.shape

    def local(model: Pangu, tokens: Array, mask: Array) -> tuple:
        N, flat = tokens.size, tokens.reshape(-1)
        keep = lambda x, routing: jax.tree.map(
            lambda part: boundary.whole(part, N, where), (x.astype(jnp.float32), routing)
        )
        final, _, runs = models.tapped_forward(model, flat, Meta.from_mask(mask), None, keep)
        streams, routing = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *runs)
        first, last = (
            boundary.whole(x.astype(jnp.float32), N, where)
            for x in (models.embed(model, flat), final)
        )
        return jnp.concatenate([first[None], streams]), last, routing

    tokens_second = PartitionSpec(None, *where.rows)
    run = on_mesh(
        model, local, (where.rows, where.rows), (tokens_second, where.rows, tokens_second)
    )
    streams, last, routing = run(model, tokens, mask)
    grid = lambda leaf: leaf.reshape(leaf.shape[0], B, T, leaf.shape[-1])[:, :count]
    routed: dict[str, Any] = dict(router_logits=None, experts=None, weights=None)
    if routing is not None:
        found: Routing = jax.tree.map(grid, routing)
        routed = dict(router_logits=found.logits, experts=found.experts, weights=found.weights)
    return Trace(hidden=grid(streams), final_norm=grid(last[None])[0], **routed)
