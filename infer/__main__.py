"""The one door of inference: `pangu-infer COMMAND ...`, or `python -m infer COMMAND ...`."""

from collections.abc import Sequence
from typing import NoReturn

from infer import commands, door

ABOUT = "Run openPangu models: Embedded 1B/7B and Pro MoE 72B, on CPU, GPU or TPU."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return door.enter("pangu-infer", ABOUT, commands.COMMANDS, commands.HANDLERS, argv)


def program() -> NoReturn:
    """The console script."""
    door.leave(main)


if __name__ == "__main__":
    program()
