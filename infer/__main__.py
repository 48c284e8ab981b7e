"""The one door of inference: `pangu-infer COMMAND ...`, or `python -m infer COMMAND ...`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from infer import commands, door

ABOUT = "Run openPangu models: Embedded 1B/7B and Pro MoE 72B, on CPU, GPU or TPU."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    return door.enter("pangu-infer", ABOUT, commands.COMMANDS, commands.HANDLERS, argv, prepare_jax)


def prepare_jax() -> None:
    """Settings JAX reads when it is imported; what the user has set stays.

    Compiled programs are kept on disk, so that a second start does not compile again. A GPU's
    memory is taken to 95% instead of 75%: large weights and their cache must share one card.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not home.startswith("~"):  # an account without a home gets no cache
        cache = str(Path(home) / "pangu_jax" / "compiled")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def program() -> NoReturn:
    """The console script."""
    door.leave(main)


if __name__ == "__main__":
    program()
