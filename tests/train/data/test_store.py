"""A store holds what encoding everything at once gives, however often making it was interrupted."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_jax.errors import InputError
from train.data import store
from train.data.examples import Example
from train.data.store import BadRecords, Store

FILES = ("tokens.int32", "learn.bool", "ends.int64", "skipped.txt", "state.json")
MADE_BY = {"tokenizer": "a", "learn": "all"}

given_files = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Stopped(Exception):
    """As if the process had ended."""


def encode(line: dict[str, Any]) -> Iterator[Example]:
    """{"messages": [[id, ...], ...]}: an example of each, ids that are even are learnt."""
    for part in line["messages"]:
        if part is None:
            raise InputError("a part is bad")
        yield Example(np.array(part, np.int32), np.array(part, np.int64) % 2 == 0)


def never(line: dict[str, Any]) -> Iterator[Example]:
    raise AssertionError("it was encoded already")


def lines_of(records: list[Any]) -> bytes:
    """Records as lines; None is no JSON."""
    return b"".join(
        b"{\n" if each is None else json.dumps(each).encode() + b"\n" for each in records
    )


def of_parts(*parts: list[int]) -> dict[str, Any]:
    return {"messages": list(parts)}


def make(
    folder: Path,
    source: Path,
    bad: BadRecords = "stop",
    made_by: dict[str, Any] = MADE_BY,
    encode: Callable = encode,
    **others: Any,
) -> Store:
    return store.of(folder, source, encode, made_by, bad, **others)


def examples(found: Store) -> list[tuple[list[int], list[bool]]]:
    """Every example of a store: its ids, and what is learnt."""
    ends = [0, *found.ends.tolist()]
    spans = [slice(*span) for span in itertools.pairwise(ends)]
    assert ends[-1] == found.tokens.size == found.learn.size
    assert len(found) == len(spans)
    return [(found.tokens[span].tolist(), found.learn[span].tolist()) for span in spans]


def expected(records: list[Any]) -> list[tuple[list[int], list[bool]]]:
    """The examples of records that are good from the first part to the last."""
    good = [each for each in records if each is not None and None not in each["messages"]]
    return [(part, [id % 2 == 0 for id in part]) for each in good for part in each["messages"]]


def contents(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "store"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done counts after every record."""
    monkeypatch.setattr(store, "COMMIT", -1.0)


ids = st.integers(0, 2**31 - 1) | st.integers(0, 9)
good = st.lists(st.lists(ids, max_size=4), max_size=3).map(lambda parts: {"messages": parts})
bad = st.none() | good.map(lambda record: {"messages": [*record["messages"], None, [8]]})


# --- whole


