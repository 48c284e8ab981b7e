"""The checkpoints of a run: Orbax, written whole or not at all, the newest two kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pangu_jax.errors import CheckpointError
from train.step import State

KEPT = 2


class Checkpoints:
    """The states in OUTPUT/checkpoints. Frozen weights are not in them: they never change."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, create=True, enable_async_checkpointing=False
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Keeps the state under its step; returns when it is on the disk."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(_changing(state)))

    def restore(self, like: State) -> State:
        """The newest state; shapes, dtypes and the frozen weights are those of `like`.

        Raises CheckpointError.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _changing(like))
        step = self.latest
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: not a checkpoint of this run "
                f"({str(error).splitlines()[0][:200]}); remove it to go on from the one before"
            ) from None
        return State(found["step"], found["trainable"], like.frozen, found["optimizer"])

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def _changing(state: State) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}
