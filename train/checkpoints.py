"""The checkpoints of a run: Orbax, written whole or not at all, the newest two kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pangu_jax.errors import CheckpointError
from train.step import Leaves, State

KEPT = 2

Shapes = dict[str, Any]

# What Orbax raises for files that are damaged or cannot be written.
FAILURES = (ValueError, KeyError, TypeError, AttributeError, OSError)


class Checkpoints:
    """The states in OUTPUT/checkpoints. Frozen weights are not in them: they never change."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            create=True,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,  # what a save that was interrupted left
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Keeps the state under its step; returns when it is on the disk.

        Raises CheckpointError where it cannot be written.
        """
        step = int(state.step)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_changing(state)))
        except FAILURES as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: cannot be written ({_reason(error)}); the same "
                "command goes on from the checkpoint before"
            ) from None

    def restore(self, shapes: Shapes, frozen: Leaves) -> State:
        """The newest state, with frozen weights that are not in it.

        Raises CheckpointError.
        """
        step = self.latest
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except FAILURES as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: not a checkpoint of this run ({_reason(error)}); "
                "remove it to go on from the one before"
            ) from None
        return State(found["step"], found["trainable"], frozen, found["optimizer"])

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def shapes(state: State) -> Shapes:
    """What `restore` needs to know of a state of the same run: no arrays, so that they can go."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        _changing(state),
    )


def _changing(state: State) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
