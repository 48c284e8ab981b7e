"""Kernels for NVIDIA's Hopper in Pallas Mosaic GPU: whether they are taken, and how one is called.

They are compiled for an H200 and interpreted on CPU in the tests, and have never run on a card:
until they have, `PANGU_JAX_MOSAIC=1` takes them and XLA is the default (docs/benchmarks.md).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pangu_jax.parallel import boundary

WANTED = "PANGU_JAX_MOSAIC"

_here = jax.make_user_context("")


def compiled() -> contextlib.AbstractContextManager:
    """Within, programs are traced as on a Hopper: to compile them for one that is not there."""
    return _here("compiled")


def for_card(description: str) -> contextlib.AbstractContextManager:
    """Within, programs are traced as they would be where a card of XLA's description is."""
    taken = os.environ.get(WANTED) == "1" and "cuda_compute_capability { major: 9 " in description
    return compiled() if taken else contextlib.nullcontext()


def interpreted() -> contextlib.AbstractContextManager:
    """Within, programs are traced with kernels that JAX interprets on CPU (from JAX 0.12 on), and
    that raise where two threads race.
    """
    return _here("interpreted")


@functools.cache
def _missing() -> str:
    if jax.default_backend() != "gpu":
        return "programs run elsewhere"
    if os.environ.get(WANTED) != "1":
        return f"{WANTED} is not 1"
    device = jax.devices()[0]
    version = str(getattr(device, "compute_capability", ""))
    return "" if version.startswith("9.") else f"{device.device_kind} is not a Hopper"


def why_not() -> str:
    """Why the kernels are not taken here, in a line; "" when they are."""
    if jax.__version_info__ < (0, 11):
        return "they need JAX 0.11"  # JAX 0.10 takes minutes to lay out attention's registers
    if _here.value == "without":
        return "within mosaic.without()"
    return "" if _here.value else _missing()


def available() -> bool:
    """Whether the kernels are taken."""
    return not why_not()


def without() -> contextlib.AbstractContextManager:
    """Within, programs are traced as where there is no Hopper."""
    return _here("without")


def is_interpreted() -> bool:
    """Whether they are interpreted: what a tensor core multiplies lies in shared memory then."""
    return _here.value == "interpreted"


def call(
    body: Callable[..., None],
    results: Sequence[tuple[tuple[int, ...], DTypeLike]],
    arguments: Sequence[Array],
    grid: dict[str, int],
    scratch: dict[str, Any],
) -> tuple[Array, ...]:
    """The results of `body(*arguments, *results, **scratch)`, references all, run by one warpgroup
    of 128 threads for every point of a grid. Under `shard_map` they vary over all axes that any
    argument varies over.
    """
    from jax.experimental.pallas import mosaic_gpu as gpu

    arguments = boundary.varying(tuple(arguments))
    varies = jax.typeof(arguments[0]).manual_axis_type
    like = {"manual_axis_type": varies} if varies.varying else {}
    options: dict[str, Any] = {}
    if is_interpreted():
        options["interpret"] = gpu.InterpretGPUParams(  # pyright: ignore[reportAttributeAccessIssue]
            detect_races=True
        )
    kernel = gpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype, **like) for shape, dtype in results),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        **options,
    )
    # JAX 0.11 forgets what a kernel's results vary over.
    made, _ = boundary.varying((tuple(kernel(*arguments)), arguments))
    return made


def swizzled(width: int, dtype: DTypeLike) -> int:
    """Numbers of a row of shared memory that a tensor core reads: the most that divide a width and
    take 128 bytes at most; 0 where not even 32 bytes do.
    """
    size = jnp.dtype(dtype).itemsize
    fits = (count for count in (128, 64, 32) if width * size % count == 0)
    return next(fits, 0) // size
