"""Low-rank adapters (LoRA, arXiv 2106.09685): a matrix that stays as it is, float or quantised, and
a small product beside it that is trained.

    y = base x + scale * B (A x)        A [r, D], B [*out, r], scale = alpha / r

They are no part of a model: `forward` takes them as an argument and puts them into a layer's
modules (adapted.py), whose text does not notice. By name they are the leaves
`blocks.0.mlp.down.lora_a` and `.lora_b` of a run of stacked layers, in the model's own shapes
whatever the layout; routed experts have a pair each. One A serves all outputs of a fused matrix: q,
k and v, gate and up (own choice).
"""

import fnmatch
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from pangu_jax import build, strict
from pangu_jax.adapted import Adapters
from pangu_jax.errors import ConfigError
from pangu_jax.model import Pangu
from pangu_jax.parallel import fit
from pangu_jax.pytree import unchecked
from pangu_jax.quant import leaves as quantised
from pangu_jax.quant.weight import Weight

A, B = "lora_a", "lora_b"

# What adapters can stand beside, by its name in a layer.
MATRICES = (
    "attention.qkv",
    "attention.out",
    "mlp.gate_up",
    "mlp.down",
    "mlp.shared.gate_up",
    "mlp.shared.down",
)


def init(model: Pangu, rank: int, targets: Iterable[str], key: Array) -> dict[str, Array]:
    """Adapters that change nothing yet, float32, by leaf name: A uniform within 1 / sqrt(D), B 0.

    targets: patterns of names such as `mlp.*`, matched with MATRICES; none for all of them
    Raises ConfigError for layers that are not stacked, and for a pattern that matches nothing.
    """
    if model.form != "stacked":
        raise ConfigError("adapters are trained in stacked form")
    found = {}
    for place, (block, name) in enumerate(_matched(model, list(targets))):
        *out, D = _own_shape(model, block, name)
        each, bound = _each(model, name), 1 / math.sqrt(D)
        own = jax.random.fold_in(key, place)
        leaf = f"blocks.{block}.{name}"
        found[f"{leaf}.{A}"] = jax.random.uniform(
            own, (*out[:each], rank, D), jnp.float32, -bound, bound
        )
        found[f"{leaf}.{B}"] = jnp.zeros((*out, rank), jnp.float32)
    return found


def held(model: Pangu, leaves: Mapping[str, Array], scale: float) -> Adapters:
    """The adapters by leaf name as `forward` takes them, padded as the model's layout pads."""
    blocks: list[dict[str, tuple[Array, Array]]] = [{} for _ in model.blocks]
    for leaf, block, name in _pairs(leaves):
        a, b = leaves[f"{leaf}.{A}"], leaves[f"{leaf}.{B}"]
        *out, D = _matrix(model, block, name).shape
        a = jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, D - a.shape[-1])])
        blocks[block][name] = (a, fit.hold(leaf, b, (*out, b.shape[-1])))
    return Adapters(blocks=tuple(blocks), scale=scale)


def specs(model: Pangu, adapters: Adapters) -> Adapters:
    """How the mesh splits them: as the matrices beside them, but not over fsdp's axes."""
    of = lambda block, name: (_spec(model, block, name, A), _spec(model, block, name, B))
    found = [{name: of(i, name) for name in each} for i, each in enumerate(adapters.blocks)]
    return jax.tree.unflatten(jax.tree.structure(adapters), jax.tree.leaves(found))


