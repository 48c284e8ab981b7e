"""Quantised folders: which tensors stand for a quantised matrix, and the files that say so.

Two descriptions are read and written. compressed-tensors, which other engines load, says in
config.json (`quantization_config`) which modules are held how. msModelSlim's, which Huawei's own
stack loads, lists every tensor in quant_model_description.json; its layout is known from the code
that reads it, not from a published folder (vllm-ascend at b308a7a).

    a matrix X            compressed-tensors                    msModelSlim
    int8                  X.weight, X.weight_scale [out, 1]     the same, X.weight_offset (zeros)
    int8, static          not read                              X.weight, X.deq_scale [out],
                                                                X.quant_bias [out], X.input_scale,
                                                                X.input_offset [1]
    fp8                   X.weight, X.weight_scale [out, 1]
    int4                  X.weight_packed int32 [out, in/8], X.weight_scale [out, in/group],
                          X.weight_shape
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import ml_dtypes
import numpy as np

from pangu_jax.checkpoint import names
from pangu_jax.checkpoint.names import Kind, Part
from pangu_jax.config import ModelConfig
from pangu_jax.quant.scheme import Recipe, Scheme

Format = Literal["compressed-tensors", "msmodelslim"]

FLOAT_DTYPES = ("F32", "BF16", "F16")
DTYPES: dict[Kind, tuple[str, ...]] = {
    "float": FLOAT_DTYPES,
    "scale": FLOAT_DTYPES,
    "int8": ("I8",),
    "fp8": ("F8_E4M3",),
    "int32": ("I32",),
    "packed": ("I32",),
    "int64": ("I64",),
}


@dataclasses.dataclass(frozen=True)
class Description:
    """How a folder's matrices are held, and in whose words it says so."""

    recipe: Recipe
    format: Format


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor that says nothing new: written with these numbers, and checked if it is there.

    expected: None is anything
    """

    name: str
    expected: np.ndarray | None


def leaves(config: ModelConfig, said: Description | None) -> Iterator[names.Leaf]:
    """`names.leaves` with the parts of each quantised leaf in the place of its own.

    A bias beside static activations has no tensor: it is part of the integer one.
    """
    recipe = Recipe() if said is None else said.recipe
    for leaf, parts in names.leaves(config):
        scheme = recipe.scheme(leaf)
        if scheme is not None:
            yield from _quantised(leaf, list(parts), scheme)
        elif static_bias(leaf, recipe):
            yield leaf, iter(())
        else:
            yield leaf, parts
        if recipe.cache_scales and leaf.endswith("attention.out"):
            yield leaf.removesuffix("out") + "cache_scale", _cache_scales(config, leaf)


def static_bias(leaf: str, recipe: Recipe) -> bool:
    """Whether a leaf is the float bias of a product with static activations."""
    scheme = recipe.scheme(leaf.removesuffix("_bias"))
    return leaf.endswith("_bias") and scheme is not None and scheme.activations == "static"


def _quantised(leaf: str, parts: list[Part], scheme: Scheme) -> Iterator[names.Leaf]:
    each = [(part, tensors(part, scheme)) for part in parts]
    for kind in each[0][1]:
        yield f"{leaf}.{kind}", iter([found[kind] for _, found in each])


def tensors(part: Part, scheme: Scheme) -> dict[str, Part]:
    """The tensors that stand for a matrix `X.weight` [out, in], by the part of the leaf."""
    module, (out, width) = part.name.removesuffix(".weight"), part.shape
    one = lambda name, shape, kind: Part(f"{module}.{name}", shape, part.index, kind)
    # Of a fused leaf there is one, but for experts, which are the first axis of theirs.
    at = part.index[:1] if ".experts." in module else ()
    shared = lambda name, kind: Part(f"{module}.{name}", (1,), at, kind, True)
    if scheme.numbers == "int4":
        assert scheme.group is not None
        return {
            "numbers": one("weight_packed", (out, width // 8), "packed"),
            "scale": one("weight_scale", (out, width // scheme.group), "scale"),
        }
    if scheme.activations != "static":
        kind = "int8" if scheme.numbers == "int8" else "fp8"
        numbers = one("weight", (out, width), kind)
        return {"numbers": numbers, "scale": one("weight_scale", (out, 1), "scale")}
    return {
        "numbers": one("weight", (out, width), "int8"),
        "scale": one("deq_scale", (out,), "scale"),
        "input_scale": shared("input_scale", "scale"),
        "offset": shared("input_offset", "int8"),
        "bias": one("quant_bias", (out,), "int32"),
    }


def constants(part: Part, scheme: Scheme, how: Format) -> Iterator[Constant]:
    """What else belongs to a quantised matrix `X.weight`."""
    module, out = part.name.removesuffix(".weight"), part.shape[0]
    if scheme.numbers == "int4":
        yield Constant(f"{module}.weight_shape", np.array(part.shape, np.int64))
    if how == "msmodelslim":
        yield Constant(f"{module}.weight_offset", np.zeros((out, 1), np.float32))
    if scheme.activations == "static":
        yield Constant(f"{module}.weight_scale", None)


def _cache_scales(config: ModelConfig, leaf: str) -> Iterator[Part]:
    prefix = f"model.layers.{leaf.split('.')[1]}.self_attn."
    width = config.num_kv_heads * config.head_dim
    for i, name in enumerate(("k_proj", "v_proj")):
        yield Part(f"{prefix}{name}.kv_cache_scale", (width,), (slice(None), i), "scale")


def stored(part: Part, floats: np.dtype) -> np.dtype:
    """The dtype in which a tensor is written; `floats` is the model's, scales are float32."""
    own: dict[Kind, np.dtype] = {
        "float": floats,
        "scale": np.dtype(np.float32),
        "int8": np.dtype(np.int8),
        "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
        "int32": np.dtype(np.int32),
        "packed": np.dtype(np.int32),
        "int64": np.dtype(np.int64),
    }
    return own[part.kind]
