"""Mixture of Grouped Experts: every token picks one expert in every group (arXiv 2505.21411,
section 2).

The published text (eq. 5-7) leaves out what the released code adds: a learned `router_scale` per
expert, applied to the weight of a chosen expert and never to the choice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.config import ModelConfig
from pangu_jax.linear import exact_if_float32, linear
from pangu_jax.mlp import MLP, swiglu
from pangu_jax.pytree import pytree


@pytree
class Routing:
    """Where the tokens went: logits before the softmax, one expert per group, its weight before
    `router_scale`.
    """

    logits: Float[Array, "N E"]
    experts: Int[Array, "N G"]
    weights: Float[Array, "N G"]


class MoGE(nnx.Module):
    """Grouped routed experts plus shared experts that every token passes through."""

    def __init__(self, config: ModelConfig, param: Any):
        assert config.moge is not None
        D, E, F = config.hidden_size, config.moge.num_experts, config.moge.expert_width
        self.num_groups = config.moge.num_groups
        self.router = param(E, D)
        self.router_scale = param(E)
        self.gate_up = param(E, 2, F, D)
        self.down = param(E, D, F)
        self.shared = MLP(D, config.moge.shared_width, param)

    def __call__(self, x: Float[Array, "N D"]) -> tuple[Float[Array, "N D"], Routing]:
        """Routed plus shared output (this device's partial sum), and the routing."""
        routing = route(linear(x, self.router[...]), self.num_groups)
        # The weight is rounded to the activations' dtype first, as the reference does; the sum
        # stays float32.
        weights = routing.weights.astype(x.dtype) * self.router_scale[...][routing.experts]
        routed = mix_experts(x, routing.experts, weights, self.gate_up[...], self.down[...])
        return routed + self.shared(x), routing


def route(logits: Float[Array, "N E"], num_groups: int) -> Routing:
    """The best expert of each group of consecutive experts, with its share of the softmax over
    *all* experts.

    The softmax is float32. Weights are not renormalised over the chosen; of equal experts the first
    is taken.
    """
    N, E = logits.shape
    logits = logits.astype(jnp.float32)
    grouped = jax.nn.softmax(logits, axis=-1).reshape(N, num_groups, E // num_groups)
    first = jnp.arange(num_groups, dtype=jnp.int32) * (E // num_groups)
    best = jnp.argmax(grouped, axis=-1).astype(jnp.int32)
    weights = jnp.take_along_axis(grouped, best[:, :, None], axis=-1)[:, :, 0]
    return Routing(logits, best + first[None, :], weights)


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N G"],
    weights: Float[Array, "N G"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "N D"]:
    """sum_g weights[n, g] * expert[experts[n, g]](x[n]), computing only the chosen pairs.

    The N*G (token, expert) pairs are sorted by expert and cut into blocks that each belong to one
    expert; a scan over the blocks multiplies each with that expert's weights. The number of blocks
    is static, because an expert wastes less than one block; empty blocks repeat an expert and are
    never read back. (Own choice: exact, static shapes, and one expert's weights at a time on every
    platform.)
    """
    N, G = experts.shape
    E = gate_up.shape[0]
    size = _block_size(N * G, E)
    num_blocks = (N * G + E * (size - 1)) // size

    order = jnp.argsort(experts.reshape(-1), stable=True)  # sorted rank -> pair
    counts = jnp.bincount(experts.reshape(-1), length=E)
    block_ends = jnp.cumsum((counts + size - 1) // size)
    sorted_experts = experts.reshape(-1)[order]
    rank_in_expert = jnp.arange(N * G) - (jnp.cumsum(counts) - counts)[sorted_experts]
    first_block = block_ends - (counts + size - 1) // size
    row = first_block[sorted_experts] * size + rank_in_expert  # sorted rank -> row of the blocks

    token_of_row = jnp.zeros(num_blocks * size, jnp.int32).at[row].set(order // G)
    block_expert = jnp.minimum(jnp.searchsorted(block_ends, jnp.arange(num_blocks), "right"), E - 1)

    rows = _blocks(x, gate_up, down, block_expert, token_of_row.reshape(num_blocks, size))
    row_of_pair = jnp.zeros(N * G, row.dtype).at[order].set(row)
    chosen = rows.reshape(num_blocks * size, -1)[row_of_pair].reshape(N, G, -1)
    mixed = jnp.einsum("ngd,ng->nd", chosen, weights, preferred_element_type=jnp.float32)
    return mixed.astype(x.dtype)


@jax.custom_vjp
def _blocks(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    experts: Int[Array, " n"],
    tokens: Int[Array, "n s"],
) -> Float[Array, "n s D"]:
    """experts[i] applied to the tokens of block i, one block after the other."""

    def one(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        expert, own = block
        return None, swiglu(x[own], _slice(gate_up, expert), _slice(down, expert))

    with exact_if_float32(x.dtype):  # both passes are traced outside of the model's own request
        return lax.scan(one, None, (experts, tokens))[1]


def _blocks_forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _blocks(*arguments), arguments


def _blocks_backward(arguments: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    """Adds each block's part to its expert's gradient in place; plain autodiff would add a whole
    stack of zeros per block.
    """
    x, gate_up, down, experts, tokens = arguments

    def one(sums: tuple[Array, ...], block: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        expert, own, grad = block
        to_x, to_gate_up, to_down = sums
        mine = (x[own], _slice(gate_up, expert), _slice(down, expert))
        parts = jax.vjp(swiglu, *mine)[1](grad)
        to_x = to_x.at[own].add(parts[0])
        return (to_x, _add(to_gate_up, expert, parts[1]), _add(to_down, expert, parts[2])), None

    zeros = jax.tree.map(jnp.zeros_like, (x, gate_up, down))
    with exact_if_float32(x.dtype):
        sums, _ = lax.scan(one, zeros, (experts, tokens, grad))
    return *sums, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _slice(stack: Array, expert: Array) -> Array:
    return lax.dynamic_index_in_dim(stack, expert, keepdims=False)


def _add(stack: Array, expert: Array, part: Array) -> Array:
    return lax.dynamic_update_index_in_dim(stack, _slice(stack, expert) + part, expert, 0)


def _block_size(pairs: int, experts: int) -> int:
    """Up to 64 pairs per expert on average, about as many as that: there are at most twice as many
    blocks as experts. Beyond, a quarter: little is computed in vain (measured; docs/benchmarks.md).
    """
    mean = 1 << max(0, (pairs // experts) - 1).bit_length()
    return mean if mean <= 64 else min(256, max(64, mean // 4))