def places(model: Pangu, leaves: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Where each adapter lies: split as `specs` says, where the layout had nothing to pad."""
    found = {}
    for leaf, block, name in _pairs(leaves):
        whole = tuple(_matrix(model, block, name).shape) == _own_shape(model, block, name)
        for part in (A, B):
            spec = _spec(model, block, name, part) if whole else PartitionSpec()
            kept = list(spec)
            while kept and kept[-1] is None:  # as XLA says it of a result
                kept.pop()
            found[f"{leaf}.{part}"] = NamedSharding(model.mesh, PartitionSpec(*kept))
    return found


def merge(model: Pangu, leaves: Mapping[str, Array], scale: float) -> Pangu:
    """The float model that base and adapters are together, W + scale * B A, in the base's dtype and
    with separate layers.
    """
    like = build.abstract(
        model.config,
        dtype=model.dtype,
        where=model.layout,
        form="separate",
        origin=model.origin,
        devices=list(np.ravel(np.asarray(model.mesh.devices))),
    )
    own, runs, floats = build.weights(model), _runs(model), {}
    places, names = build.places(like), [name for name, _ in build.named_leaves(like)]
    for leaf in dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in names):
        if leaf in own:
            floats[leaf] = own[leaf]
            continue
        for block, (first, length) in enumerate(runs):
            stack = _merged(model, own, leaves, scale, block, leaf)
            for layer in range(length):
                name = f"blocks.{first + layer}.{leaf}"
                floats[name] = jax.device_put(stack[layer], places[name])
    merged = build.with_weights(like, floats)
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.format), merged, like)


def _merged(
    model: Pangu,
    own: Mapping[str, Array],
    leaves: Mapping[str, Array],
    scale: float,
    block: int,
    name: str,
) -> Array:
    """A leaf of a run of layers as a float array, with its adapter."""
    leaf = f"blocks.{block}.{name}"
    if leaf in own:
        whole = own[leaf]
    else:
        held = _matrix(model, block, name)
        parts = {part: own.get(f"{leaf}.{part}") for part in quantised.PARTS}
        whole = unchecked(Weight, scheme=held.scheme, **parts).floats(model.dtype)
    if f"{leaf}.{A}" not in leaves:
        return whole
    a, b = leaves[f"{leaf}.{A}"], leaves[f"{leaf}.{B}"]
    flat = b.reshape(*a.shape[:-2], -1, b.shape[-1])
    with jax.default_matmul_precision("highest"):
        added = (flat @ a).reshape(whole.shape)
    return (whole.astype(jnp.float32) + scale * added).astype(model.dtype)


def _runs(model: Pangu) -> list[tuple[int, int]]:
    """First layer and length of each run."""
    lengths = [length or 1 for length in model.runs]
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def _matched(model: Pangu, targets: list[str]) -> list[tuple[int, str]]:
    """The matrices that patterns mean, as (block, name)."""
    here = [name for name in MATRICES if _has(model.blocks[0], name)]
    for target in targets:
        if not fnmatch.filter(here, target):
            raise ConfigError(
                f"lora.targets: no matrix matches {strict.shorten(target)}"
                f"{strict.suggest(target, here)} (matrices: {', '.join(here)})"
            )
    wanted = [n for n in here if not targets or any(fnmatch.fnmatchcase(n, t) for t in targets)]
    return [(block, name) for block in range(len(model.blocks)) for name in wanted]


def _pairs(leaves: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Of every adapter: the leaf it stands beside, its block and its name there."""
    for name in leaves:
        if name.endswith(f".{A}"):
            leaf = name.removesuffix(f".{A}")
            _, block, own = leaf.split(".", 2)
            yield leaf, int(block), own


def _has(block: Any, name: str) -> bool:
    *path, last = name.split(".")
    module = functools.reduce(lambda held, part: getattr(held, part, None), path, block)
    return hasattr(module, last)


def _matrix(model: Any, block: int, name: str) -> Any:
    """The array, or quantised matrix, of that name, or whatever stands for it."""
    return functools.reduce(getattr, name.split("."), model.blocks[block]).get_value()


def _each(model: Pangu, name: str) -> int:
    """Axes in front of those of one matrix's: layers, and experts."""
    return 1 + (model.config.moge is not None and name in ("mlp.gate_up", "mlp.down"))


def _own_shape(model: Pangu, block: int, name: str) -> tuple[int, ...]:
    """The matrix's shape without what the layout adds."""
    shapes, leaf = build.own_shapes(model), f"blocks.{block}.{name}"
    if leaf in shapes:
        return shapes[leaf]
    *out, width = shapes[f"{leaf}.numbers"]
    return (*out, width * (2 if _matrix(model, block, name).scheme.numbers == "int4" else 1))


def _spec(model: Pangu, block: int, name: str, part: str) -> PartitionSpec:
    held, fsdp = _matrix(model.specs, block, name), model.layout.of("fsdp")
    spec: Any = held.numbers if isinstance(held, Weight) else held
    *out, last = (None if fsdp and axes in (fsdp, fsdp[0]) else axes for axes in spec)
    each = _each(model, name)
    return PartitionSpec(*out, None) if part == B else PartitionSpec(*out[:each], None, last)
