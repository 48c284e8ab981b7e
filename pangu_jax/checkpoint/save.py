"""Hugging Face folders out: `save_hf` writes one that the reference implementation loads."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pangu_jax import build, strict
from pangu_jax.checkpoint import description, hf, hf_config, names, quantised, safetensors
from pangu_jax.checkpoint.folder import INDEX, SINGLE
from pangu_jax.checkpoint.quantised import Description, Format
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.model import Pangu
from pangu_jax.origin import Origin
from pangu_jax.parallel import fit
from pangu_jax.quant import leaves


def save_hf(
    model: Pangu,
    path: str | os.PathLike[str],
    *,
    shard_bytes: int = 5_000_000_000,
    quantised_as: Format | None = None,
) -> None:
    """A Hugging Face folder that the reference implementation loads.

    path: the new folder; it must not exist, or be empty. It appears complete or not at all.
    shard_bytes: the most a weight file holds (one larger tensor gets a file of its own)
    quantised_as: how a quantised model is described: "compressed-tensors" (the default where it can
        say everything) or "msmodelslim"

    Bit-equal when the model's dtype is the stored one. Keeps token ids and unknown keys of the
    config.json it was loaded from, copies the tokenizer and generation files `load` saw, writes no
    code. Raises CheckpointError, also for what the published format cannot express.
    """
    target = Path(os.path.realpath(path))  # a link to an empty folder stays a link
    check_expressible(model.config, json.loads(model.origin.config))
    _check_leaves(model)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(f"{target}: already exists; save to a new or empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        _write_folder(model, partial, shard_bytes, _describe(model, quantised_as))
        os.replace(partial, target)
    except OSError as error:
        name = strict.shorten(str(target), quote=False, limit=300)
        raise CheckpointError(f"{name}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something went wrong


def _describe(model: Pangu, how: Format | None) -> Description | None:
    """How a folder of the model will say what is quantised. Raises CheckpointError."""
    if not model.recipe.runs and not model.recipe.cache_scales:
        return None
    return Description(model.recipe, description.words(model.recipe, how))


def _write_folder(model: Pangu, folder: Path, shard_bytes: int, said: Description | None) -> None:
    dtype = np.dtype(model.dtype)
    original = json.loads(model.origin.config)
    config = hf_config.to_hf(model.config, dtype.name, original)
    write_description(folder, config, said, model.config)
    _write_weights(model, folder, dtype, shard_bytes, said)
    write_json(folder / "config.json", config)
    _copy_companions(model.origin, folder)


def words_for(said: Description, config: ModelConfig) -> dict[str, Any]:
    """What a folder will say of itself: a field of config.json, or a file of its own.

    Raises CheckpointError for a recipe that the format has no words for.
    """
    write = (
        description.compressed if said.format == "compressed-tensors" else description.msmodelslim
    )
    try:
        return write(said.recipe, config)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def write_description(
    folder: Path, raw: dict[str, Any], said: Description | None, config: ModelConfig
) -> None:
    """Says what is quantised, in `raw` (a config.json to be written) or a file of its own.

    Raises CheckpointError for what the format cannot say.
    """
    raw.pop(description.FIELD, None)
    if said is None:
        return
    words = words_for(said, config)
    if said.format == "compressed-tensors":
        raw[description.FIELD] = words
    else:
        write_json(folder / description.FILE, words)


def _check_leaves(model: Pangu) -> None:
    """Every leaf must be data, and of one float dtype: the config has a single torch_dtype."""
    for name, leaf in build.named_leaves(model):
        if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, Tracer):
            raise CheckpointError(f"{name} holds no data: only a model with weights can be saved")
        if leaves.is_fixed(name):
            continue
        if leaf.dtype.name not in hf.FLOATS or leaf.dtype != model.dtype:
            raise CheckpointError(
                f"{name} is {leaf.dtype.name}; to be saved a model must be {', '.join(hf.FLOATS)} "
                "throughout"
            )


def check_expressible(config: ModelConfig, said: dict[str, Any]) -> None:
    """Raises CheckpointError for what the published formats have no words for: Pro MoE's class has
    biases and head_dim = hidden / heads, with no config field to say otherwise.

    said: the config.json that the model came from
    """
    if config.moge is None:
        return
    if config.moge.router != "grouped" or config.moge.per_group != 1:
        raise CheckpointError(
            f"the published Pro MoE format cannot express router {config.moge.router!r} with "
            f"{config.moge.per_group} experts per group"
        )
    if not config.attention_bias and not {"bias", "attention_bias"} & said.keys():
        raise CheckpointError("the published Pro MoE format cannot express attention_bias = false")
    if config.head_dim * config.num_heads != config.hidden_size and "head_dim" not in said:
        raise CheckpointError(
            f"the published Pro MoE format cannot express head_dim {config.head_dim} with "
            f"{config.num_heads} heads of a width of {config.hidden_size}"
        )


def _write_weights(
    model: Pangu, folder: Path, dtype: np.dtype, shard_bytes: int, said: Description | None
) -> None:
    located, shapes = _locate(model), _layer_shapes(model)
    shards: list[list[tuple[safetensors.Spec, str, names.Part | np.ndarray]]] = [[]]
    size = 0
    for leaf, parts in quantised.leaves(model.config, said):
        for part in (*parts, *_constants(model.config, leaf, said)):
            if isinstance(part, quantised.Constant):
                assert part.expected is not None
                held: names.Part | np.ndarray = part.expected
                spec = safetensors.Spec(part.name, held.dtype, held.shape)
            else:
                held = part
                spec = safetensors.Spec(part.name, quantised.stored(part, dtype), part.shape)
            if size and size + spec.nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((spec, leaf, held))
            size += spec.nbytes
    files = [
        SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        tensors = _slices(located, shapes, shard)
        safetensors.write(folder / file, [spec for spec, _, _ in shard], tensors)
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec, _, _ in shard)
        where = {
            spec.name: file
            for file, shard in zip(files, shards, strict=True)
            for spec, _, _ in shard
        }
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _constants(
    config: ModelConfig, leaf: str, said: Description | None
) -> Iterator[quantised.Constant]:
    """What is written behind a quantised leaf's scales, and says nothing new."""
    own, part = leaves.split(leaf)
    scheme = None if said is None or part != "scale" else said.recipe.scheme(own)
    if scheme is None or said is None:
        return
    matrices = next(parts for name, parts in names.leaves(config) if name == own)
    for matrix in matrices:
        for constant in quantised.constants(matrix, scheme, said.format):
            if constant.expected is not None:
                yield constant


