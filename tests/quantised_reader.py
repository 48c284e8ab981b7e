"""Quantised folders by NumPy and the safetensors library alone: their floats, and their products.

Shares no code with pangu_jax. Reads compressed-tensors (int-quantized, float-quantized and
pack-quantized) and msModelSlim (W8A8_DYNAMIC, and W8A8 with its fixed activations); writes folders
of the last kind, which come from calibration and which `pangu-infer quantize` does not make.
"""

import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import safetensors

from tests import reference

Tensors = dict[str, np.ndarray]

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What a folder says of one product with a matrix [out, in].

    numbers, scale: float64 [out, in] and [out, groups]; numbers * scale are the floats
    inputs: what becomes of activations: "float" as they are, "int8" or "fp8" per token, or "static"
    fixed: input_scale, input_offset, deq_scale [out] and quant_bias [out] of a static product
    """

    numbers: np.ndarray
    scale: np.ndarray
    inputs: str
    fixed: tuple[np.ndarray, ...] = ()

    def floats(self) -> np.ndarray:
        """The float weights."""
        out, groups = self.scale.shape
        grouped = self.numbers.reshape(out, groups, -1) * self.scale[..., None]
        return grouped.reshape(self.numbers.shape)

    def bias(self) -> np.ndarray:
        """The float bias that an integer one holds, beside the offset's part."""
        _, offset, deq_scale, quant_bias = self.fixed
        return (quant_bias + offset * self.numbers.sum(1)) * deq_scale

    def product(self, x: np.ndarray) -> np.ndarray:
        """x [T, in] times the matrix, as the folder's engine does it; static ones with the bias."""
        if self.inputs == "float":
            return x @ self.floats().T
        if self.inputs == "static":
            scale, offset, deq_scale, quant_bias = self.fixed
            rounded = np.clip(np.rint(x / scale) + offset, -128, 127)
            return (rounded @ self.numbers.T + quant_bias) * deq_scale
        numbers, scale = round_rows(x.astype(np.float32), self.inputs)
        return numbers.astype(np.float64) @ self.numbers.T * scale * self.scale[:, 0]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder's config.json, its tensors as stored, and its quantised matrices by module."""

    raw: dict[str, Any]
    tensors: Tensors
    matrices: dict[str, Matrix]

    def floats(self) -> Tensors:
        """The float model that the folder stands for, by published tensor name."""
        found = {n: t for n, t in self.tensors.items() if t.dtype.kind == "f" or _is_bf16(t)}
        for module, matrix in self.matrices.items():
            found = {n: t for n, t in found.items() if n.rpartition(".")[0] != module or _bias(n)}
            found[f"{module}.weight"] = matrix.floats()
            if matrix.inputs == "static":
                found[f"{module}.bias"] = matrix.bias()
        return found

    def logits(self, tokens: list[int], cached: bool = False) -> np.ndarray:
        """[T, V] in float64, with activations rounded as the folder says.

        cached: keys and values are rounded too, by the folder's scales of an int8 cache
        """
        plain, rotate, last = reference._linear, reference._rotate, [""]

        def through_cache(y: np.ndarray) -> np.ndarray:
            scale = self.tensors[f"{last[0]}.kv_cache_scale"].reshape(y.shape[1:])
            return np.clip(np.rint(y / scale), -127, 127) * scale

        def linear(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
            matrix, last[0] = self.matrices.get(name), name
            if matrix is None:
                return plain(w, name, x)
            y = matrix.product(x)
            if f"{name}.bias" in w and matrix.inputs != "static":
                y = y + w[f"{name}.bias"]
            return through_cache(y) if cached and name.endswith("v_proj") else y

        def rotated(x: np.ndarray, theta: float) -> np.ndarray:
            y = rotate(x, theta)
            return through_cache(y) if cached and last[0].endswith("k_proj") else y

        with mock.patch.multiple(reference, _linear=linear, _rotate=rotated):
            return reference.forward(self.floats(), self.raw, tokens)["logits"]


def _is_bf16(tensor: np.ndarray) -> bool:
    return tensor.dtype == ml_dtypes.bfloat16


def _bias(name: str) -> bool:
    return name.endswith(".bias")


def stored(folder: Path) -> Tensors:
    """Every tensor of a folder; those that NumPy has no name for as well."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert name not in found
            flat = np.frombuffer(bytes(entry["data"]), DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return dict(sorted(found.items()))


def write(file: Path, tensors: Tensors) -> None:
    """A safetensors file, also of FP8."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        where = [at, at + tensor.nbytes]
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=tensor.shape, data_offsets=where)
        at += tensor.nbytes
    text = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    file.unlink(missing_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(folder: Path) -> Folder:
    """A quantised folder, in whichever of the two formats."""
    raw, tensors = json.loads((folder / "config.json").read_text()), stored(folder)
    file = folder / "quant_model_description.json"
    if "quantization_config" in raw:
        matrices = _compressed(raw["quantization_config"], tensors)
    else:
        matrices = _msmodelslim(json.loads(file.read_text()), tensors)
    return Folder(raw, tensors, matrices)


def _compressed(said: dict[str, Any], tensors: Tensors) -> dict[str, Matrix]:
    assert said["quant_method"] == "compressed-tensors"
    found = {}
    suffixes = (".weight", ".weight_packed")
    for module in sorted({n.rpartition(".")[0] for n in tensors if n.endswith(suffixes)}):
        group = _group(said, module)
        if group is None or module.endswith(("norm", "embed_tokens")):
            continue
        weights, inputs = group["weights"], group["input_activations"]
        assert weights["symmetric"]
        kind = {"int": "int8", "float": "fp8"}[weights["type"]]
        if inputs is not None:
            assert (inputs["dynamic"], inputs["strategy"]) == (True, "token")
        how = "float" if inputs is None else kind
        scale = tensors[f"{module}.weight_scale"].astype(np.float64)
        if weights["num_bits"] == 4:
            numbers = unpacked(tensors[f"{module}.weight_packed"])
            numbers = numbers[:, : tensors[f"{module}.weight_shape"][1]]
            assert scale.shape[1] * weights["group_size"] == numbers.shape[1]
        else:
            numbers = tensors[f"{module}.weight"].astype(np.float64)
        assert len(numbers) == len(scale)
        found[module] = Matrix(numbers, scale, how)
    return found


def _group(said: dict[str, Any], module: str) -> dict[str, Any] | None:
    """The group of a linear module as compressed-tensors finds it: the library puts exact names
    before patterns, and those before classes.
    """
    pairs = [(t, group) for group in said["config_groups"].values() for t in group["targets"]]
    named = lambda target: target == module
    fits = lambda target: target.startswith("re:") and re.match(target[3:], module) is not None
    linear = lambda target: target == "Linear"
    if any(test(item) for item in said["ignore"] for test in (named, fits, linear)):
        return None
    for test in (named, fits, linear):
        for target, group in pairs:
            if test(target):
                return group
    return None


def unpacked(packed: np.ndarray) -> np.ndarray:
    """[out, in] from int32 [out, in / 8]: number plus 8 of input 8 j + i in bits 4 i of word j."""
    words = packed.view(np.uint32)
    parts = [(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1).astype(np.float64) - 8


def _msmodelslim(said: dict[str, str], tensors: Tensors) -> dict[str, Matrix]:
    found = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last != "weight" or said[name] == "FLOAT":
            continue
        part = lambda which, module=module: tensors[f"{module}.{which}"].astype(np.float64)
        if said[name] == "W8A8_DYNAMIC":
            assert not part("weight_offset").any()
            found[module] = Matrix(part("weight"), part("weight_scale"), "int8")
            continue
        assert said[name] == "W8A8"
        fixed = tuple(part(w) for w in ("input_scale", "input_offset", "deq_scale", "quant_bias"))
        scale = (part("deq_scale") / part("input_scale"))[:, None]
        found[module] = Matrix(part("weight"), scale, "static", fixed)
    return found


def round_rows(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and a float32 scale per row of float32, rounded to nearest.

    Divided as XLA divides: by multiplying with the rounded reciprocal.
    """
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / LARGEST[kind])
    ratio = x * (np.float32(1) / np.where(scale > 0, scale, np.float32(1)))
    if kind == "fp8":
        return np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale
    return np.clip(np.rint(ratio), -LARGEST[kind], LARGEST[kind]).astype(np.int8), scale


def rounded(floats: np.ndarray, kind: str, group: int | None = None) -> tuple[np.ndarray, ...]:
    """A float matrix [out, in] in numbers and their scales [out, groups]."""
    out, width = floats.shape
    grouped = floats.astype(np.float32).reshape(out, -1, group or width)
    numbers, scale = round_rows(grouped, kind)
    return numbers.reshape(out, width), scale[..., 0]


def write_static(folder: Path, raw: dict[str, Any], floats: Tensors, tokens: list[int]) -> Tensors:
    """An msModelSlim folder W8A8 with C8, calibrated on the tokens; returns what was stored.

    Every offset is far from zero, and the float biases beside the integer ones are wrong.
    """
    seen: Tensors = {}
    plain = reference._linear

    def linear(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
        seen[name], seen[f"{name}.y"] = x, plain(w, name, x)
        return seen[f"{name}.y"]

    with mock.patch.object(reference, "_linear", linear):
        reference.forward(floats, raw, tokens)
    tensors, said = dict(floats), dict.fromkeys(floats, "FLOAT")
    for module in [name.removesuffix(".y") for name in seen if name.endswith(".y")]:
        made = static(floats[f"{module}.weight"], floats.get(f"{module}.bias"), seen[module])
        if f"{module}.bias" in floats:
            made["bias"] = np.full_like(floats[f"{module}.bias"], 7)
        if module.endswith(("k_proj", "v_proj")):
            tensors[f"{module}.kv_cache_scale"] = cache_scale(seen[f"{module}.y"], raw)
            tensors[f"{module}.kv_cache_offset"] = np.full(len(made["weight"]), 3, np.float32)
        tensors |= {f"{module}.{part}": tensor for part, tensor in made.items()}
        said |= {f"{module}.{part}": "W8A8" for part in made if part != "bias"}
    said |= {"model_quant_type": "W8A8", "kv_quant_type": "C8"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "quant_model_description.json").write_text(json.dumps(said))
    write(folder / "model.safetensors", tensors)
    return tensors


def static(floats: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> Tensors:
    """A matrix in int8 with activations like x [T, in] in int8 of a fixed scale and offset.

    x ~ (n - offset) * input_scale, so W x + b ~ deq_scale * (numbers n + quant_bias).
    """
    numbers, scale = rounded(floats, "int8")
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    input_scale = np.float32((high - low) / 200)
    offset = np.int8(np.clip(np.rint(-125 - low / input_scale), -128, 127))
    deq_scale = (scale[:, 0] * input_scale).astype(np.float32)
    whole = -int(offset) * numbers.astype(np.int64).sum(1)
    if bias is not None:
        whole = whole + np.rint(bias / deq_scale.astype(np.float64)).astype(np.int64)
    return {
        "weight": numbers,
        "weight_scale": scale,
        "weight_offset": np.zeros_like(scale),
        "deq_scale": deq_scale,
        "quant_bias": whole.astype(np.int32),
        "input_scale": np.array([input_scale]),
        "input_offset": np.array([offset]),
    }


def cache_scale(y: np.ndarray, raw: dict[str, Any]) -> np.ndarray:
    """Scales [K * H] of keys or values [T, K * H] in int8, large enough for any rotation."""
    heads = raw["num_key_value_heads"]
    largest = np.abs(y).max(0).reshape(heads, 2, -1).max(1, keepdims=True)
    return (np.sqrt(2) * np.repeat(largest, 2, 1) / 127).reshape(-1).astype(np.float32)
