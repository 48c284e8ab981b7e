"""What is in a file, from any place on: a bad line is one complaint, and the next line is read."""

import datetime
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer import files
from pangu_jax.errors import InputError
from train.data import records
from train.data.records import Record

given_files = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def plain(found: list[Record]) -> list[tuple[str, Any, tuple[int, int]]]:
    """Records that can be compared: of a complaint its text."""
    said = lambda value: str(value) if isinstance(value, InputError) else value
    return [(record.where, said(record.value), record.following) for record in found]


def values(file: Path) -> list[Any]:
    return [record.value for record in records.read(file)]


def complaint(file: Path, value: Any, place: str) -> str:
    """What a record says instead of a value: one line, its place first."""
    assert isinstance(value, InputError)
    message = str(value)
    assert message.startswith(f"{file}, {place}: ")
    assert message.isprintable()
    return message


def refused(file: Path) -> str:
    """What is said of a file that cannot be read: one line, its name first."""
    with pytest.raises(InputError) as caught:
        list(records.read(file))
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert message.isprintable()
    return message


# --- lines

objects = st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(max_size=3), max_size=2)
good = objects.map(lambda value: json.dumps(value).encode())
bad = st.sampled_from([b"{", b"[]", b"x", b'{"a": "\xff"}', b'{"a": 1, "a": 2}', b'"\\ud800"'])
blank = st.sampled_from([b"", b" ", b"\t \t"])
contents = st.builds(
    lambda lines, end, last: end.join(lines) + last * end,
    st.lists(good | good | bad | blank, max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)


def naive(content: bytes, limit: int = 10**9) -> list[tuple[int, Any, int]]:
    """Number, object (None for a complaint) and end of every line that is not empty."""
    found: list[tuple[int, Any, int]] = []
    end = 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+$", content), 1):
        end += len(line)
        try:
            if len(line) > limit:
                raise ValueError("too long")
            if not line.strip():
                continue
            value = json.loads(line.decode())
            names = [name for name, _ in json.loads(line, object_pairs_hook=list)]
            if len(set(names)) < len(names):
                raise ValueError("a name twice")
        except ValueError:
            value = None
        found.append((number, value if isinstance(value, dict) else None, end))
    return found


@given(content=contents)
@given_files
def test_lines_are_objects_or_complaints(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    expected = naive(content)
    found = list(records.read(file))
    assert [record.following for record in found] == [(number, end) for number, _, end in expected]
    for record, (number, value, _) in zip(found, expected, strict=True):
        assert record.where == f"{file}, line {number}"
        if value is None:
            complaint(file, record.value, f"line {number}")
        else:
            assert record.value == value


@given(content=contents)
@given_files
def test_lines_go_on_after_any_of_them(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    whole = plain(list(records.read(file)))
    for done, (_, _, following) in enumerate(whole, 1):
        assert plain(list(records.read(file, following))) == whole[done:]


@given(
    sizes=st.lists(st.sampled_from([8, 15, 16, 17, 18, 31, 33, 34, 35, 50, 51, 52]), max_size=6),
    end=st.booleans(),
)
@given_files
def test_lines_after_one_that_is_too_long_are_read(file: Path, sizes: list[int], end: bool) -> None:
    """Whatever multiple of what is read at once it has."""
    lines = [b'{"a":"' + b"x" * (size - 8) + b'"}' for size in sizes]
    content = b"\n".join(lines) + end * b"\n"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "MAX_LINE_BYTES", 16)
        found = list(records.read(file))
        expected = naive(content, 16)
        assert [record.following for record in found] == [(n, end) for n, _, end in expected]
        for record, (number, value, _) in zip(found, expected, strict=True):
            if value is None:
                assert "longer than 16 bytes" in complaint(file, record.value, f"line {number}")
            else:
                assert record.value == value


NOT_OBJECTS = [
    (b"{", "not valid JSON"),
    (b"\0", "not valid JSON"),
    (b'{"text": "a\0b"}', "not valid JSON"),
    (b"text", "not valid JSON"),
    (b"{'text': 'a'}", "not valid JSON"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    (b'{"text": "a",}', "not valid JSON"),
    (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
    ('{"text": "ä"}'.encode("utf-16"), "not UTF-8"),
    (b"[]", "must be a JSON object, not list"),
    (b"5", "must be a JSON object, not int"),
    (b"null", "must be a JSON object"),
    (b'{"text": "a", "text": "b"}', "'text' appears twice"),
    (b'{"text": "a", "x": {"b": 1, "b": 1}}', "'b' appears twice"),
    (b'{"text": "a", "messages": [NaN]}', "NaN"),
    (b'{"text": 1e999}', "Infinity"),
    (b'{"x": -Infinity}', "Infinity"),
    (b'{"x": ' + b"9" * 5000 + b"}", "number too long"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"x": ' + b"[" * 50 + b"]" * 50 + b"}", "nested too deeply"),
    (b'{"x":' * 200_000, "nested too deeply"),
    (b'{"text": "\\ud800", "messages": ["\\ud800"]}', "lone surrogate"),
    (b'{"text": "a", "\\udfff": 5}', "lone surrogate"),
]


@pytest.mark.parametrize(("line", "said"), NOT_OBJECTS)
def test_a_line_that_is_no_object_is_named(file: Path, line: bytes, said: str) -> None:
    for end in (b"\n", b"\r\n", b""):
        file.write_bytes(b'{"a": 1}\n  \n' + line + end + (b'{"a": 2}' if end else b""))
        first, wrong, *rest = values(file)
        assert first == {"a": 1}
        assert said in complaint(file, wrong, "line 3")
        assert rest == ([{"a": 2}] if end else [])


@given(content=st.binary(max_size=60))
@given_files
def test_any_bytes_are_a_complaint(file: Path, content: bytes) -> None:
    """No line that ends with x is an object."""
    file.write_bytes(content + b"x")
    found = list(records.read(file))
    last = content.count(b"\n") + 1
    complaint(file, found[-1].value, f"line {last}")
    assert found[-1].following == (last, len(content) + 1)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n"])
def test_an_empty_file_holds_nothing(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert values(file) == []


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refused(tmp_path / "missing.jsonl")
    assert "no such file" in refused(tmp_path / "missing.parquet")
    assert "not a regular file" in refused(tmp_path)
    assert "not a regular file" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
        ("a.arrayrecord", "array_record.python.array_record_data_source", "array_record"),
    ],
)
def test_a_reader_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    assert f"pip install {package}" in refused(tmp_path / name)


# --- Parquet and ArrayRecord

ROWS = [{"text": f"text {i}", "think": i} if i % 3 else {"text": f"text {i}"} for i in range(20)]


def write_parquet(file: Path, rows: list[dict[str, Any]], group: int = 7) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(table, file, row_group_size=group)


def write_array_record(file: Path, rows: list[bytes]) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(file), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "data.parquet", ROWS)
    return tmp_path / "data.parquet"


@pytest.fixture(params=["data.arrayrecord", "data.array_record", "DATA.ArrayRecord"])
def array_record(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_array_record(tmp_path / request.param, [json.dumps(row).encode() for row in ROWS])
    return tmp_path / request.param


def check_any_place(file: Path, kind: str) -> None:
    whole = plain(list(records.read(file)))
    assert whole == [(f"{file}, {kind} {i}", row, (i, 0)) for i, row in enumerate(ROWS, 1)]
    for done in range(len(ROWS) + 1):
        assert plain(list(records.read(file, (done, 0)))) == whole[done:]


def test_rows_of_parquet_are_objects_without_what_has_no_value(parquet: Path) -> None:
    check_any_place(parquet, "row")


def test_records_of_array_record_are_objects(array_record: Path) -> None:
    check_any_place(array_record, "record")


def check_damage(file: Path, write: Callable[[bytes], Any]) -> None:
    """A file that was cut off, or has a wrong bit, is one complaint, or is read."""
    data = file.read_bytes()
    for size in range(0, len(data), len(data) // 11):
        write(data[:size])
        assert "cannot be read" in refused(file)
    write(b"text " * 20_000)
    assert "cannot be read" in refused(file)
    complaints: list[str] = []
    places = [place for place, byte in enumerate(data) if byte]
    for place in places[:: max(1, len(places) // 60)]:
        write(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        try:
            assert len(list(records.read(file))) <= len(ROWS)
        except InputError as error:
            complaints.append(str(error))
    assert complaints
    for message in complaints:
        assert message.startswith(f"{file}: cannot be read (")
        assert message.isprintable()


def test_a_damaged_parquet_file_is_one_complaint(parquet: Path) -> None:
    check_damage(parquet, parquet.write_bytes)


def test_a_damaged_array_record_file_is_one_complaint(tmp_path: Path) -> None:
    file = tmp_path / "data.arrayrecord"
    write_array_record(file, [json.dumps(row).encode() for row in ROWS])
    check_damage(file, file.write_bytes)


def test_a_row_of_parquet_that_json_could_not_hold_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    rows = [
        {"text": 1.0},
        {"text": float("nan")},
        {"text": 3.0, "think": datetime.date(2025, 1, 1)},
    ]
    write_parquet(file, [*rows, {"text": 4.0}])
    first, second, third, last = values(file)
    assert (first, last) == ({"text": 1.0}, {"text": 4.0})
    assert "not a JSON object" in complaint(file, second, "row 2")
    assert "not a JSON object" in complaint(file, third, "row 3")


def test_a_record_of_array_record_that_is_no_object_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.arrayrecord"
    lines = [line for line, _ in NOT_OBJECTS if len(line) < 10_000]
    write_array_record(file, [b'{"a": 1}', *lines, b'{"a": 2}'])
    first, *wrong, last = values(file)
    assert (first, last) == ({"a": 1}, {"a": 2})
    said = [text for line, text in NOT_OBJECTS if len(line) < 10_000]
    for number, (value, text) in enumerate(zip(wrong, said, strict=True), 2):
        assert text in complaint(file, value, f"record {number}")


def test_an_empty_file_of_each_kind_holds_nothing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [])
    assert values(tmp_path / "a.parquet") == []
    write_array_record(tmp_path / "a.arrayrecord", [])
    assert values(tmp_path / "a.arrayrecord") == []


def test_columns_of_parquet_that_nobody_reads_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    day = datetime.date(2025, 1, 1)
    write_parquet(file, [{"text": "a", "day": day, "raw": b"\xff", "score": float("nan")}])
    assert values(file) == [{"text": "a"}]
