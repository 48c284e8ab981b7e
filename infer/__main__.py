"""The one door of inference: `pangu-infer COMMAND ...`, or `python -m infer COMMAND ...`."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from infer import cli, commands
from pangu_jax.errors import PanguError

ABOUT = "Run openPangu models: Embedded 1B/7B and Pro MoE 72B, on CPU, GPU or TPU."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0, 1 (a check failed), 2 (bad input: one `error:` line), 130
    (Ctrl-C).
    """
    try:
        command = cli.parse(
            "pangu-infer", ABOUT, commands.COMMANDS, sys.argv[1:] if argv is None else argv
        )
        prepare_jax()
        module, function = commands.HANDLERS[type(command).__name__].split(":")
        return getattr(importlib.import_module(module), function)(command)
    except PanguError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return complain(f"{error.filename or 'input or output'}: {error.strerror}")
    except MemoryError:
        return complain("out of memory; try another --dtype, or a smaller model or batch")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return complain(f"out of device memory: {str(error).splitlines()[0][:200]}")


def complain(message: str) -> int:
    """One `error:` line, and the exit code of bad input."""
    print(f"error: {message}", file=sys.stderr)
    return 2


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


if __name__ == "__main__":
    sys.exit(main())
