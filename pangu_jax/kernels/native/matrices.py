"""Which matrices the C++ can multiply, and how they are handed to it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangu_jax.kernels import native
from pangu_jax.precision import wants_same_bits
from pangu_jax.quant.weight import Weight

FLOATS = (jnp.float32, jnp.bfloat16)
KNOWN = (
    ("int8", "float"),
    ("int8", "dynamic"),
    ("int4", "float"),
    ("fp8", "float"),
    ("fp8", "dynamic"),
)


def kind(x: Float[Array, "N D"], matrix: Any) -> str | None:
    """What the kernels would make of x times a matrix, float or quantised; None if they cannot."""
    if isinstance(matrix, Weight):
        scheme = matrix.scheme
        known = (scheme.numbers, scheme.activations) in KNOWN and x.dtype in FLOATS
        return f"{scheme.numbers} {scheme.activations}" if known else None
    known = x.dtype in FLOATS and getattr(matrix, "dtype", None) == x.dtype
    return str(x.dtype) if known else None


def alike(x: Float[Array, "N D"], *matrices: Any) -> bool:
    """Whether they can all be multiplied, in the same way."""
    kinds = {kind(x, matrix) for matrix in matrices}
    return len(kinds) == 1 and None not in kinds and x.size > 0


def experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    gate_up: Any,
    down: Any,
    layer: Int[Array, ""] | None,
) -> Float[Array, "N D"]:
    """sum_k weights[n, k] * down(silu(gate(x)) * up(x)) of expert chosen[n, k]; no gradient.

    gate_up [*L, E, 2, F, D], down [*L, E, D, F]; pairs whose expert is E or more add nothing
    """
    rounds = isinstance(down, Weight) and down.scheme.activations == "dynamic"
    return native.call(
        "pangu_experts",
        x.shape,
        x.dtype,
        x,
        chosen.astype(jnp.int32),
        weights.astype(jnp.float32),
        *_parts(gate_up),
        *_parts(down),
        jnp.zeros((), jnp.int32) if layer is None else layer.astype(jnp.int32),
        rounds=rounds,
        same_bits=wants_same_bits(),
    )


def _parts(matrix: Any) -> tuple[Array, Array]:
    """Numbers, and the scales of each row where there are scales."""
    if isinstance(matrix, Weight):
        return matrix.numbers, matrix.scale
    return matrix, jnp.zeros(0, jnp.float32)
