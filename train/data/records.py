"""What is in a file of data: JSON lines, Parquet, ArrayRecord, read from any place on.

A file is hostile until checked. A bad record is handed on as the error it is, named by its place:
whether it ends the run is its owner's choice.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infer import files
from pangu_jax import strict
from pangu_jax.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a file.

    where: its place, for a complaint
    value: a JSON object, or why it is none
    following: where to go on after it: the record's number and, of lines, their first byte
    """

    where: str
    value: dict[str, Any] | InputError
    following: tuple[int, int]


BEGIN = (0, 0)

# What examples are made of. Other columns are not read: of dates or bytes there is no JSON.
COLUMNS = ("text", "messages", "think", "tools")


def read(path: Path, begin: tuple[int, int] = BEGIN) -> Iterator[Record]:
    """The records of a file from a place on: .parquet, .arrayrecord (.array_record), else JSON
    lines.

    Raises InputError where the file cannot be read at all, or its reader is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    reader = READERS.get(path.suffix.lower(), _lines)
    return reader(path, begin)


def _lines(path: Path, begin: tuple[int, int]) -> Iterator[Record]:
    for line in files.lines(path, *begin):
        value = line.error or line.value
        if value is not None:  # empty lines are skipped
            yield Record(line.where, value, (line.number, line.end))


def _parquet(path: Path, begin: tuple[int, int]) -> Iterator[Record]:
    """Rows as objects; columns without a value are not in them."""
    parquet = _reader("pyarrow.parquet", "pyarrow", path)
    with _readable(path), parquet.ParquetFile(path) as file:
        number, wanted = 0, [name for name in file.schema_arrow.names if name in COLUMNS]
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size <= begin[0]:
                number += size
                continue
            for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    if number > begin[0]:
                        full = {name: cell for name, cell in row.items() if cell is not None}
                        where = f"{path}, row {number}"
                        yield Record(where, _checked(full, where), (number, 0))


def _array_record(path: Path, begin: tuple[int, int]) -> Iterator[Record]:
    """Records that each hold a JSON object."""
    data = _reader("array_record.python.array_record_data_source", "array_record", path)
    with _readable(path), data.ArrayRecordDataSource(str(path)) as source:
        for index in range(begin[0], len(source)):
            where = f"{path}, record {index + 1}"
            yield Record(where, _parsed(source[index], where), (index + 1, 0))


READERS: dict[str, Callable[[Path, tuple[int, int]], Iterator[Record]]] = {
    ".parquet": _parquet,
    ".arrayrecord": _array_record,
    ".array_record": _array_record,
}


class _readable:
    """What a library says of a damaged file, as one line. Errors of the one who reads pass."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | RuntimeError | IndexError | KeyError):
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self._path}: cannot be read ({strict.shorten(text)})") from None


def _reader(module: str, package: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{path}: reading it needs `pip install {package}`") from None


def _parsed(data: bytes, where: str) -> dict[str, Any] | InputError:
    try:
        return _checked(strict.parse_json_object(data.decode(), where), where)
    except UnicodeDecodeError as error:
        return InputError(f"{where}: not UTF-8 (byte {error.start})")
    except ConfigError as error:
        return InputError(str(error))


def _checked(value: dict[str, Any], where: str) -> dict[str, Any] | InputError:
    """The value, if it could have been a line of JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return InputError(f"{where}: has a lone surrogate, which is not text")
    except (TypeError, ValueError, RecursionError) as error:
        return InputError(f"{where}: not a JSON object ({error})")
    return value