def _locate(model: Pangu) -> dict[str, tuple[Array, int | None]]:
    """For each leaf name in separate form, the array that holds it and its index when stacked."""
    located: dict[str, tuple[Array, int | None]] = {}
    for name, leaf in build.named_leaves(model):
        layers = build.layer_names(model, name)
        for i, own in enumerate(layers or [name]):
            located[own] = (leaf, None if layers is None else i)
    return located


def _layer_shapes(model: Pangu) -> dict[str, tuple[int, ...]]:
    """For each leaf name in separate form, its shape in the files."""
    shapes = {}
    for name, shape in build.own_shapes(model).items():
        layers = build.layer_names(model, name)
        shapes |= {name: shape} if layers is None else dict.fromkeys(layers, shape[1:])
    return shapes


def _slices(
    located: dict[str, tuple[Array, int | None]],
    shapes: dict[str, tuple[int, ...]],
    shard: list[tuple[safetensors.Spec, str, names.Part | np.ndarray]],
) -> Iterator[np.ndarray]:
    """The tensors of a shard in order; consecutive parts of one leaf share its transfer from the
    device.
    """
    for leaf, group in itertools.groupby(shard, key=lambda item: item[1]):
        array, layer = located[leaf]
        held = np.asarray(array if layer is None else array[layer])
        host = fit.own_numbers(leaf, held, shapes[leaf])
        for spec, _, part in group:
            if isinstance(part, np.ndarray):
                yield part
                continue
            own = np.ascontiguousarray(host[part.index])
            if part.kind == "packed":
                own = own.view(np.int32)
            yield own.reshape(spec.shape)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A new file with a JSON object, synced to disk."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)  # ASCII: any string round-trips
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _copy_companions(origin: Origin, folder: Path) -> None:
    """The companions as they were when the model was loaded. Raises CheckpointError."""
    for name, digest in origin.companions:
        assert origin.folder is not None
        source = origin.folder / name
        if not source.is_file():
            raise CheckpointError(f"{source}: was there when the model was loaded and is gone")
        content = source.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{source}: has changed since the model was loaded")
        (folder / name).write_bytes(content)
