"""The quantised leaf: a pytree that stands in a module where a float matrix stood."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from pangu_jax.pytree import pytree, static
from pangu_jax.quant import rows
from pangu_jax.quant.scheme import Scheme

KINDS = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
DTYPES = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": rows.FP8}


@pytree
class Weight:
    """A matrix [*out, D] in few bits, in the order of the float leaf it stands for.

    numbers: int8 or fp8 [*out, D]; of int4 uint8 [*out, D/2], two numbers plus 8 in a byte, the
        first in the low half (the order of compressed-tensors)
    scale: float32 [*out, 1], of int4 [*out, D/group]: what a number is worth; with static
        activations what a unit of the integer result is worth
    Only with static activations, where x ~ (number - offset) * input_scale:
    input_scale, offset: float32 and int8 [.., 1, 1], one for each expert or for all
    bias: int32 [*out, ranks], added to the integer result; where devices share the inputs, the
        first of them alone has it
    """

    scheme: Scheme = static()
    numbers: Shaped[Array, "*out numbers"]
    scale: Float[Array, "*out scales"]
    input_scale: Float[Array, "*each"] | None = None
    offset: Int8[Array, "*each"] | None = None
    bias: Shaped[Array, "*out ranks"] | None = None

    def __getitem__(self, everything: Any) -> "Weight":
        """As of an array: `leaf[...]`."""
        if everything is not Ellipsis:
            raise TypeError("of a quantised matrix one can only take [...]")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the float matrix."""
        *out, width = self.numbers.shape
        return (*out, width * (2 if self.scheme.numbers == "int4" else 1))

    @property
    def ndim(self) -> int:
        """Axes of the float matrix."""
        return self.numbers.ndim

    def flat(self) -> "Weight":
        """The same with one axis of outputs."""
        last = lambda x: x.reshape(-1, x.shape[-1])
        return Weight(
            numbers=last(self.numbers),
            scale=last(self.scale),
            input_scale=None if self.input_scale is None else self.input_scale.reshape(()),
            offset=None if self.offset is None else self.offset.reshape(()),
            bias=None if self.bias is None else last(self.bias),
            scheme=self.scheme,
        )

    def floats(self, dtype: DTypeLike) -> Float[Array, "*out D"]:
        """The float matrix that this one stands for."""
        scale = self.scale if self.input_scale is None else self.scale / self.input_scale
        if self.scheme.numbers != "int4":
            return (self.numbers.astype(jnp.float32) * scale).astype(dtype)
        *out, groups = scale.shape
        grouped = unpack(self.numbers).reshape(*out, groups, -1).astype(jnp.float32)
        return (grouped * scale[..., None]).reshape(self.shape).astype(dtype)


def quantize(weight: Float[Array, "*out D"], scheme: Scheme) -> Weight:
    """A float matrix rounded to nearest. Raises ValueError for static activations, whose scales
    come from calibration, and for a group that does not divide D.
    """
    if scheme.activations == "static":
        raise ValueError("static activations need calibrated scales")
    if scheme.group is None:
        numbers, scale = rows.quantize(weight, KINDS[scheme.numbers])
        return Weight(numbers=numbers, scale=scale, scheme=scheme)
    *out, D = weight.shape
    if D % scheme.group:
        raise ValueError(f"groups of {scheme.group} do not divide {D} inputs")
    numbers, scale = rows.quantize(weight.reshape(*out, -1, scheme.group), "int4")
    return Weight(numbers=pack(numbers.reshape(weight.shape)), scale=scale[..., 0], scheme=scheme)


def pack(numbers: Int8[Array, "*out D"]) -> UInt8[Array, "*out half"]:
    """Numbers from -8 to 7, two in a byte."""
    pairs = (numbers + jnp.int8(8)).astype(jnp.uint8).reshape(*numbers.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << jnp.uint8(4))


def unpack(packed: UInt8[Array, "*out half"]) -> Int8[Array, "*out D"]:
    """The numbers of `pack`."""
    low, high = packed & jnp.uint8(15), packed >> jnp.uint8(4)
    pairs = jnp.stack([low, high], axis=-1).astype(jnp.int8) - jnp.int8(8)
    return pairs.reshape(*packed.shape[:-1], -1)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
