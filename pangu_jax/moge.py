"""Mixture of Grouped Experts: every token picks one expert in every group (arXiv 2505.21411,
section 2).

The published text (eq. 5-7) leaves out what the released code adds: a learned `router_scale` per
expert, applied to the weight of a chosen expert and never to the choice.

Whole groups lie on each rank of the layout's expert axes, so every rank has the same number of
(token, expert) pairs whatever the input: shapes are static, nothing is dropped, and no token is
sent to a particular rank. The conventional top-k router has no such luck; it is here to be compared
with.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pangu_jax.config import ModelConfig
from pangu_jax.kernels.experts import Experts, mix_experts
from pangu_jax.linear import linear
from pangu_jax.mlp import MLP
from pangu_jax.paged import AnyMeta
from pangu_jax.parallel import boundary
from pangu_jax.parallel.layout import Layout
from pangu_jax.pytree import pytree


@pytree
class Routing:
    """Where the tokens went: logits before the softmax, the chosen experts (k of them: one per
    group), their weights before `router_scale`.
    """

    logits: Float[Array, "N E"]
    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class MoGE(nnx.Module):
    """Grouped routed experts plus shared experts that every token passes through."""

    def __init__(self, config: ModelConfig, param: Any):
        assert config.moge is not None
        D, E, F = config.hidden_size, config.moge.num_experts, config.moge.expert_width
        self.config = config.moge
        self.router = param(E, D, fsdp=1)
        self.router_scale = param(E)
        self.gate_up = param(E, 2, F, D, expert=0, expert_ffn=2, fsdp=3)
        self.down = param(E, D, F, expert=0, expert_ffn=2, fsdp=1)
        self.shared = MLP(D, config.moge.shared_width, param)

    def __call__(
        self, x: Float[Array, "shard D"], meta: AnyMeta, where: Layout, stack: Experts | None = None
    ) -> tuple[Float[Array, "shard D"], Routing]:
        """Routed plus shared output, and the routing, of this device's tokens of the stream.

        stack: where to read the routed experts, if not from this layer's own leaves
        """
        axes = where.routed
        h = boundary.enter(x, axes, where)
        if where.boundary.gather == "int8":  # the choice is made before anything is rounded
            logits = boundary.gather(linear(x, self.router[...]), axes, where)
        else:
            logits = linear(h, self.router[...])
        routing = self._route(logits, meta, where)
        y = self._routed(h, routing, stack or Experts(self.gate_up[...], self.down[...]), where)
        if where.of("ffn"):
            y = boundary.leave(y + self.shared(h), axes, where)
        else:  # every rank has the shared experts, for tokens of its own
            y = boundary.leave(y, axes, where) + self.shared(x)
        return y, jax.tree.map(lambda part: boundary.own(part, axes, where), routing)

    def _route(self, logits: Float[Array, "N E"], meta: AnyMeta, where: Layout) -> Routing:
        c = self.config
        if c.router == "topk":
            return route_topk(logits, c.experts_per_token)
        kept = None
        if c.voted_experts is not None:
            valid = boundary.spread(meta.valid.reshape(-1), where.routed, where)
            kept = vote(logits, valid, c.num_groups, c.per_group, c.voted_experts)
        return route(logits, c.num_groups, c.per_group, kept)

    def _routed(
        self, h: Float[Array, "N D"], routing: Routing, held: Experts, where: Layout
    ) -> Float[Array, "N D"]:
        """What this rank's experts add to the output of the tokens."""
        # The weight is rounded to the activations' dtype first, as the reference does; the sum
        # stays float32.
        weights = routing.weights.astype(h.dtype) * self.router_scale[...][routing.experts]
        experts, axes, among = routing.experts, where.of("expert"), None
        if axes:
            experts = experts - lax.axis_index(axes) * held.count
            if self.config.router == "topk":
                here = (experts >= 0) & (experts < held.count)
                experts = jnp.where(here, experts, held.count)
                among = self.config.num_experts
            else:
                experts, weights = (_own_groups(part, axes, where) for part in (experts, weights))
        return mix_experts(h, experts, weights, held, among)


def _own_groups(chosen: Array, axes: tuple[str, ...], where: Layout) -> Array:
    """The columns of this rank's groups."""
    size = chosen.shape[1] // where.size(axes)
    return lax.dynamic_slice_in_dim(chosen, lax.axis_index(axes) * size, size, axis=1)


def route(
    logits: Float[Array, "N E"],
    num_groups: int,
    per_group: int = 1,
    kept: Bool[Array, "G size"] | None = None,
) -> Routing:
    """The best experts of each group of consecutive experts, with their share of the softmax over
    *all* experts (arXiv 2505.21411, eq. 5-7).

    kept: the experts that may be chosen, by group; None is all of them

    The softmax is float32. Weights are not renormalised over the chosen; of equal experts the first
    is taken.
    """
    N, E = logits.shape
    logits = logits.astype(jnp.float32)
    grouped = jax.nn.softmax(logits, axis=-1).reshape(N, num_groups, E // num_groups)
    open_to_all = grouped if kept is None else jnp.where(kept[None], grouped, -1.0)
    first = jnp.arange(num_groups, dtype=jnp.int32) * (E // num_groups)
    best = _best(open_to_all, per_group)
    weights = jnp.take_along_axis(grouped, best, axis=-1)
    chosen = best + first[None, :, None]
    return Routing(logits, chosen.reshape(N, -1), weights.reshape(N, -1))


def _best(scores: Float[Array, "N G size"], count: int) -> Int[Array, "N G count"]:
    if count == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
    return lax.top_k(lax.stop_gradient(scores), count)[1].astype(jnp.int32)


def route_topk(logits: Float[Array, "N E"], count: int) -> Routing:
    """The `count` best of all experts, with the softmax over those alone (arXiv 2505.21411, eq. 1
    and 2: the conventional mixture of experts).
    """
    logits = logits.astype(jnp.float32)
    chosen = _best(logits[:, None], count)[:, 0]
    weights = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1), axis=-1)
    return Routing(logits, chosen, weights)


def vote(
    logits: Float[Array, "N E"],
    valid: Bool[Array, " N"],
    num_groups: int,
    per_group: int,
    voted: int,
) -> Bool[Array, "G size"]:
    """The `voted` experts of each group that most valid tokens would choose (MERRouter; of equal
    ones the first).
    """
    N, E = logits.shape
    size = E // num_groups
    best = _best(logits.astype(jnp.float32).reshape(N, num_groups, size), per_group)
    wanted = jax.nn.one_hot(best, size, dtype=jnp.int32).sum(2)
    counts = jnp.where(valid[:, None, None], wanted, 0).sum(0)
    most = lax.top_k(counts, voted)[1]
    return jax.nn.one_hot(most, size, dtype=jnp.int32).sum(1).astype(bool)


def imbalance(experts: Int[Array, "N k"], num_experts: int, ranks: int) -> Float[Array, ""]:
    """The imbalance score of `ranks` devices with as many consecutive experts each: (most - fewest
    pairs of a device) / tokens (arXiv 2505.21411, eq. 3 and 4). 0 for MoGE with whole groups.
    """
    rank = experts.reshape(-1) // (num_experts // ranks)
    pairs = jnp.bincount(rank, length=ranks)
    return (pairs.max() - pairs.min()).astype(jnp.float32) / experts.shape[0]
