"""Command lines from typed dataclasses: every flag is a field, every mistake is one line.

A command is a dataclass; its docstring is the help, `flag(...)` gives a field its help line.
argparse does the parsing; JAX is not imported.
"""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pangu_jax import strict
from pangu_jax.errors import InputError


def flag(help: str, default: Any = dataclasses.MISSING, metavar: str | None = None) -> Any:
    """A dataclass field that is a command-line flag; without a default it is required."""
    return dataclasses.field(
        default=default, kw_only=True, metadata={"help": help, "metavar": metavar}
    )


def positional(help: str, metavar: str) -> Any:
    """A dataclass field that is given by its place on the command line."""
    return dataclasses.field(kw_only=True, metadata={"help": help, "place": metavar})


def sections(config: type) -> Any:
    """A dataclass field of the overrides `--section.field` of a configuration, as {section: {field:
    value}}; `config` is a dataclass of dataclasses whose fields are flags.
    """
    return dataclasses.field(kw_only=True, default_factory=dict, metadata={"sections": config})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(prog: str, about: str, commands: Mapping[str, type], argv: Sequence[str]) -> Any:
    """The command that `argv` names, as an instance of its dataclass.

    Raises InputError for anything that cannot be understood, SystemExit(0) after --help.
    """
    root = _Parser(prog=prog, description=about, allow_abbrev=False)
    choices = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, kind in commands.items():
        text = inspect.cleandoc(kind.__doc__ or "")
        sub = choices.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_flags(sub, kind)
    if not argv:
        root.print_help()
        raise SystemExit(0)
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise InputError(
            f"unknown command {strict.shorten(argv[0])}{strict.suggest(argv[0], commands)} "
            f"(see {prog} --help)"
        )
    if argv[0] in commands:
        _refuse_unknown_flags(commands[argv[0]], argv[1:], f"{prog} {argv[0]}")
    values = vars(root.parse_args(list(argv)))
    command = commands[values.pop("command")]
    for field in dataclasses.fields(command):
        if "sections" in field.metadata:
            values[field.name] = _take_overrides(values)
    return command(**values)


def _take_overrides(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of `--section.field` flags that were given, taken out of `values`."""
    found: dict[str, dict[str, Any]] = {}
    for name in [name for name in values if "." in name]:
        section, field = name.split(".")
        if (value := values.pop(name)) is not None:
            found.setdefault(section, {})[field] = value
    return found


def _add_flags(parser: argparse.ArgumentParser, command: type) -> None:
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        if "sections" in field.metadata:
            for section, held in _sections(field):
                about = (held.__doc__ or "").splitlines()[0]
                _add_options(parser.add_argument_group(section, about), held, f"{section}.")
        elif place := field.metadata.get("place"):
            parser.add_argument(field.name, metavar=place, help=field.metadata["help"])
        else:
            _add_option(parser, field, hints[field.name])


def _sections(field: dataclasses.Field) -> Iterator[tuple[str, type]]:
    """The sections of a configuration that are tables; its lists of tables have no flags."""
    for name, held in typing.get_type_hints(field.metadata["sections"]).items():
        if dataclasses.is_dataclass(held):
            yield name, typing.cast(type, held)


def _add_options(group: Any, section: type, prefix: str) -> None:
    """A section's flags; none is required and none has a default, as the file comes first."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        _add_option(group, field, hints[field.name], prefix)


def _add_option(group: Any, field: dataclasses.Field, hint: Any, prefix: str = "") -> None:
    required = field.default is dataclasses.MISSING and not prefix
    kind = _without_none(hint)
    options: dict[str, Any] = {"help": field.metadata["help"], "dest": prefix + field.name}
    if kind is bool:
        options["action"] = "store_true"
    else:
        if kind == tuple[str, ...]:
            options["action"], kind = _Append, str
        options["type"] = _reader(kind)
        options["metavar"] = field.metadata["metavar"] or _metavar(kind)
        options["required"] = required
        if field.default not in (None, dataclasses.MISSING):
            options["help"] += f" (default: {field.default})"
    if not required:
        options["default"] = None if prefix else field.default
    group.add_argument(f"--{prefix}{field.name}" if prefix else _spell(field.name), **options)


class _Append(argparse.Action):
    """A flag that may be given again: its values are a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        before = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, (*before, values))


def _refuse_unknown_flags(command: type, argv: Sequence[str], prog: str) -> None:
    """argparse would first complain of what is missing; the misspelt flag is the better news."""
    takes_value = dict(_flags(command))
    known = [*takes_value, "--help"]
    skip = False
    for word in argv:
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        if name in takes_value:
            skip = takes_value[name] and not equals
        elif re.match(r"--\w", word) and name != "--help":
            raise InputError(
                f"unknown option {strict.shorten(name)}{strict.suggest(name, known)} "
                f"(see {prog} --help)"
            )


def _flags(command: type) -> Iterator[tuple[str, bool]]:
    """Every flag of a command, and whether it takes a value."""
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        if "sections" in field.metadata:
            for section, held in _sections(field):
                own = typing.get_type_hints(held)
                for each in dataclasses.fields(held):
                    yield f"--{section}.{each.name}", _without_none(own[each.name]) is not bool
        elif "place" not in field.metadata:
            yield _spell(field.name), _without_none(hints[field.name]) is not bool


def _spell(name: str) -> str:
    return "--" + name.replace("_", "-")


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
    return kind


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is Mapping:
        return "N:X,N:X,..."
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "N,N,...")


def _reader(kind: Any) -> Any:
    """A function from a word to a value of `kind` whose complaints argparse turns into its error
    line.
    """

    def read(word: str) -> Any:
        try:
            if typing.get_origin(kind) is typing.Literal:
                if word not in typing.get_args(kind):
                    raise ValueError
                return word
            if typing.get_origin(kind) is tuple:
                return tuple(int(item) for item in word.split(",") if item.strip())
            if typing.get_origin(kind) is Mapping:
                pairs = (item.split(":") for item in word.split(","))
                return {int(key): float(value) for key, value in pairs}
            return kind(word)
        except ValueError:
            wanted = _metavar(kind)
            if "|" in wanted:
                wanted = "one of " + wanted.replace("|", ", ")
            raise argparse.ArgumentTypeError(f"{strict.shorten(word)} is not {wanted}") from None

    return read
