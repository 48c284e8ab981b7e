"""Quantising a folder without ever holding a model: one tensor at a time, layer by layer.

for shard in shards(config, recipe, ...):      where tensors come from, and go, is the caller's
quantise(source, target, recipe, ...)          from a folder to a folder; goes on where it stopped
"""

import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pangu_jax import strict
from pangu_jax.checkpoint import description, hf, hf_config, names, quantised, safetensors, save
from pangu_jax.checkpoint.folder import INDEX, Folder
from pangu_jax.checkpoint.names import Part
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.quant import weight as weights

MANIFEST = "quantising.json"

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The tensors of a layer, or of what is before or behind all layers: `tensors()` reads and
    rounds them one at a time, in the order of `specs`.
    """

    specs: list[safetensors.Spec]
    tensors: Callable[[], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a float tensor will be: specs, and their numbers once it is read."""

    source: str
    specs: list[safetensors.Spec]
    become: Callable[[np.ndarray], Iterator[np.ndarray]]


def shards(config: ModelConfig, said: Description, dtype: np.dtype, read: Read) -> Iterator[Shard]:
    """The quantised model's tensors, as `said` names them, from those of a float one.

    dtype: of what stays float
    read: a float tensor by its published name
    """
    keyed = ((_shard_of(leaf), leaf, parts) for leaf, parts in names.leaves(config))
    for _, group in itertools.groupby(keyed, key=lambda item: item[0]):
        plans = [_plan(part, leaf, said, dtype) for _, leaf, parts in group for part in parts]
        specs = [spec for plan in plans for spec in plan.specs]
        yield Shard(specs, lambda plans=plans: _tensors(plans, read))


def _shard_of(leaf: str) -> str:
    return ".".join(leaf.split(".")[:2]) if leaf.startswith("blocks.") else leaf.split(".")[0]


def _plan(part: Part, leaf: str, said: Description, dtype: np.dtype) -> Plan:
    scheme = said.recipe.scheme(leaf)
    if scheme is None:
        spec = safetensors.Spec(part.name, dtype, part.shape)
        return Plan(part.name, [spec], lambda floats: iter([_as_stored(part.name, floats, dtype)]))
    made = quantised.tensors(part, scheme)
    specs = [
        safetensors.Spec(one.name, quantised.stored(one, dtype), one.shape) for one in made.values()
    ]
    fixed = []
    for constant in quantised.constants(part, scheme, said.format):
        assert constant.expected is not None
        fixed.append(constant.expected)
        shape = constant.expected.shape
        specs.append(safetensors.Spec(constant.name, constant.expected.dtype, shape))

    def rounded(floats: np.ndarray) -> Iterator[np.ndarray]:
        held = _quantise(jnp.asarray(floats), scheme)
        if not np.isfinite(held.scale).all():
            raise CheckpointError(f"tensor {part.name} holds NaN or Inf: it cannot be quantised")
        for kind, one in made.items():
            numbers = np.asarray(getattr(held, kind))
            if one.kind == "packed":
                numbers = np.ascontiguousarray(numbers).view(np.int32)
            yield numbers.reshape(one.shape)
        yield from fixed

    return Plan(part.name, specs, rounded)


def _as_stored(name: str, floats: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what does not fit is found below
        stored = floats.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(stored).all():
        raise CheckpointError(f"tensor {name} does not fit float16")
    return stored


_quantise = jax.jit(weights.quantize, static_argnums=1)


def _tensors(plans: list[Plan], read: Read) -> Iterator[np.ndarray]:
    for plan in plans:
        yield from plan.become(read(plan.source))


def quantise(
    source: Path, target: Path, said: Description, progress: hf.Progress | None = None
) -> None:
    """A quantised folder from a float one, in the memory of one tensor and its result.

    target: must not exist, or be empty. It appears when it is complete; until then its shards are
        a hidden folder beside it, and the same call again goes on there.
    Raises CheckpointError.
    """
    config, raw = hf.read_config(source)
    tensors = Folder(source)
    if hf.read_description(tensors, raw, config) is not None:
        raise CheckpointError(f"{source}: is quantised already; take the float model")
    parts = hf.check_tensors(config, tensors, None)
    save.words_for(said, config)  # before anything is written
    target = Path(os.path.realpath(target))  # a link to an empty folder stays a link
    partial = target.parent / f".{target.name}.quantising"
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(f"{target}: already exists; write to a new or empty folder")
        partial.mkdir(parents=True, exist_ok=True)
        _check_manifest(partial, tensors, said)
        total = sum(tensors.read(p.name).nbytes for every in parts.values() for p in every)
        _write_shards(config, tensors, partial, said, progress, total)
        kept = hf_config.remembered(raw)
        written = hf_config.to_hf(config, config.dtype, kept)
        for name in ("config.json", description.FILE):
            (partial / name).unlink(missing_ok=True)
        save.write_description(partial, written, said, config)
        save.write_json(partial / "config.json", written)
        for name, _ in hf.companions(source):
            shutil.copyfile(source / name, partial / name)
        os.replace(partial, target)
        (target / MANIFEST).unlink()  # last: shards without it would be taken for any model's
    except OSError as error:
        name = strict.shorten(str(target), quote=False, limit=300)
        raise CheckpointError(f"{name}: cannot be written ({error.strerror})") from error


def _check_manifest(partial: Path, tensors: Folder, said: Description) -> None:
    """What the shards in a folder were made of and how; written when it is new.

    Raises CheckpointError where it is of something else.
    """
    files = sorted({tensors.file_of(name) for name in tensors.names})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = hashlib.sha256((tensors.path / "config.json").read_bytes()).hexdigest()
    own = {
        "source": hashlib.sha256(repr((facts, config)).encode()).hexdigest(),
        "as": repr(said),
    }
    file = partial / MANIFEST
    if not file.exists():
        save.write_json(file, own)
        return
    try:
        there = strict.read_json_object(file)
    except ConfigError:
        there = {}
    if there != own:
        raise CheckpointError(
            f"{partial}: holds what an interrupted run made of another model or recipe; remove it "
            "to begin anew"
        )


def _write_shards(
    config: ModelConfig,
    tensors: Folder,
    partial: Path,
    said: Description,
    progress: hf.Progress | None,
    total: int,
) -> None:
    dtype, done, where = np.dtype(config.dtype), 0, {}
    size = 0
    every = list(shards(config, said, dtype, tensors.read))
    for i, shard in enumerate(every, 1):
        name = f"model-{i:05d}-of-{len(every):05d}.safetensors"
        if not _is_complete(partial / name, shard.specs):
            being = partial / f"{name}.part"
            being.unlink(missing_ok=True)
            safetensors.write(being, shard.specs, shard.tensors())
            os.replace(being, partial / name)
        where |= {spec.name: name for spec in shard.specs}
        size += sum(spec.nbytes for spec in shard.specs)
        if progress:
            done = round(total * i / len(every))
            progress(done, total)
    (partial / INDEX).unlink(missing_ok=True)
    save.write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _is_complete(file: Path, specs: list[safetensors.Spec]) -> bool:
    """Whether a shard was written before: files get their names when they are whole."""
    if not file.exists():
        return False
    entries = safetensors.File(file).entries
    wanted = {spec.name: (safetensors.NAMES[spec.dtype], spec.shape) for spec in specs}
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == wanted