@given(records=st.lists(good, max_size=8))
@given_files
def test_a_store_holds_the_examples_of_all_records(
    source: Path, folder: Path, records: list[Any]
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    source.write_bytes(lines_of(records))
    found = make(folder, source)
    assert (found.tokens.dtype, found.learn.dtype, found.ends.dtype) == (np.int32, bool, np.int64)
    assert examples(found) == expected(records)
    assert found.skipped == 0
    again = make(folder, source, encode=never)
    assert examples(again) == expected(records)
    assert again.digest == found.digest


@given(records=st.lists(good | bad, max_size=8))
@given_files
def test_bad_records_that_are_skipped_leave_nothing_but_their_names(
    source: Path, folder: Path, records: list[Any]
) -> None:
    """The rest is what the file without them gives."""
    for place in (folder, folder.with_name("good")):
        shutil.rmtree(place, ignore_errors=True)
    source.write_bytes(lines_of(records))
    found = make(folder, source, "skip")
    wrong = [i for i, each in enumerate(records, 1) if each is None or None in each["messages"]]
    assert examples(found) == expected(records)
    assert found.skipped == len(wrong)
    said = (folder / "skipped.txt").read_text().splitlines()
    for number, line in zip(wrong, said, strict=True):
        what = "not valid JSON" if records[number - 1] is None else "a part is bad"
        assert line.startswith(f"{source}, line {number}: {what}")
    source.write_bytes(lines_of([r for i, r in enumerate(records, 1) if i not in wrong]))
    assert make(folder.with_name("good"), source).digest == found.digest
    for name in FILES[:3]:
        assert (folder / name).read_bytes() == (folder.with_name("good") / name).read_bytes()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("wrong", [None, {"messages": [[2], None]}])
def test_a_bad_record_stops_and_is_named_every_time(source: Path, folder: Path, wrong: Any) -> None:
    source.write_bytes(lines_of([of_parts([1, 2]), of_parts([3]), wrong, of_parts([4])]))
    for _ in range(2):
        with pytest.raises(InputError, match=r"data\.jsonl, line 3: (not valid|a part)"):
            make(folder, source)
    assert np.fromfile(folder / "tokens.int32", np.int32).tolist() == [1, 2, 3]
    assert examples(make(folder, source, "skip")) == expected([of_parts([1, 2], [3], [4])])
    with pytest.raises(InputError, match=r"data\.jsonl, line 3: "):
        make(folder, source)


def test_what_is_no_file_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"x\.jsonl: no such file"):
        make(folder, tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        make(folder, tmp_path)


def test_every_record_is_counted_as_it_comes(source: Path, folder: Path) -> None:
    source.write_bytes(lines_of([of_parts([1]), None, of_parts([2], [3])]))
    calls = []
    make(folder, source, "skip", advance=lambda: calls.append(1))
    assert len(calls) == 3


OTHERS = [
    [of_parts([1, 2], [3])],
    [of_parts([1], [2, 3])],
    [of_parts([1, 2, 3])],
    [of_parts([2, 1], [3])],
    [of_parts([1, 2])],
    [of_parts([3], [1, 2])],
    [of_parts([1, 2], [3, 0])],
    [of_parts([1, 2], [3], [])],
]


def test_stores_of_other_contents_have_other_digests(source: Path, tmp_path: Path) -> None:
    digests = []
    for number, records in enumerate(OTHERS):
        source.write_bytes(lines_of(records))
        digests.append(make(tmp_path / str(number), source).digest)
    assert len(set(digests)) == len(OTHERS)


def test_what_is_learnt_is_in_the_digest(source: Path, tmp_path: Path) -> None:
    def silent(line: dict[str, Any]) -> Iterator[Example]:
        for example in encode(line):
            yield Example(example.ids, ~example.learn)

    source.write_bytes(lines_of([of_parts([1, 2])]))
    a = make(tmp_path / "a", source)
    b = make(tmp_path / "b", source, encode=silent)
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.digest != b.digest


# --- interrupted

RECORDS = [of_parts([1, 2], [3]), None, of_parts(), of_parts([4, 5, 6]), of_parts([7], None), None]
RECORDS += [of_parts([8, 9], [], [10]), of_parts([11])]


def interrupt(
    folder: Path, source: Path, after: int, within: bool, encoded: list[int] | None = None
) -> bool:
    """Makes the store until so many records are done; whether it was not whole before."""
    left = after

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    def counting(line: dict[str, Any]) -> Iterator[Example]:
        for number, example in enumerate(encode(line)):
            if within and number == 1:  # in the middle of a record
                count()
            yield example
        if encoded is not None:
            encoded.append(1)

    try:
        make(folder, source, "skip", encode=counting, advance=(lambda: None) if within else count)
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("commit", [-1.0, math.inf])
@given(
    records=st.lists(good | good | bad, min_size=1, max_size=6),
    stops=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=4),
    junk=st.binary(max_size=9),
)
@given_files
def test_a_store_that_was_interrupted_is_the_same_byte_for_byte(
    source: Path, folder: Path, commit: float, records: Any, stops: Any, junk: bytes
) -> None:
    """Wherever that was, and whatever was written and not yet counted."""
    for place in (folder, folder.with_name("once")):
        shutil.rmtree(place, ignore_errors=True)
    source.write_bytes(lines_of(records))
    once = make(folder.with_name("once"), source, "skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "COMMIT", commit)
        for after, within in stops:
            if interrupt(folder, source, after, within):
                for name in FILES[:4]:
                    with (folder / name).open("ab") as file:
                        file.write(junk)
        found = make(folder, source, "skip")
    assert examples(found) == expected(records)
    assert (found.digest, found.skipped) == (once.digest, once.skipped)
    assert contents(folder) == contents(folder.with_name("once"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("after", range(len(RECORDS) + 1))
def test_what_counts_is_not_encoded_again(source: Path, folder: Path, after: int) -> None:
    source.write_bytes(lines_of(RECORDS))
    encoded: list[int] = []
    assert interrupt(folder, source, after, False, encoded) == (after < len(RECORDS))
    interrupt(folder, source, len(RECORDS), False, encoded)
    assert len(encoded) == len([r for r in RECORDS if r is not None and None not in r["messages"]])
    assert examples(make(folder, source, "skip", encode=never)) == expected(RECORDS)


@pytest.mark.usefixtures("eager")
def test_what_counts_is_on_the_disk(source: Path, folder: Path, tmp_path: Path) -> None:
    """As a process that is killed leaves it: without what is still in its buffers."""
    source.write_bytes(lines_of(RECORDS))
    copies: list[Path] = []

    def copy() -> None:
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(folder, copies[-1])

    make(folder, source, "skip", advance=copy)
    good = [each is not None and None not in each["messages"] for each in RECORDS]
    assert len(copies) == len(RECORDS)
    for done, left in enumerate(copies):
        encoded: list[int] = []
        interrupt(left, source, len(RECORDS), False, encoded)
        assert len(encoded) == sum(good[done:])
        assert contents(left) == contents(folder)


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
@pytest.mark.usefixtures("eager")
def test_other_kinds_of_files_go_on_too(tmp_path: Path, folder: Path, kind: str) -> None:
    file = tmp_path / f"data.{kind}"
    records = [of_parts([i, i + 1], [i]) for i in range(1, 9)]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"messages": [each["messages"] for each in records]})
        pytest.importorskip("pyarrow.parquet").write_table(table, file, row_group_size=3)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(file), "group_size:1")
        for each in records:
            writer.write(json.dumps(each).encode())
        writer.close()
    encoded: list[int] = []
    for after in (0, 2, 3, 1, 8):
        interrupt(folder, file, after, False, encoded)
    assert len(encoded) == len(records)
    assert examples(make(folder, file, "skip", encode=never)) == expected(records)


