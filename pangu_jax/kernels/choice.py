"""Which implementation of an operation a program takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jaxtyping import Array

from pangu_jax.kernels import mosaic
from pangu_jax.parallel import boundary
from pangu_jax.precision import exact_if_float32


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation for one platform.

    why_not: why it cannot do what is asked for, or not here, in a line; "" when it can
    has_gradient: of its own; that of the plain program else
    """

    run: Callable[..., Array]
    platform: Literal["cpu", "cuda"]
    why_not: Callable[[], str]
    has_gradient: bool = False


def choose(
    plain: Callable[..., Array], wanted: str | None, kernels: dict[str, Kernel]
) -> Callable[..., Array]:
    """The kernel that is wanted, or `plain` for another name. Where none is, the first that can, on
    its platform. All take the same arrays.

    Raises NotImplementedError for a kernel that is wanted and cannot.
    """
    if wanted is not None and wanted not in kernels:
        return plain
    for name, kernel in kernels.items():
        if wanted not in (None, name):
            continue
        why_not = kernel.why_not()
        if wanted and why_not:
            raise NotImplementedError(why_not)
        if not why_not:
            run = kernel.run if kernel.has_gradient else with_gradient_of(plain, kernel.run)
            return run if wanted else _there(run, kernel.platform, plain)
    return plain


def _there(run: Callable[..., Array], platform: str, plain: Callable[..., Array]) -> Callable:
    if platform == "cuda" and mosaic.is_interpreted():
        return run
    own = {platform: run}
    return lambda *arguments: lax.platform_dependent(*arguments, **own, default=plain)


def with_gradient_of(plain: Callable[..., Array], kernel: Callable[..., Array]) -> Callable:
    """`kernel`, whose gradient is that of `plain`; both take the same arrays."""

    @jax.custom_vjp
    def both(*arguments: Any) -> Array:
        return kernel(*arguments)

    def forward(*arguments: Any) -> tuple[Array, Callable]:
        # In full precision: this is traced outside of the model's own request.
        with exact_if_float32(jax.tree.leaves(arguments)[0].dtype):
            return jax.vjp(plain, *arguments)

    both.defvjp(forward, lambda backward, grad: backward(grad))
    return lambda *arguments: both(*boundary.varying(arguments))
