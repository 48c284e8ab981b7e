"""What every door of the project does: understand the command line, run the command, and answer
whatever goes wrong in one line.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from infer import cli
from pangu_jax.errors import PanguError


def enter(
    prog: str,
    about: str,
    commands: Mapping[str, type],
    handlers: Mapping[str, str],
    argv: Sequence[str] | None,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command. Exit codes: 0, 1 (a check failed), 2 (bad input: one `error:` line), 130
    (Ctrl-C).

    handlers: `module:function` by the name of a command's class; imported only when it is run
    prepare: called before that import
    """
    try:
        command = cli.parse(prog, about, commands, sys.argv[1:] if argv is None else argv)
        prepare()
        module, function = handlers[type(command).__name__].split(":")
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
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
