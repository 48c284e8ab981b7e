"""Routed experts in plain XLA: a loop over blocks of (token, expert) pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pangu_jax.adapted import Adapted
from pangu_jax.kernels.experts.held import Experts, take
from pangu_jax.kernels.swiglu import swiglu
from pangu_jax.parallel import boundary
from pangu_jax.precision import exact_if_float32, wants_same_bits
from pangu_jax.pytree import unchecked
from pangu_jax.quant.weight import Weight

# What a backward pass may keep in place of multiplying by the experts again (model.py).
EXPERTS_OUTPUT = "experts"

# Rows of a block where results must not depend on how many there are (`precision.same_bits`).
SAME_BITS_BLOCK = 8


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    held: Experts,
    among: int | None = None,
) -> Float[Array, "N D"]:
    """`kernels.experts.mix_experts`.

    The N*k (token, expert) pairs are sorted by expert and cut into blocks that each belong to one
    expert; a loop over the blocks multiplies each with that expert's weights. The number of blocks
    is static, because an expert wastes less than one block; empty blocks repeat an expert and are
    never read back. (Own choice: exact, static shapes, and one expert's weights at a time on every
    platform.)
    """
    N, k = experts.shape
    E = held.count
    size = SAME_BITS_BLOCK if wants_same_bits() else block_size(N * k, among or E)
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
        of_x, of_held = jax.vjp(apply, x[own], parts)[1](take(grad, i))
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


def _add(stack: Array, expert: Array, part: Array) -> Array:
    return lax.dynamic_update_index_in_dim(stack, take(stack, expert) + part, expert, 0)


def block_size(pairs: int, experts: int) -> int:
    """Up to 64 pairs per expert on average, about as many as that: there are at most twice as many
    blocks as experts. Beyond, a quarter: little is computed in vain (measured; docs/benchmarks.md).
    """
    mean = 1 << max(0, (pairs // experts) - 1).bit_length()
    return mean if mean <= 64 else min(256, max(64, mean // 4))