# --- made anew

FIRST = [of_parts([1, 2], [3]), None, of_parts([4])]
NEW = {
    "tokenizer": {"made_by": {"tokenizer": "b", "learn": "all"}},
    "option": {"made_by": {"tokenizer": "a", "learn": "last"}},
    "more options": {"made_by": {**MADE_BY, "cut": True}},
    "no options": {"made_by": {}},
}


@pytest.mark.parametrize("what", NEW)
def test_another_way_to_encode_makes_it_anew(source: Path, folder: Path, what: str) -> None:
    def tens(line: dict[str, Any]) -> Iterator[Example]:
        for example in encode(line):
            yield Example(example.ids * np.int32(10), example.learn)

    source.write_bytes(lines_of(FIRST))
    make(folder, source, "skip")
    found = make(folder, source, "skip", encode=tens, **NEW[what])
    assert found.tokens.tolist() == [10, 20, 30, 40]
    assert found.skipped == 1
    assert examples(make(folder, source, "skip", encode=never, **NEW[what])) == examples(found)
    assert examples(make(folder, source, "skip")) == expected(FIRST)


SECOND = {
    "of the same size": [of_parts([1, 2], [3]), None, of_parts([5])],
    "with another begin": [of_parts([9, 2], [3]), None, of_parts([4])],
    "longer": [*FIRST, of_parts([5, 6])],
    "shorter": FIRST[:2],
    "empty": [],
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", SECOND)
@pytest.mark.usefixtures("eager")
def test_another_file_makes_it_anew(source: Path, folder: Path, what: str, whole: bool) -> None:
    source.write_bytes(lines_of(FIRST))
    interrupt(folder, source, 9 if whole else 2, False)
    source.write_bytes(lines_of(SECOND[what]))
    assert examples(make(folder, source, "skip")) == expected(SECOND[what])


@pytest.mark.parametrize("commit", [-1.0, math.inf])
@pytest.mark.parametrize("after", range(6))
def test_a_store_made_anew_in_vain_is_not_taken_for_the_old_one(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, commit: float
) -> None:
    """Another file, interrupted, and the first file again."""
    source.write_bytes(lines_of(FIRST))
    make(folder, source, "skip")
    monkeypatch.setattr(store, "COMMIT", commit)
    source.write_bytes(lines_of([of_parts([20, 21], [22]), None, *[of_parts([23], [24])] * 3]))
    interrupt(folder, source, after, False)
    source.write_bytes(lines_of(FIRST))
    assert examples(make(folder, source, "skip")) == expected(FIRST)


# --- damaged


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("eager")
def test_a_file_that_was_cut_off_or_lost_is_noticed(
    source: Path, folder: Path, name: str, whole: bool
) -> None:
    source.write_bytes(lines_of(RECORDS))
    for keep in (lambda data: data[:-1], lambda data: data[:1], lambda data: b"", None):
        shutil.rmtree(folder, ignore_errors=True)
        interrupt(folder, source, 99 if whole else 7, False)
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if keep is not None:
            (folder / name).write_bytes(keep(data))
        found = make(folder, source, "skip")
        assert examples(found) == expected(RECORDS)
        assert found.skipped == 3
        assert len((folder / "skipped.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("junk", [b"x", b"\0" * 8])
def test_what_follows_what_counts_is_not_read(source: Path, folder: Path, junk: bytes) -> None:
    source.write_bytes(lines_of(FIRST))
    make(folder, source, "skip")
    for name in FILES[:4]:
        with (folder / name).open("ab") as file:
            file.write(junk)
    assert examples(make(folder, source, "skip")) == expected(FIRST)


STATES = [
    {"following": []},
    {"following": [1]},
    {"following": [-1, -1]},
    {"following": "x"},
    {"following": [1, 1.5]},
    {"sizes": {}},
    {"sizes": []},
    {"sizes": {"tokens.int32": 4}},
    {"sizes": {"tokens.int32": "x", "learn.bool": 1, "ends.int64": 8, "skipped.txt": 0}},
    {"sizes": {"tokens.int32": 4.5, "learn.bool": 1, "ends.int64": 8, "skipped.txt": 0}},
    {"sizes": {"tokens.int32": -4, "learn.bool": 1, "ends.int64": 8, "skipped.txt": 0}},
    {"sizes": {"tokens.int32": True, "learn.bool": 1, "ends.int64": 8, "skipped.txt": 0}},
    {"sizes": {"../a": 4, "learn.bool": 1, "ends.int64": 8, "skipped.txt": 0}},
    {"whole": 1},
    {"digest": None},
    {"other": 1},
]


@pytest.mark.parametrize("state", STATES, ids=json.dumps)
@pytest.mark.parametrize("whole", [True, False])
def test_a_state_that_no_store_has_makes_it_anew(
    source: Path, folder: Path, state: dict[str, Any], whole: bool
) -> None:
    source.write_bytes(lines_of(FIRST))
    make(folder, source, "skip")
    told = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**told, "whole": whole, **state}))
    found = make(folder, source, "skip")
    assert examples(found) == expected(FIRST)
    assert found.skipped == 1
