"""Files as commands read and write them: hostile until checked, whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pangu_jax import strict
from pangu_jax.errors import ConfigError, InputError

# One line. A document is shorter; what is longer is no JSON lines (own choice).
MAX_LINE_BYTES = 64 * 2**20

# Bytes at either end of a file that tell it from another of its size.
ENDS = 2**20


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a JSON lines file: its object, or why it has none; neither for an empty one.

    number, end: lines and bytes up to and with it
    """

    where: str
    value: dict[str, Any] | None
    error: InputError | None
    number: int
    end: int


def lines(path: Path, number: int = 0, offset: int = 0) -> Iterator[Line]:
    """The lines of a file from a place on. Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            offset += len(data)
            where, value, error = f"{path}, line {number}", None, None
            try:
                if len(data) > MAX_LINE_BYTES:
                    raise InputError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
                value = _object(data, where)
            except InputError as found:
                error = found
            while len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):  # its rest
                data = file.readline(MAX_LINE_BYTES + 1)
                offset += len(data)
            yield Line(where, value, error, number, offset)


def _object(data: bytes, where: str) -> dict[str, Any] | None:
    try:
        if not (text := data.decode().strip()):
            return None
        value = strict.parse_json_object(text, where)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: has a lone surrogate, which is not text") from None
    except ConfigError as error:
        raise InputError(str(error)) from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of every line, for a complaint, and its JSON object; empty lines are skipped.

    Raises InputError, naming file and line.
    """
    for line in lines(path):
        if line.error is not None:
            raise line.error
        if line.value is not None:
            yield line.where, line.value


def fingerprint(file: Path) -> str:
    """A digest of a file's size and of its ends: two checkpoints of a run differ there."""
    size = file.stat().st_size
    with file.open("rb") as data:
        ends = data.read(ENDS)
        data.seek(max(size - ENDS, 0))
        ends += data.read(ENDS)
    return f"{size}:{hashlib.sha256(ends).hexdigest()}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process holds the same lock (where the system has such locks).

    Raises InputError where one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path.parent}: another process is at work there") from None
        yield


def check_target(path: Path) -> None:
    """Raises InputError if `write` could not make that file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    partial = _partial(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def write(path: Path, data: bytes) -> None:
    """Makes the file, or replaces it: whole, or not at all. Links are followed."""
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        os.replace(partial, os.path.realpath(path))
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.partial-{os.getpid()}")
