"""The examples of a file, tokenised once and kept on the disk: training maps them into memory.

Interrupted, tokenising goes on where it stopped. What made a store is written beside it; a store
that something else made is made anew.
"""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer import files
from pangu_jax import strict
from pangu_jax.errors import ConfigError, InputError
from train.data import examples, records
from train.data.examples import Encode, Example

BadRecords = Literal["stop", "skip"]

TOKENS, LEARN, ENDS, SKIPPED, STATE = (
    "tokens.int32",
    "learn.bool",
    "ends.int64",
    "skipped.txt",
    "state.json",
)
KINDS = {TOKENS: np.dtype("<i4"), LEARN: np.dtype("?"), ENDS: np.dtype("<i8")}

# Seconds of work that an interruption may cost.
COMMIT = 5.0


@dataclasses.dataclass
class State:
    """How far a store has come.

    made_of: what would make another one
    following: where the file is read on (`records.Record.following`)
    sizes: bytes of every file that count; what follows was not finished
    digest: of all tokens and of what is learnt
    """

    made_of: dict
    following: tuple[int, ...] = records.BEGIN
    sizes: dict = dataclasses.field(default_factory=dict)
    skipped: int = 0
    digest: int = 0
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Store:
    """Examples end to end: the i-th is `tokens[ends[i - 1] : ends[i]]`.

    skipped: how many bad records are not in it; `skipped.txt` names them
    digest: of its contents
    """

    tokens: np.ndarray
    learn: np.ndarray
    ends: np.ndarray
    skipped: int
    digest: int

    def __len__(self) -> int:
        return len(self.ends)


def of(
    folder: Path,
    source: Path,
    encode: Encode,
    made_by: Mapping[str, Any],
    bad: BadRecords,
    advance: Callable[[], None] = lambda: None,
) -> Store:
    """The store in `folder` of the examples of a file, made or finished where it is not yet.

    made_by: what `encode` depends on, as JSON
    bad: what happens at a record that has no examples: `stop` raises InputError
    advance: called with every record

    Raises InputError.
    """
    if not source.is_file():
        raise InputError(f"{source}: {'not a regular file' if source.exists() else 'no such file'}")
    made_of = {
        **made_by,
        "file": files.fingerprint(source),
        "changed": source.stat().st_mtime_ns,
        "bad": bad,
    }
    state = _found(folder, made_of)
    if not state.whole:
        folder.mkdir(parents=True, exist_ok=True)
        _make(folder, source, encode, state, bad, advance)
    mapped = {name: _map(folder / name, kind, state.sizes[name]) for name, kind in KINDS.items()}
    return Store(mapped[TOKENS], mapped[LEARN], mapped[ENDS], state.skipped, state.digest)


def _found(folder: Path, made_of: dict[str, Any]) -> State:
    """What is there, if it is of the same kind and undamaged; else a beginning."""
    path = folder / STATE
    if not path.exists():
        return State(made_of)
    try:
        state = strict.build(State, strict.read_json_object(path), str(path))
    except ConfigError:
        return State(made_of)
    return state if state.made_of == made_of and _sound(folder, state) else State(made_of)


def _sound(folder: Path, state: State) -> bool:
    """Whether a state is one of ours, and all that it counts is there."""
    numbers = (*state.sizes.values(), *state.following)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and len(state.following) == len(records.BEGIN)
        and set(state.sizes) == {*KINDS, SKIPPED}
        and all(_length(folder / name) >= size for name, size in state.sizes.items())
    )


def _make(
    folder: Path,
    source: Path,
    encode: Encode,
    state: State,
    bad: BadRecords,
    advance: Callable[[], None],
) -> None:
    if not state.sizes:  # what another one counted is about to be written over
        (folder / STATE).unlink(missing_ok=True)
    opened = {name: _open_at(folder / name, state.sizes.get(name, 0)) for name in (*KINDS, SKIPPED)}
    end, since = state.sizes.get(TOKENS, 0) // KINDS[TOKENS].itemsize, time.monotonic()
    try:
        for record in records.read(source, (state.following[0], state.following[1])):
            advance()
            try:
                found = examples.of(record, encode)
            except InputError as error:
                if bad == "stop":
                    raise
                found = []
                state.skipped += 1
                opened[SKIPPED].write(f"{error}\n".encode())
            for example in found:
                end = _append(opened, example, end, state)
            state.following = record.following
            if time.monotonic() - since > COMMIT:
                _commit(folder, opened, state)
                since = time.monotonic()
        state.whole = True
        _commit(folder, opened, state)
    finally:
        for file in opened.values():
            file.close()


def _append(opened: Mapping[str, Any], example: Example, end: int, state: State) -> int:
    end += example.ids.size
    for name, array in ((TOKENS, example.ids), (LEARN, example.learn), (ENDS, np.array([end]))):
        data = array.astype(KINDS[name]).tobytes()
        state.digest = zlib.crc32(data, state.digest)
        opened[name].write(data)
    return end


def _commit(folder: Path, opened: Mapping[str, Any], state: State) -> None:
    for file in opened.values():
        file.flush()
        os.fsync(file.fileno())
    state.sizes = {name: file.tell() for name, file in opened.items()}
    files.write(folder / STATE, json.dumps(dataclasses.asdict(state)).encode())


def _open_at(path: Path, size: int) -> Any:
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _map(path: Path, kind: np.dtype, size: int) -> np.ndarray:
    if size == 0:  # nothing cannot be mapped
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r", shape=(size // kind.itemsize,))
