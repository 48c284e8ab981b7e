"""The one door of training: `pangu-train COMMAND ...`, or `python -m train COMMAND ...`."""

from collections.abc import Sequence
from typing import NoReturn

from infer import door
from train import commands

ABOUT = "Train openPangu models, and what they need: tokenizers and data."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return door.enter("pangu-train", ABOUT, commands.COMMANDS, commands.HANDLERS, argv)


def program() -> NoReturn:
    """The console script."""
    door.leave(main)


if __name__ == "__main__":
    program()
