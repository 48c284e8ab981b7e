"""What every door of the project does: understand the command line, run the command, and answer
whatever goes wrong in one line.
"""

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from infer import cli
from pangu_jax.errors import PanguError

INTERRUPTED = 130
TERMINATED = 143
DOORS = ("infer.__main__", "train.__main__", "pangu-infer", "pangu-train")
STARTED_AGAIN = "pangu_jax_huge_pages"
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def enter(
    prog: str,
    about: str,
    commands: Mapping[str, type],
    handlers: Mapping[str, str],
    argv: Sequence[str] | None,
) -> int:
    """Runs a command. Exit codes: 0, 1 (a check failed), 2 (bad input: one `error:` line), 130
    (Ctrl-C), 143 (a run of training saved itself after SIGTERM).

    handlers: `module:function` by the name of a command's class; imported only when it is run
    """
    try:
        command = cli.parse(prog, about, commands, sys.argv[1:] if argv is None else argv)
        prepare_jax()
        module, function = handlers[type(command).__name__].split(":")
        return getattr(importlib.import_module(module), function)(command)
    except PanguError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
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


def use_huge_pages() -> None:
    """Starts this program anew where Linux gives huge pages only to those who ask for them.

    On a CPU, XLA takes its temporary memory afresh for every call; in pages of 4 kB its first touch
    takes a quarter of a training step's time (docs/benchmarks.md). The C library can ask for larger
    ones, but reads the wish only when a program starts. Any GLIBC_TUNABLES of the user prevails.
    """
    try:
        offered = "[madvise]" in Path(HUGE_PAGES).read_text(encoding="ascii")
    except OSError:  # not Linux
        return
    if offered and "GLIBC_TUNABLES" not in os.environ and _is_the_whole_program():
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        again = [sys.executable, "-X", STARTED_AGAIN, *sys.orig_argv[1:]]
        os.execve(sys.executable, again, environment)


def _is_the_whole_program() -> bool:
    """Whether this process is one of our doors and nothing else, and has done nothing yet: not a
    script or a notebook that calls one, not a debugger.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    name = spec.name if spec is not None else Path(file or "").stem
    return (
        name in DOORS
        and bool(sys.executable)
        and STARTED_AGAIN not in sys._xoptions
        and "jax" not in sys.modules
        and sys.gettrace() is None
        and threading.active_count() == 1
    )


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a door's `main` as a program of its own, and ends it with its exit code."""
    use_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a line less pretty is better than none
    signal.signal(signal.SIGINT, _interrupt)
    code = main()
    if code in (INTERRUPTED, TERMINATED):
        # XLA may be compiling in a thread that does not survive the interpreter's orderly end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C as Python does it, but not where JAX's garbage collection hook would swallow it."""
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        threading.Timer(0.05, signal.raise_signal, [signum]).start()
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first Ctrl-C calls `stop` and the second raises KeyboardInterrupt."""
    count = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            _interrupt(signum, frame)
            return
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def terminations(stop: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM calls `stop`: what schedulers send before they kill."""
    before = signal.signal(signal.SIGTERM, lambda signum, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(message: str) -> int:
    """One `error:` line, and the exit code of bad input."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
