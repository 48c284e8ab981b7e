"""The checkpoints of a run: Orbax, written whole or not at all beside the training, verified when
they are read.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pangu_jax.checkpoint import native
from pangu_jax.checkpoint.native import FAILURES, STATE, SUMS
from pangu_jax.errors import CheckpointError
from train.step import Leaves, State

Shapes = dict[str, Any]


class Checkpoints:
    """The states in OUTPUT/checkpoints. Frozen weights are not in them: they never change."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """keep: how many of the newest stay"""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,  # what a save that was interrupted left
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=(STATE, SUMS)
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Keeps the state under its step. It is copied when this returns, and on the disk when
        `wait` does.

        Raises CheckpointError where this or the one before cannot be written.
        """
        step = int(state.step)
        changing = _changing(state)
        sums = native.numbers(changing)
        items = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(changing), SUMS: ocp.args.JsonSave(sums)}
        )
        try:
            self._manager.save(step, args=items)
        except FAILURES as error:
            raise self._unwritten(step, error) from None

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises CheckpointError as `save`."""
        try:
            self._manager.wait_until_finished()
        except FAILURES as error:
            raise self._unwritten(None, error) from None

    def restore(self, shapes: Shapes, frozen: Leaves) -> State:
        """The newest state, with frozen weights that are not in it.

        Raises CheckpointError, also where its numbers are not those that were saved.
        """
        step = self.latest
        items = ocp.args.Composite(
            **{STATE: ocp.args.StandardRestore(shapes), SUMS: ocp.args.JsonRestore()}
        )
        try:
            found = self._manager.restore(step, args=items)
            state, sums = found[STATE], dict(found[SUMS])
        except FAILURES as error:
            raise self._unreadable(step, _reason(error)) from None
        for name, value in native.numbers(state).items():
            if sums.get(name) != value:
                raise self._unreadable(step, f"the numbers of {name} are damaged")
        return State(frozen=frozen, **state)

    def close(self) -> None:
        """Ends the manager's threads, when they have done their work."""
        self._manager.close()

    def _unwritten(self, step: int | None, error: BaseException) -> CheckpointError:
        place = self._folder if step is None else self._folder / str(step)
        return CheckpointError(
            f"{place}: cannot be written ({_reason(error)}); the same command goes on from the "
            "checkpoint before"
        )

    def _unreadable(self, step: int | None, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder / str(step)}: not a checkpoint of this run ({reason}); remove it to go "
            "on from the one before"
        )


def shapes(state: State) -> Shapes:
    """What `restore` needs to know of a state of the same run: no arrays, so that they can go."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        _changing(state),
    )


def _changing(state: State) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "trainable": state.trainable,
        "optimizer": state.optimizer,
        "ema": state.ema,
    }


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
