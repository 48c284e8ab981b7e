"""Mixture of Grouped Experts: every token picks one expert in every group (arXiv 2505.21411,
section 2).

The published text (eq. 5-7) leaves out what the released code adds: a learned `router_scale` per
expert, applied to the weight of a chosen expert and never to the choice.

Whole groups lie on each rank of the layout's expert axes, so every rank has the same number of
(token, expert) pairs whatever the input: shapes are static, nothing is dropped, and no token is
sent to a particular rank. The conventional top-k router has no such luck; it is here to be compared
with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pangu_jax.adapted import Adapted
from pangu_jax.config import ModelConfig
from pangu_jax.linear import linear
from pangu_jax.mlp import MLP, swiglu
from pangu_jax.paged import AnyMeta
from pangu_jax.parallel import boundary
from pangu_jax.parallel.layout import Layout
from pangu_jax.precision import exact_if_float32, wants_same_bits
from pangu_jax.pytree import pytree, unchecked
from pangu_jax.quant.weight import Weight

# What a backward pass may keep in place of multiplying by the experts again (model.py).
EXPERTS_OUTPUT = "experts"

# Rows of a block where results must not depend on how many there are (`precision.same_bits`).
SAME_BITS_BLOCK = 8


@pytree
class Routing:
    """Where the tokens went: logits before the softmax, the chosen experts (k of them: one per
    group), their weights before `router_scale`.
    """

    logits: Float[Array, "N E"]
    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]


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
        own = lambda stack: _slice(stack, expert, self.layer)
        return jax.tree.map(own, self.gate_up), jax.tree.map(own, self.down)


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


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    held: Experts,
    among: int | None = None,
) -> Float[Array, "N D"]:
    """sum_k weights[n, k] * expert[experts[n, k]](x[n]), computing only the chosen pairs.

    The N*k (token, expert) pairs are sorted by expert and cut into blocks that each belong to one
    expert; a loop over the blocks multiplies each with that expert's weights. The number of blocks
    is static, because an expert wastes less than one block; empty blocks repeat an expert and are
    never read back. (Own choice: exact, static shapes, and one expert's weights at a time on every
    platform.)

    among: the experts of all devices, where some pairs may belong to those of another (expert E);
        the loop then ends after the last block in use
    """
    N, k = experts.shape
    E = held.count
    size = SAME_BITS_BLOCK if wants_same_bits() else _block_size(N * k, among or E)
    num_blocks = (N * k + E * (size - 1)) // size

    order = jnp.argsort(experts.reshape(-1), stable=True)  # sorted rank -> pair
    counts = jnp.bincount(experts.reshape(-1), length=E + 1)
    blocks_of = ((counts + size - 1) // size).at[E].set(0)
    block_ends = jnp.cumsum(blocks_of)
    sorted_experts = experts.reshape(-1)[order]
    rank_in_expert = jnp.arange(N * k) - (jnp.cumsum(counts) - counts)[sorted_experts]
    row = (block_ends - blocks_of)[sorted_experts] * size + rank_in_expert
    row = jnp.where(sorted_experts < E, row, num_blocks * size)  # sorted rank -> row of the blocks

    token_of_row = jnp.zeros(num_blocks * size, jnp.int32).at[row].set(order // k, mode="drop")
    block_expert = jnp.searchsorted(block_ends, jnp.arange(num_blocks), "right")
    blocks = jnp.minimum(block_expert, E - 1), token_of_row.reshape(num_blocks, size)

    arguments = boundary.varying((x, held, *blocks, block_ends[-1]))
    rows: Array = _blocks(*arguments, among is not None)
    row_of_pair = jnp.zeros(N * k, row.dtype).at[order].set(row)
    flat = rows.reshape(num_blocks * size, -1)
    chosen = flat.at[row_of_pair].get(mode="fill", fill_value=0).reshape(N, k, -1)
    chosen = checkpoint_name(chosen, EXPERTS_OUTPUT)
    mixed = jnp.einsum("nkd,nk->nd", chosen, weights, preferred_element_type=jnp.float32)
    return mixed.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(
    x: Float[Array, "N D"],
    held: Experts,
    experts: Int[Array, " n"],
    tokens: Int[Array, "n s"],
    used: Int[Array, ""],
    uneven: bool,
) -> Float[Array, "n s D"]:
    """experts[i] applied to the tokens of block i, one block after the other; zeros from `used` on
    where `uneven`.
    """
    n, s = tokens.shape

    def one(i: Array, rows: Array) -> Array:
        y = swiglu(x[tokens[i]], *held.of(experts[i]))
        return lax.dynamic_update_index_in_dim(rows, y, i, 0)

    # A zero that comes after x: else XLA for GPU makes every layer's blank rows at the beginning.
    zero, _ = lax.optimization_barrier((jnp.zeros((), x.dtype), x))
    rows = boundary.varying((jnp.full((n, s, x.shape[1]), zero), x))[0]
    with exact_if_float32(x.dtype):  # both passes are traced outside of the model's own request
        return lax.fori_loop(0, used if uneven else n, one, rows)


def _blocks_forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _blocks(*arguments), arguments[:-1]


def _blocks_backward(
    uneven: bool, arguments: tuple[Any, ...], grad: Array
) -> tuple[Array | Experts | None, ...]:
    """Adds each block's part to its expert's gradient in place; plain autodiff would add a whole
    stack of zeros per block.
    """
    x, held, experts, tokens, used = arguments
    if held.layer is not None:
        raise NotImplementedError("gradients are of a layer's own experts, not of a stack")

    stacks = (held.gate_up, held.down)
    trained = tuple(map(_trained, stacks))

    def one(i: Array, sums: tuple[Array, Any]) -> tuple[Array, Any]:
        expert, own = experts[i], tokens[i]
        to_x, to_held = sums
        fixed = held.of(expert)

        def apply(x: Array, parts: tuple) -> Array:
            return swiglu(x, *map(_with_trained, fixed, parts))

        parts = tuple(map(_trained, fixed))
        of_x, of_held = jax.vjp(apply, x[own], parts)[1](_slice(grad, i))
        add = lambda stack, part: _add(stack, expert, part)
        return to_x.at[own].add(of_x), jax.tree.map(add, to_held, of_held)

    zeros = jax.tree.map(jnp.zeros_like, (x, trained))
    with exact_if_float32(x.dtype):
        to_x, to_held = lax.fori_loop(0, used if uneven else experts.shape[0], one, zeros)
    own = [_cotangent(*pair) for pair in zip(stacks, to_held, strict=True)]
    return to_x, unchecked(Experts, gate_up=own[0], down=own[1], layer=None), None, None, None


def _trained(stack: Any) -> tuple[Array, ...]:
    """The parts of experts' weights that have a gradient."""
    if isinstance(stack, Adapted):
        return (stack.a, stack.b)
    return () if isinstance(stack, Weight) else (stack,)


