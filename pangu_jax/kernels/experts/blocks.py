"""Routed experts in plain XLA: a loop over blocks of (token, expert) pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pangu_jax.adapted import Adapted
from pangu_jax.kernels.experts.arranged import arrange, combine, rows_of_pairs
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

    One block after the other is multiplied with its expert's weights. (Own choice: exact, static
    shapes, and one expert's weights at a time on every platform.)
    """
    size = SAME_BITS_BLOCK if wants_same_bits() else block_size(experts.size, among or held.count)
    own = arrange(experts, held.count, size)
    arguments = boundary.varying((x, held, own.experts, own.tokens, own.used))
    rows: Array = _blocks(*arguments, among is not None)
    chosen = checkpoint_name(rows_of_pairs(rows, own), EXPERTS_OUTPUT)
    return combine(chosen, weights, x.dtype)


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
