"""Routed experts: every token through the experts that it chose."""

import functools
from typing import Literal

from jaxtyping import Array, Float, Int

from pangu_jax.kernels import mosaic as hopper
from pangu_jax.kernels import native
from pangu_jax.kernels.choice import Kernel, choose
from pangu_jax.kernels.experts import blocks, mosaic
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.kernels.native import matrices

Implementation = Literal["blocks", "native", "mosaic"]


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

    `native` (CPU) reads each chosen expert once, where it lies, for all of its tokens; `mosaic`
    (NVIDIA's Hopper) multiplies all blocks at once, in the gradient of float experts too. Other
    gradients are those of `blocks`.
    """

    def plain(x: Array, experts: Array, weights: Array, held: Experts) -> Array:
        return blocks.mix_experts(x, experts, weights, held, among)

    kernels = {
        "mosaic": Kernel(
            functools.partial(mosaic.mix_experts, among=among),
            "cuda",
            lambda: hopper.why_not() or _unless(mosaic.can(x, held)),
            has_gradient=mosaic.has_gradient(held),
        ),
        "native": Kernel(
            _native,
            "cpu",
            lambda: native.why_not() or _unless(matrices.alike(x, held.gate_up, held.down)),
        ),
    }
    return choose(plain, implementation, kernels)(x, experts, weights, held)


def _unless(can: bool) -> str:
    return "" if can else "experts of these kinds"


def _native(x: Array, experts: Array, weights: Array, held: Experts) -> Array:
    return matrices.experts(x, experts, weights, held.gate_up, held.down, held.layer)