def _with_trained(stack: Any, parts: tuple[Array, ...]) -> Any:
    """The weights with these parts in the place of their own."""
    if isinstance(stack, Adapted):
        return Adapted(base=stack.base, a=parts[0], b=parts[1], scale=stack.scale)
    return stack if isinstance(stack, Weight) else parts[0]


def _cotangent(stack: Any, parts: tuple[Array, ...]) -> Any:
    """The parts' gradients as those of the weights."""
    if isinstance(stack, Adapted):
        return unchecked(Adapted, base=None, a=parts[0], b=parts[1], scale=stack.scale)
    return parts[0] if parts else None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _slice(stack: Array, index: Array, layer: Array | None = None) -> Array:
    if layer is None:
        return lax.dynamic_index_in_dim(stack, index, keepdims=False)
    start = (layer, index, *[jnp.zeros_like(index)] * (stack.ndim - 2))
    return lax.dynamic_slice(stack, start, (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])


def _add(stack: Array, expert: Array, part: Array) -> Array:
    return lax.dynamic_update_index_in_dim(stack, _slice(stack, expert) + part, expert, 0)


def _block_size(pairs: int, experts: int) -> int:
    """Up to 64 pairs per expert on average, about as many as that: there are at most twice as many
    blocks as experts. Beyond, a quarter: little is computed in vain (measured; docs/benchmarks.md).
    """
    mean = 1 << max(0, (pairs // experts) - 1).bit_length()
    return mean if mean <= 64 else min(256, max(64, mean // 4))
