"""Command lines from typed dataclasses: every flag is a field, every mistake is one line.

A command is a dataclass; its docstring is the help, `flag(...)` gives a field its help line.
argparse does the parsing; JAX is not imported.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pangu_jax import strict
from pangu_jax.errors import InputError


def flag(help: str, default: Any = dataclasses.MISSING, metavar: str | None = None) -> Any:
    """A dataclass field that is a command-line flag; without a default it is required."""
    return dataclasses.field(
        default=default, kw_only=True, metadata={"help": help, "metavar": metavar}
    )


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
        text = (kind.__doc__ or "").strip()
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
    return commands[values.pop("command")](**values)


def _add_flags(parser: argparse.ArgumentParser, command: type) -> None:
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        required = field.default is dataclasses.MISSING
        kind = _without_none(hints[field.name])
        options: dict[str, Any] = {"help": field.metadata["help"], "dest": field.name}
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
            options["default"] = field.default
        parser.add_argument(_spell(field.name), **options)


class _Append(argparse.Action):
    """A flag that may be given again: its values are a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        before = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, (*before, values))


def _refuse_unknown_flags(command: type, argv: Sequence[str], prog: str) -> None:
    """argparse would first complain of what is missing; the misspelt flag is the better news."""
    hints = typing.get_type_hints(command)
    takes_value = {
        _spell(field.name): _without_none(hints[field.name]) is not bool
        for field in dataclasses.fields(command)
    }
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
