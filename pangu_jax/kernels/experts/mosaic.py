"""Routed experts on NVIDIA's Hopper: grouped products ("SwiftGMM"), and plain XLA in between."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangu_jax.kernels import mosaic
from pangu_jax.kernels.experts.arranged import Arranged, arrange, combine
from pangu_jax.kernels.experts.grouped import grouped
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.precision import wants_same_bits
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
    return x.dtype == jnp.bfloat16 and all(map(_can, (held.gate_up, held.down)))


def _can(matrix: Any) -> bool:
    if isinstance(matrix, Weight):
        scheme = matrix.scheme
        if scheme.numbers != "int8" or scheme.activations not in ("float", "dynamic"):
            return False
        matrix = matrix.numbers
    elif getattr(matrix, "dtype", None) != jnp.bfloat16:
        return False
    *_, outputs, width = matrix.shape
    return outputs % 64 == 0 and mosaic.swizzled(width, matrix.dtype) > 0


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    held: Experts,
    among: int | None = None,
) -> Float[Array, "N D"]:
    """`kernels.experts.mix_experts`; no gradient."""
    mean = 0 if wants_same_bits() else experts.size / (among or held.count)
    size, *tile = next(tile for most, tile in TILES.items() if mean <= most)
    own = arrange(experts, held.count, size)
    y = _linear(x[own.tokens], held.gate_up, own, held.layer, *tile)
    gate, up = jnp.split(y, 2, axis=-1)
    rows = _linear(jax.nn.silu(gate) * up, held.down, own, held.layer, *tile)
    return combine(rows, own, weights, x.dtype)


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
