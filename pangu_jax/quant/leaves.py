"""The quantised leaf in a model's tree: what stands where the float matrix stood."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from pangu_jax.errors import ConfigError
from pangu_jax.pytree import unchecked
from pangu_jax.quant.scheme import Scheme, Schemes
from pangu_jax.quant.weight import DTYPES, Weight

PARTS = ("numbers", "scale", "input_scale", "offset", "bias")
CACHE_SCALE = "attention.cache_scale"


def split(name: str) -> tuple[str, str | None]:
    """The name of a leaf of a float model, and which part of a quantised one is meant, if any."""
    leaf, _, part = name.rpartition(".")
    quantised = part in PARTS and leaf.endswith(("qkv", "out", "gate_up", "down"))
    return (leaf, part) if quantised else (name, None)


def is_fixed(name: str) -> bool:
    """Whether a leaf is part of something quantised: it has no gradient."""
    return split(name)[1] is not None or name.endswith(CACHE_SCALE)


def hold(block: Any, schemes: Schemes, *, lead: int, experts: bool) -> None:
    """Puts abstract quantised leaves in the place of a fresh block's float ones.

    lead: axes in front of a layer's own: 1 in a run of stacked layers
    experts: whether `mlp.gate_up` and `mlp.down` are those of routed experts
    Raises ConfigError where a leaf's inputs cannot be split as its layout wants.
    """
    for name, scheme in schemes:
        *path, last = name.split(".")
        module = functools.reduce(getattr, path, block)
        kept = lead + (experts and path == ["mlp"])
        leaf = abstract(getattr(module, last).get_value(), scheme, kept, name)
        setattr(module, last, nnx.Param(leaf))


def hold_cache_scale(block: Any, *, lead: int) -> None:
    """Gives a fresh block float32 scales of an int8 cache, split as its heads are."""
    qkv = block.attention.qkv.get_value()
    like: Any = qkv.numbers if isinstance(qkv, Weight) else qkv
    *front, K, _, H, _ = like.shape
    spec = (*like.sharding.spec[: lead + 1], None, None)
    place = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
    scale = jax.ShapeDtypeStruct((*front, K, 2, H), jnp.float32, sharding=place)
    block.attention.cache_scale = nnx.Param(scale)


def abstract(like: Any, scheme: Scheme, each: int, name: str) -> Weight:
    """The quantised leaf for a float one, as shapes and places.

    like: a ShapeDtypeStruct with a sharding, [..., D]
    each: how many of the first axes have static scales of their own: layers and experts
    """
    *out, D = like.shape
    *front, last = (*like.sharding.spec, *[None] * (like.ndim - len(like.sharding.spec)))
    mesh, ranks = like.sharding.mesh, 1
    for axis in (last,) if isinstance(last, str) else last or ():
        ranks *= mesh.shape[axis]
    if scheme.group is not None and D % (scheme.group * ranks):
        raise ConfigError(
            f"{name}: {D} inputs in groups of {scheme.group} cannot be split over {ranks} "
            "devices; take smaller groups, or fewer devices there"
        )

    def part(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        spec = (*spec, *[None] * (len(shape) - len(spec)))
        place: Any = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    width, groups, of_scale = D, 1, None
    if scheme.group is not None:
        width, groups, of_scale = D // 2, D // scheme.group, last
    parts: dict[str, Any] = dict.fromkeys(PARTS)
    numbers = part((*out, width), DTYPES[scheme.numbers], *front, last)
    parts["numbers"] = _laid_out(numbers, like)
    parts["scale"] = part((*out, groups), jnp.float32, *front, of_scale)
    if scheme.activations == "static":
        shape, spec = (*out[:each], *[1] * (like.ndim - each)), front[:each]
        parts["input_scale"] = part(shape, jnp.float32, *spec)
        parts["offset"] = part(shape, jnp.int8, *spec)
        parts["bias"] = part((*out, ranks), jnp.int32, *front, last)
    return unchecked(Weight, scheme=scheme, **parts)


def _laid_out(numbers: jax.ShapeDtypeStruct, like: Any) -> jax.ShapeDtypeStruct:
    """With the memory layout that is asked for the float leaf, if any."""
    layout = like.format.layout
    if layout is None:
        return numbers
    place = Format(layout, numbers.sharding)
    return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=place)
