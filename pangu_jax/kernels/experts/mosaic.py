"""Routed experts on NVIDIA's Hopper: grouped products ("SwiftGMM"), and plain XLA in between."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangu_jax.kernels import mosaic
from pangu_jax.kernels.experts.arranged import Arranged, arrange, combine, rows_of_pairs
from pangu_jax.kernels.experts.gradients import grouped_back, summed
from pangu_jax.kernels.experts.grouped import grouped
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.parallel import boundary
from pangu_jax.precision import wants_same_bits
from pangu_jax.pytree import unchecked
from pangu_jax.quant import rows as quant_rows
from pangu_jax.quant.weight import Weight

# Tokens per expert, up to which: rows of a block, outputs of a tile, loads under way at once.
# Planned from the size of shared memory and registers, not measured: few tokens wait for weights
# and want many loads, many tokens for the tensor core and want large tiles.
TILES = {
    8: (8, 64, 8),
    16: (16, 64, 8),
    32: (32, 64, 6),
    64: (64, 64, 5),
    float("inf"): (128, 128, 4),
}


def can(x: Float[Array, "N D"], held: Experts) -> bool:
    """bf16 experts, or int8 ones with bf16 activations; widths in whole tiles."""
    D, F = held.down.shape[-2:]
    return x.dtype == jnp.bfloat16 and _can(held.gate_up, 2 * F) and _can(held.down, D)


def _can(matrix: Any, outputs: int) -> bool:
    if isinstance(matrix, Weight):
        scheme = matrix.scheme
        if scheme.numbers != "int8" or scheme.activations not in ("float", "dynamic"):
            return False
        matrix = matrix.numbers
    elif getattr(matrix, "dtype", None) != jnp.bfloat16:
        return False
    return outputs % 64 == 0 and mosaic.swizzled(matrix.shape[-1], matrix.dtype) > 0


def has_gradient(held: Experts) -> bool:
    """Of its own: of float experts that are a layer's own."""
    return held.layer is None and not any(isinstance(x, Weight) for x in (held.gate_up, held.down))


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    held: Experts,
    among: int | None = None,
) -> Float[Array, "N D"]:
    """`kernels.experts.mix_experts`."""
    return _mix(*boundary.varying((x, experts, weights, held)), among)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mix(x: Array, experts: Array, weights: Array, held: Experts, among: int | None) -> Array:
    size, *tile = _tile(experts, among or held.count)
    own = arrange(experts, held.count, size)
    inner = _gated(_linear(x[own.tokens], held.gate_up, own, held.layer, *tile))
    rows = _linear(inner, held.down, own, held.layer, *tile)
    return combine(rows_of_pairs(rows, own), weights, x.dtype)


def _tile(experts: Int[Array, "N k"], count: int) -> tuple[int, int, int]:
    """Rows of a block, outputs of a tile, loads."""
    mean = 0 if wants_same_bits() else experts.size / count
    return next(tile for most, tile in TILES.items() if mean <= most)


def _forward(*arguments: Any) -> tuple[Array, Any]:
    return _mix(*arguments), arguments[:-1]


def _backward(among: int | None, kept: Any, grad: Float[Array, "N D"]) -> tuple[Any, ...]:
    """Five grouped products, the one of gate and up again among them; nothing is kept. Blocks have
    64 rows at least here, which a sum over rows takes at a time.
    """
    x, experts, weights, held = kept
    size, tile, loads = max(_tile(experts, among or held.count), TILES[64])
    own = arrange(experts, held.count, size)
    flat = held.gate_up.reshape(held.count, -1, x.shape[1])
    back = lambda rows, stack: grouped_back(rows, stack, own.experts, own.used, loads)
    shares = (
        jnp.zeros(own.tokens.size, jnp.float32)
        .at[own.rows]
        .set(weights.astype(jnp.float32), mode="drop")
    )
    shares = shares.reshape(*own.tokens.shape, 1)  # of each row, 0 where there is no pair
    rows, grads = x[own.tokens], grad[own.tokens]

    projected = grouped(rows, flat, own.experts, own.used, tile, loads)
    inner, to_gated = jax.vjp(_gated, projected)
    to_inner = back(grads, held.down).astype(jnp.float32)  # but for the share
    of_rows = (to_inner * inner.astype(jnp.float32)).sum(-1)
    to_weights = of_rows.reshape(-1).at[own.rows].get(mode="fill", fill_value=0)
    (to_projected,) = to_gated((to_inner * shares).astype(x.dtype))
    to_pairs = rows_of_pairs(back(to_projected, flat), own)
    to_x = to_pairs.sum(1, dtype=jnp.float32).astype(x.dtype)

    shared = (grads.astype(jnp.float32) * shares).astype(x.dtype)
    holds = (jnp.arange(own.experts.size) < own.used).astype(jnp.int32)
    count = jnp.zeros(held.count, jnp.int32).at[own.experts].add(holds)
    first = jnp.cumsum(count) - count
    to_gate_up = summed(to_projected, rows, first, count, loads)
    to_down = summed(shared, inner, first, count, loads)
    to_held = unchecked(
        Experts, gate_up=to_gate_up.reshape(held.gate_up.shape), down=to_down, layer=None
    )
    return to_x, None, to_weights.astype(weights.dtype), to_held


_mix.defvjp(_forward, _backward)


def _gated(projected: Float[Array, "n s FF"]) -> Float[Array, "n s F"]:
    gate, up = jnp.split(projected, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _linear(
    rows: Float[Array, "n s D"],
    matrix: Any,
    own: Arranged,
    layer: Int[Array, ""] | None,
    tile: int,
    loads: int,
) -> Float[Array, "n s out"]:
    """`linear.linear` of the rows of each block and its expert's matrix."""
    experts, lead = own.experts, 1
    if layer is not None:
        experts, lead = experts + layer.astype(experts.dtype) * matrix.shape[1], 2
    flat = lambda leaf: leaf.reshape(math.prod(leaf.shape[:lead]), -1, leaf.shape[-1])

    def product(rows: Array, stack: Array) -> Array:
        return grouped(rows, flat(stack), experts, own.used, tile, loads)

    if not isinstance(matrix, Weight):
        return product(rows, matrix)
    scale = flat(matrix.scale)[experts, :, 0][:, None]
    if matrix.scheme.activations == "float":
        return (product(rows, matrix.numbers) * scale).astype(rows.dtype)
    numbers, of_rows = quant_rows.quantize(rows)
    return (product(numbers, matrix.numbers) * of_rows * scale).astype(rows.dtype)
