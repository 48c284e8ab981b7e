"""The one door of training: `pangu-train`. It opens with the first training loop."""

import sys
from collections.abc import Sequence

from infer import cli
from pangu_jax.errors import PanguError

ABOUT = "Train openPangu models. This version has no training commands yet."
COMMANDS: dict[str, type] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints help; any command is refused with one `error:` line and exit code 2."""
    try:
        cli.parse("pangu-train", ABOUT, COMMANDS, sys.argv[1:] if argv is None else argv)
    except PanguError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
