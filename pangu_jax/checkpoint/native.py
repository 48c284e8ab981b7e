"""The folder of a training run as a model: a Hugging Face folder whose weights are Orbax's.

    config.json, tokenizer files    as in any model folder
    frozen/                         leaves that are never trained, once
    checkpoints/STEP/state          what training changes; `trainable` holds leaves by name
    checkpoints/STEP/sums           check sums of all of it
    final/                          when it is finished: a Hugging Face folder

`load` opens it as it opens any folder, at any time: the final model, else the newest checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pangu_jax import build, strict
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.model import Pangu

CHECKPOINTS, FINAL, FROZEN = "checkpoints", "final", "frozen"
STATE, SUMS = "state", "sums"

# What Orbax raises for files that are damaged or cannot be written.
FAILURES = (ValueError, KeyError, TypeError, AttributeError, OSError)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a configuration, and checkpoints for weights."""
    return (folder / CHECKPOINTS).is_dir() and not any(folder.glob("*.safetensors"))


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint. Raises CheckpointError where there is none."""
    steps = [int(each.name) for each in (folder / CHECKPOINTS).iterdir() if each.name.isdecimal()]
    if not steps:
        raise CheckpointError(f"{folder}: the run has no checkpoint yet (see run.save_every)")
    return max(steps)


def home(folder: Path) -> Path:
    """Where the model of a folder lies: of a finished run in `final`, else in itself."""
    final = folder / FINAL
    return final if is_run(folder) and final.is_dir() else folder


def fill(folder: Path, model: Pangu) -> Pangu:
    """An abstract model of stacked layers, as runs have, with the weights of a run's newest
    checkpoint and its frozen ones.

    Raises CheckpointError.
    """
    step = newest(folder)
    state, held = folder / CHECKPOINTS / str(step) / STATE, dict(build.named_leaves(model))
    places, shapes = build.places(model), build.own_shapes(model)
    of_run = lambda names: {
        name: jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=places[name])
        for name in names
    }
    trained = _names(state.parent)
    if unknown := sorted(trained - set(held)):
        raise CheckpointError(f"{state}: {unknown[0]} is no leaf of this model")
    own = _restore(state, {"trainable": of_run(sorted(trained))})["trainable"]
    if rest := sorted(set(held) - trained):
        own |= _restore(folder / FROZEN, of_run(rest))
    whole = build.with_weights(model, {n: x.astype(held[n].dtype) for n, x in own.items()})
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.format), whole, model)


def _names(folder: Path) -> set[str]:
    """The leaves that a checkpoint holds: those whose check sums it has."""
    try:
        sums = strict.read_json_object(folder / SUMS / "metadata")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    found = (re.fullmatch(r"\['trainable'\]\['([\w.]+)'\]", key) for key in sums)
    return {match[1] for match in found if match}


def _restore(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(folder.absolute(), args=arguments)
    except FAILURES as error:
        raise CheckpointError(f"{folder}: not a checkpoint of a run ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
