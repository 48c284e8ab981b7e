"""Strict reading of outside data: JSON and TOML into checked values, with the dotted path in every
complaint.
"""

import dataclasses
import json
import math
import os
import stat
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pangu_jax.errors import ConfigError

T = TypeVar("T")

# The published config.json has 1 kB and the 72B's tensor index 1 MB; anything far larger is not one
# of them.
MAX_TEXT_BYTES = 16 * 2**20

# Deeper than any configuration nests, and far from what printing a value could overflow.
MAX_DEPTH = 32


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Links are followed. Raises ConfigError.

    A named pipe or device is refused before it is opened: opening one could block for ever.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path}: not a regular file")
        if info.st_size > limit:
            raise ConfigError(f"{path}: {info.st_size} bytes, but at most {limit} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file of at most 16 MiB. Raises ConfigError."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or Infinity.

    Raises ConfigError, `where` in front.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ConfigError(f"{where}: the key {shorten(name)} appears twice")
            _check_finite(value, where, name)
            found[name] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=float)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if "\n" in text else f"character {error.pos + 1}"
        raise ConfigError(f"{where}: not valid JSON ({place}: {error.msg})") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except ConfigError:
        raise
    except ValueError:  # an integer literal of thousands of digits
        raise ConfigError(f"{where}: holds a number too long to read") from None
    _check_nesting(value, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def _check_finite(value: Any, where: str, key: str) -> None:
    """Refuses NaN and infinities, also in lists; without recursion."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, list):
            rest += item
        elif isinstance(item, float) and not math.isfinite(item):
            name = "NaN" if math.isnan(item) else "Infinity"
            raise ConfigError(f"{where}: {shorten(key)} holds {name}, which is not a number")


def _check_nesting(value: Any, where: str) -> None:
    """Refuses lists and objects that nest deeper than MAX_DEPTH; without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise ConfigError(f"{where}: nested too deeply")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError naming the file."""
    return parse_json_object(read_text(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def build(cls: type[T], table: dict[str, Any], where: str) -> T:
    """A dataclass from a table: every key known, every value of the declared type.

    where: what comes before the name of a key in a complaint, if anything
    Raises ConfigError.
    """
    at = f"{where}: " if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise ConfigError(f"{at}unknown key {shorten(key)}{suggest(key, fields)}")
    values = {key: coerce(hints[key], value, f"{at}{key}") for key, value in table.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in table
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{at}missing {', '.join(missing)}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{at}{error}") from None


def coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, without guessing: an int may become a float, a list a
    tuple.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = [option for option in arguments if option is not type(None)]
        return coerce(kind, value, where)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, not {describe(value)}")
        return build(typing.cast(type, kind), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} must be one of {', '.join(arguments)}; not {describe(value)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {describe(value)}")
        return tuple(coerce(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} must be {NOUNS[kind]}, not {describe(value)}")
    return value


NOUNS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}


def describe(value: Any) -> str:
    """A short printable form of an untrusted value for an error line."""
    try:
        text = json.dumps(value, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):  # odd keys, thousands of digits, cycles
        text = type(value).__name__
    return shorten(text, quote=False)


def shorten(text: str, quote: bool = True, limit: int = 80) -> str:
    """An untrusted string made printable on one line of bounded length."""
    printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    if len(text) > limit:
        printable = printable[:limit] + "..."
    return f"'{printable}'" if quote else printable


def coerce_fields(value: object) -> None:
    """Brings every field of a frozen dataclass to its declared type. Raises ConfigError."""
    hints = typing.get_type_hints(type(value))
    for name, kind in hints.items():
        object.__setattr__(value, name, coerce(kind, getattr(value, name), name))


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name nearest to a misspelt one, else nothing."""
    import difflib

    near = difflib.get_close_matches(name[:80], list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
