"""Routed experts: every token through the experts that it chose."""

from typing import Literal

from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.kernels import native
from pangu_jax.kernels.experts import blocks
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.kernels.native import matrices

Implementation = Literal["blocks", "native"]


def mix_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    held: Experts,
    among: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """sum_k weights[n, k] * expert[experts[n, k]](x[n]), computing only the chosen pairs.

    among: the experts of all devices, where some pairs may belong to those of another (expert E):
        those pairs add nothing

    `native` (CPU) reads each chosen expert once, where it lies, for all of its tokens; its gradient
    is that of `blocks`.
    """
    if implementation == "blocks" or not _can(x, held, implementation):
        return blocks.mix_experts(x, experts, weights, held, among)

    def plain(x: Array, experts: Array, weights: Array, held: Experts) -> Array:
        return blocks.mix_experts(x, experts, weights, held, among)

    def kernel(x: Array, experts: Array, weights: Array, held: Experts) -> Array:
        return matrices.experts(x, experts, weights, held.gate_up, held.down, held.layer)

    kernel = native.with_gradient_of(plain, kernel)
    if implementation == "native":
        return kernel(x, experts, weights, held)
    return lax.platform_dependent(x, experts, weights, held, cpu=kernel, default=plain)


def _can(x: Array, held: Experts, implementation: Implementation | None) -> bool:
    fits = matrices.alike(x, held.gate_up, held.down) and native.available()
    if implementation == "native" and not fits:
        raise NotImplementedError(native.why_not() or "experts of these kinds")
    return fits
