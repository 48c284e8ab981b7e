"""The folder of a training run as a model: a model folder whose weights are Orbax's.

    model.json                      the model's configuration, in our own words
    tokenizer files                 as in any model folder
    frozen/                         leaves that are never trained, once
    frozen.json                     check sums of these
    base.json                       of adapters: the model beside which they are trained
    checkpoints/STEP/state          what training changes; `trainable` holds leaves by name
    checkpoints/STEP/sums           check sums of all of it
    final/                          when it is finished: a Hugging Face folder

`load` opens it as it opens any folder, at any time: the final model, else the newest checkpoint.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from pangu_jax import build, lora, strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.model import Pangu

CHECKPOINTS, FINAL, FROZEN = "checkpoints", "final", "frozen"
STATE, SUMS, BASE, MODEL = "state", "sums", "base.json", "model.json"
FROZEN_SUMS = "frozen.json"

# What Orbax raises for files that are damaged or cannot be written: also Exception itself.
FAILURES = (Exception,)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return os.path.isfile(folder / MODEL)  # no error for a name that is too long


def write_config(folder: Path, model: Pangu) -> None:
    """Says what model a run's folder is of. Raises OSError."""
    said = {"config": dataclasses.asdict(model.config), "published": model.origin.config}
    _write(folder / MODEL, json.dumps(said, indent=2))


def write_frozen(folder: Path, leaves: Mapping[str, Array]) -> None:
    """Keeps the leaves that a run never trains, if there are any and it does not have them yet.
    Raises OSError.
    """
    if not leaves or (folder / FROZEN_SUMS).exists():
        return
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        arguments = ocp.args.StandardSave(dict(leaves))
        writer.save((folder / FROZEN).absolute(), args=arguments, force=True)
    _write(folder / FROZEN_SUMS, json.dumps(numbers(dict(leaves))))


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration, and the config.json it once came from. Raises CheckpointError."""
    file = folder / MODEL
    try:
        said = strict.build(Said, strict.read_json_object(file), str(file))
        return said.config, strict.parse_json_object(said.published, str(file))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint. Raises CheckpointError where there is none."""
    steps = [int(each.name) for each in (folder / CHECKPOINTS).glob("*") if each.name.isdecimal()]
    if not steps:
        raise CheckpointError(f"{folder}: the run has no checkpoint yet (see run.save_every)")
    return max(steps)


def home(folder: Path) -> Path:
    """Where the model of a folder lies: of a finished run in `final`, else in itself."""
    final = folder / FINAL
    return final if is_run(folder) and final.is_dir() else folder


