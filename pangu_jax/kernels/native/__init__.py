"""Kernels in C++ for the CPU, called through XLA's FFI on XLA's own threads.

They are compiled once, on first use, with the machine's C++ compiler, against the headers of the
jaxlib that is installed and for the processor that is there (own choice: a wheel stays pure Python,
and never meets another processor than it was compiled for). Without a compiler, or with
`PANGU_JAX_NATIVE=0`, XLA does everything.
"""

import contextlib
import ctypes
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pangu_jax.kernels.native import build
from pangu_jax.parallel import boundary

TARGETS = ("pangu_matmul", "pangu_experts", "pangu_attention", "pangu_write")


@functools.cache
def missing() -> str:
    """Why the kernels are not there, in a line; "" when they are."""
    if os.environ.get("PANGU_JAX_NATIVE") == "0":
        return "PANGU_JAX_NATIVE=0"
    if jax.default_backend() != "cpu":
        return "programs run elsewhere"
    try:
        library = ctypes.CDLL(str(build.library()))
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (build.CompileError, OSError, AttributeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def must_compile() -> bool:
    """Whether the first question will take some seconds."""
    try:
        return os.environ.get("PANGU_JAX_NATIVE") != "0" and not build.target().is_file()
    except build.CompileError:
        return False


_unwanted = jax.make_user_context(False)


def without() -> contextlib.AbstractContextManager:
    """Within, programs are traced as where there are no kernels."""
    return _unwanted(True)


def why_not() -> str:
    """Why kernels are not called here, in a line; "" when they are."""
    return "within native.without()" if _unwanted.value else missing()


def available() -> bool:
    """Whether the kernels can be called (they are compiled by the first question)."""
    return not why_not()


def call(
    target: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *arguments: Any,
    aliases: int | None = None,
    **attributes: Any,
) -> Array:
    """The one result of a kernel. Under `shard_map` it varies over all axes that any argument
    varies over.

    aliases: the argument that is changed in place
    """
    leaves = boundary.varying(arguments)
    result: Any = jax.ShapeDtypeStruct(shape, dtype)
    if jax.typeof(leaves[0]).manual_axis_type.varying:
        # `ffi_call` takes no struct that varies, but the type of an array that does.
        result = jax.typeof(boundary.varying((jnp.zeros(shape, dtype), leaves))[0])
    places = {} if aliases is None else {aliases: 0}
    kernel = jax.ffi.ffi_call(target, result, vmap_method="sequential", input_output_aliases=places)
    made: Array = kernel(*leaves, **attributes)
    return made
