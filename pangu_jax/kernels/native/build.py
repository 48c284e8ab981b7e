"""Compiles the C++ beside this file into a library that is kept for the next time."""

import concurrent.futures
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax

SOURCE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=off")
SECONDS = 300


class CompileError(Exception):
    """There is no library, and why."""


def library() -> Path:
    """The compiled kernels, from the cache or made now. Raises CompileError."""
    made = target()
    if not made.is_file():
        with _one_at_a_time(made.parent):
            if not made.is_file():
                _compile(find_compiler(), made)
    return made


def target() -> Path:
    """Where the library for this machine is, or would be. Raises CompileError."""
    return cache_folder() / f"kernels-{_key(find_compiler())}.so"


def find_compiler() -> list[str]:
    """The words of the C++ compiler's command: $CXX, else c++, g++ or clang++."""
    named = os.environ.get("CXX")
    try:
        words = shlex.split(named) if named else []
    except ValueError as error:
        raise CompileError(f"CXX={named}: {error}") from error
    for command in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise CompileError(f"no C++ compiler ({named or 'c++, g++ or clang++'}) was found")


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/pangu_jax/kernels, or below ~/.cache.

    It must be this user's alone: what lies there is executed.
    """
    if not hasattr(os, "getuid"):
        raise CompileError("kernels are compiled on Linux and macOS only")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise CompileError("this account has no home to keep compiled kernels in")
    folder = Path(home) / "pangu_jax" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise CompileError(f"{folder}: {error.strerror}") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompileError(f"{folder} can be written to by others")
    return folder


def _key(compiler: list[str]) -> str:
    """Changes whenever the library would: sources, headers, compiler, flags, processor."""
    parts = [*FLAGS, *compiler, version("jaxlib"), platform.machine(), _processor()]
    for program in filter(None, map(shutil.which, compiler)):  # "ccache g++" is two
        stated = os.stat(program)
        parts += [program, str(stated.st_size), str(stated.st_mtime_ns)]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in sorted([*SOURCE.glob("*.cc"), *SOURCE.glob("*.h")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What the processor can do, where Linux says so: a home may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _compile(compiler: list[str], target: Path) -> None:
    tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = [*FLAGS, tuned, "-isystem", jax.ffi.include_dir()]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        sources = sorted(SOURCE.glob("*.cc"))
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [
            [*compiler, *flags, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(_run, commands))
        made = Path(scratch) / "kernels.so"
        _run([*compiler, "-shared", *objects, "-o", str(made)])
        if not made.is_file():
            raise CompileError(f"{compiler[0]} made no library")
        made.replace(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise CompileError(f"{command[0]} failed: {first[:200]}")


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that start together wait for the first of them to compile."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