def published(folder: Path) -> Path:
    """Where the Hugging Face folder of a folder lies. Raises CheckpointError for a run that is not
    finished, whose model only `load` reads.
    """
    found = home(folder)
    if is_run(found):
        raise CheckpointError(f"{folder}: the run is not finished; this needs its {FINAL} folder")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files that differ where a folder's weights do; of a run the check sums of its newest
    checkpoint. Raises CheckpointError.
    """
    if is_run(folder):
        return [folder / CHECKPOINTS / str(newest(folder)) / SUMS / "metadata"]
    return sorted(folder.glob("*.safetensors"))


@dataclasses.dataclass(frozen=True)
class Said:
    """What model.json holds."""

    config: ModelConfig
    published: str


@dataclasses.dataclass(frozen=True)
class Base:
    """What the adapters of a run stand beside: the model of a folder, in few bits where `quantize`
    names a recipe.
    """

    path: str
    rank: int
    scale: float
    targets: tuple[str, ...] = ()
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, not {self.rank}")


def load(folder: Path, abstract: Callable[[], Pangu], load_base: Callable[[str], Pangu]) -> Pangu:
    """The model of a run's newest checkpoint.

    abstract: the model of its configuration, in stacked form
    load_base: the model of another folder, in stacked form

    Raises CheckpointError.
    """
    state = folder / CHECKPOINTS / str(newest(folder)) / STATE
    told = _told(state.parent)
    trained = _names(told)
    if not (folder / BASE).exists():
        return _fill(folder, state, told, abstract())
    try:
        base = strict.build(Base, strict.read_json_object(folder / BASE), str(folder / BASE))
        if os.path.isfile(home(Path(base.path)) / BASE):
            raise ConfigError("path is a run of adapters that is not finished")
        model = load_base(base.path)
        if base.quantize is not None:
            model = build.quantize(model, base.quantize)
        like = jax.eval_shape(lambda: lora.init(model, base.rank, base.targets, jax.random.key(0)))
    except ConfigError as error:
        said = str(error) if str(folder / BASE) in str(error) else f"{folder / BASE}: {error}"
        raise CheckpointError(said) from None
    if set(like) != trained or _shapes(state) != {n: leaf.shape for n, leaf in like.items()}:
        raise CheckpointError(f"{state}: not the adapters that {folder / BASE} speaks of")
    places = lora.places(model, like)
    wanted = {name: _wanted(leaf.shape, places[name]) for name, leaf in like.items()}
    return lora.merge(model, _trained(state, told, wanted), base.scale)


def _fill(folder: Path, state: Path, told: dict[str, Any], model: Pangu) -> Pangu:
    trained, held = _names(told), dict(build.named_leaves(model))
    places, shapes = build.places(model), build.own_shapes(model)
    of_run = lambda names: {name: _wanted(shapes[name], places[name]) for name in names}
    if unknown := sorted(trained - set(held)):
        raise CheckpointError(f"{state}: {unknown[0]} is no leaf of this model")
    own = _trained(state, told, of_run(sorted(trained)))
    if rest := sorted(set(held) - trained):
        own |= _frozen(folder, of_run(rest))
    whole = build.with_weights(model, {n: x.astype(held[n].dtype) for n, x in own.items()})
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.format), whole, model)


def _wanted(shape: tuple[int, ...], place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


def _told(folder: Path) -> dict[str, Any]:
    """A checkpoint's check sums."""
    return _object(folder / SUMS / "metadata")


def _object(file: Path) -> dict[str, Any]:
    try:
        return strict.read_json_object(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _names(told: dict[str, Any]) -> set[str]:
    """The leaves that a checkpoint holds: those whose check sums it has."""
    found = (re.fullmatch(r"\['trainable'\]\['([\w.]+)'\]", key) for key in told)
    return {match[1] for match in found if match}


def _shapes(state: Path) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's leaves that are trained."""
    try:
        handler: Any = ocp.PyTreeCheckpointHandler()
        held = handler.metadata(state.absolute()).tree["trainable"]
        return {name: tuple(leaf.shape) for name, leaf in held.items()}
    except FAILURES as error:
        raise CheckpointError(f"{state}: not a checkpoint of a run ({_reason(error)})") from None


def _trained(state: Path, told: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Leaves of a checkpoint, with the sums that it tells."""
    found = _restore(state, {"trainable": wanted})
    check(state, found, told)
    return found["trainable"]


def _frozen(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Leaves that the run does not train, with the sums that it tells."""
    found = _restore(folder / FROZEN, wanted)
    check(folder / FROZEN, found, _object(folder / FROZEN_SUMS))
    return found


def check(where: Path, found: Any, told: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the arrays have not the check sums that were told."""
    for name, value in numbers(found).items():
        if told.get(name) != value:
            raise CheckpointError(f"{where}: the numbers of {name} are damaged")


def _restore(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(folder.absolute(), args=arguments)
    except FAILURES as error:
        raise CheckpointError(f"{folder}: not a checkpoint of a run ({_reason(error)})") from None
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if not isinstance(leaf, jax.Array):  # what is not there is handed back as it was asked for
            raise CheckpointError(f"{folder}: {jax.tree_util.keystr(path)} is missing")
    return found


def numbers(changing: Any) -> dict[str, int]:
    """A check sum of every array, by its path."""
    return {name: int(value) for name, value in jax.device_get(sums(changing)).items()}


@jax.jit
def sums(changing: Any) -> dict[str, Array]:
    """A check sum of every array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(changing)
    return {jax.tree_util.keystr(path): _sum(leaf) for path, leaf in leaves}


def _sum(leaf: Array) -> UInt32[Array, ""]:
    """The bits of all numbers, each times an odd number of its own place, modulo 2^32: the same
    however the array is spread over devices (own choice).
    """
    size = leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        own = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place + own * np.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    odd = place * np.uint32(2654435761) * np.uint32(2) + np.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32)


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
