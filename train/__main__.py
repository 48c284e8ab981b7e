"""The one door of training: `pangu-train COMMAND ...`, or `python -m train COMMAND ...`."""

import sys
from collections.abc import Sequence

from infer import door
from train import commands

ABOUT = "Train what openPangu models need. So far: tokenizers."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return door.enter("pangu-train", ABOUT, commands.COMMANDS, commands.HANDLERS, argv)


if __name__ == "__main__":
    sys.exit(main())
