"""The safetensors reader and writer, against the independent library and against damage."""

import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import safetensors.numpy as library_numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pangu_jax.checkpoint import safetensors
from pangu_jax.checkpoint.safetensors import File, Spec
from pangu_jax.errors import CheckpointError
from tests.limits import no_longer_than

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [
    *(
        np.dtype(kind)
        for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1")
    ),
    np.dtype(bool),
    BF16,
]
SHAPES = [(), (1,), (0,), (3,), (2, 0, 3), (2, 3), (1, 1, 1, 5), (2, 1, 3, 1, 2, 1, 1, 2)]
QUICK = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "model.a": rng.standard_normal((2, 3)).astype(np.float32),
        "model.b": rng.standard_normal(4).astype(BF16),
        "scalar": np.array(3, np.int16),
        "empty": np.zeros((0, 5), np.float16),
        "model.c": rng.standard_normal((3, 1)).astype(np.float64),
    }


def of_every_dtype(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tensors = {}
    for dtype in DTYPES:
        values = rng.integers(0, 2 if dtype.kind == "b" else 100, shape)
        tensors[f"of {dtype}"] = np.asarray(values).astype(dtype)
    return tensors


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    specs = [Spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    safetensors.write(path, specs, iter(tensors.values()))


def raw_file(path: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this very header, in a new inode: older maps of the name stay valid."""
    text = header.encode() if isinstance(header, str) else header
    path.unlink(missing_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def check_message(error: CheckpointError, path: Path) -> None:
    message = str(error)
    assert path.name in message
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert len(message) < len(str(path)) + 1000


def refuse(path: Path, *words: str) -> None:
    with no_longer_than(20), pytest.raises(CheckpointError) as caught:
        File(path)
    check_message(caught.value, path)
    for word in words:
        assert word in str(caught.value)


def read_or_refuse(path: Path) -> File | None:
    """The file if it is accepted, with consistent tensors; None if it is refused properly."""
    try:
        with no_longer_than(20):
            file = File(path)
    except CheckpointError as error:
        check_message(error, path)
        return None
    total = 0
    for name, found in file.entries.items():
        tensor = file.read(name)
        assert tensor.shape == found.shape
        assert tensor.dtype == safetensors.DTYPES[found.dtype]
        assert tensor.nbytes == found.end - found.start
        total += tensor.nbytes
        tensor.tobytes()  # every page is there
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
    assert 8 + length + total == path.stat().st_size
    return file


def as_library_reads(content: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | None:
    """Shape and bytes of every tensor in the library's eyes, None if it refuses the file."""
    try:
        found = library.deserialize(content)
    except library.SafetensorError:
        return None
    return {name: (tuple(fields["shape"]), bytes(fields["data"])) for name, fields in found}


def as_we_read(file: File) -> dict[str, tuple[tuple[int, ...], bytes]]:
    tensors = {name: file.read(name) for name in file.entries}
    return {name: (tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


# --- good files -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_reads_what_is_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = of_every_dtype(shape)
    write(tmp_path / "x.safetensors", tensors)
    found = library_numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_library_writes_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = of_every_dtype(shape)
    library_numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = File(tmp_path / "x.safetensors")
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.tobytes() == tensor.tobytes()


@QUICK
@given(
    wanted=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda n: n != "__metadata__"),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
            st.integers(0, 9),
        ),
        max_size=5,
    )
)
def test_round_trip_both_ways(
    tmp_path: Path, wanted: dict[str, tuple[np.dtype, tuple[int, ...], int]]
) -> None:
    tensors = {}
    for name, (dtype, shape, seed) in wanted.items():
        bits = np.random.default_rng(seed).integers(0, 2, math.prod(shape) * dtype.itemsize)
        tensors[name] = bits.astype(np.uint8).view(dtype).reshape(shape)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    for path in (ours, theirs):
        path.unlink(missing_ok=True)
    write(ours, tensors)
    theirs.write_bytes(library_numpy.save(tensors))
    expected = {name: (tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}
    assert as_library_reads(ours.read_bytes()) == expected
    assert as_we_read(File(theirs)) == expected


def test_fp8_is_read(tmp_path: Path) -> None:
    data = bytes(range(6))
    for name, dtype in (("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)):
        path = raw_file(tmp_path / name, json.dumps({"w": entry(name, [2, 3], [0, 6])}), data)
        found = File(path).read("w")
        assert found.dtype == dtype
        assert found.tobytes() == data


def test_a_tensor_is_a_read_only_view(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", some_tensors())
    found = File(tmp_path / "x.safetensors").read("model.a")
    assert not found.flags.writeable
    assert not found.flags.owndata


def test_the_order_of_the_header_does_not_matter(tmp_path: Path) -> None:
    header = {"late": entry("U8", [2], [1, 3]), "early": entry("U8", [1], [0, 1])}
    file = File(raw_file(tmp_path / "x", json.dumps(header), b"\1\2\3"))
    assert file.read("late").tolist() == [2, 3]
    assert file.read("early").tolist() == [1]


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "blob", some_tensors())
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert File(tmp_path / "x.safetensors").entries.keys() == some_tensors().keys()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {})
    assert File(tmp_path / "x.safetensors").entries == {}
    assert library_numpy.load_file(tmp_path / "x.safetensors") == {}


def test_the_data_begins_aligned(tmp_path: Path) -> None:
    for size in range(1, 10):
        path = tmp_path / f"{size}.safetensors"
        write(path, {"n" * size: np.zeros(1, np.float32)})
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert length % 8 == 0


# --- the writer -------------------------------------------------------------------------------


def test_the_writer_draws_one_tensor_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    seen = []

    def tensors() -> Iterator[np.ndarray]:
        for i in range(4):
            seen.append(path.stat().st_size)  # the header first, then what was drawn before
            yield np.full(2**16, i, np.uint8)

    safetensors.write(path, [Spec(f"t{i}", np.dtype("u1"), (2**16,)) for i in range(4)], tensors())
    assert len(seen) == 4
    assert seen[-1] > seen[1] >= 2**15
    assert [int(File(path).read(f"t{i}")[-1]) for i in range(4)] == [0, 1, 2, 3]


def test_the_writer_takes_any_iterable_of_specs(tmp_path: Path) -> None:
    tensors = some_tensors()
    specs = (Spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    safetensors.write(tmp_path / "x.safetensors", specs, iter(tensors.values()))
    assert File(tmp_path / "x.safetensors").entries.keys() == tensors.keys()


def test_the_writer_copies_views_in_order(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    write(tmp_path / "x.safetensors", {"t": whole.T, "step": whole[::2, 1::2]})
    found = library_numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["t"], whole.T)
    np.testing.assert_array_equal(found["step"], whole[::2, 1::2])


def test_the_writer_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x.safetensors", some_tensors())
    assert (tmp_path / "x.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "tensors",
    [
        [np.zeros((2, 3), np.float32)],
        [np.zeros((2, 3), np.float32), np.zeros((4,), np.float32), np.zeros(1, np.float32)],
        [np.zeros((3, 2), np.float32), np.zeros((4,), np.float32)],
        [np.zeros((2, 3), np.float16), np.zeros((4,), np.float32)],
    ],
    ids=["too few", "too many", "other shape", "other dtype"],
)
def test_the_writer_refuses_tensors_that_are_not_the_specs(
    tmp_path: Path, tensors: list[np.ndarray]
) -> None:
    specs = [Spec("a", np.dtype("f4"), (2, 3)), Spec("b", np.dtype("f4"), (4,))]
    with pytest.raises((AssertionError, ValueError)):
        safetensors.write(tmp_path / "x.safetensors", specs, iter(tensors))


def test_spec_nbytes() -> None:
    assert Spec("a", BF16, (3, 5)).nbytes == 30
    assert Spec("a", np.dtype("f8"), ()).nbytes == 8
    assert Spec("a", np.dtype("f8"), (2**40, 0)).nbytes == 0


# --- damage -----------------------------------------------------------------------------------


def test_truncation_at_any_byte_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "good.safetensors", some_tensors())
    whole = (tmp_path / "good.safetensors").read_bytes()
    for size in range(len(whole)):
        path = tmp_path / f"cut-{size}.safetensors"
        path.write_bytes(whole[:size])
        refuse(path)
        path.unlink()


@pytest.mark.parametrize("mask", [0x01, 0x08, 0x20, 0xFF])
def test_any_flipped_header_byte_is_refused_or_consistent(tmp_path: Path, mask: int) -> None:
    write(tmp_path / "good.safetensors", some_tensors())
    whole = (tmp_path / "good.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    for at in range(8 + length):
        path = tmp_path / f"flipped-{at}.safetensors"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        refused += read_or_refuse(path) is None
        path.unlink()
    assert refused > length // 3


@QUICK
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), again=st.integers(0, 10**6))
def test_whatever_damage_is_accepted_reads_as_in_the_library(
    tmp_path: Path, at: int, value: int, again: int
) -> None:
    good = tmp_path / "good.safetensors"
    if not good.exists():
        write(good, some_tensors())
    damaged = bytearray(good.read_bytes())
    (length,) = struct.unpack("<Q", damaged[:8])
    damaged[at % (8 + length)] = value
    if again % 2:
        damaged[again % (8 + length)] ^= 0x10
    path = tmp_path / "damaged.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    file = read_or_refuse(path)
    if file is None:
        return
    theirs = as_library_reads(bytes(damaged))
    if theirs is None:
        # The library checks the metadata's form too; nothing else may be accepted that it refuses.
        assert b'"__metadata__":{"format":"pt"}' not in damaged
    else:
        assert as_we_read(file) == theirs


HUGE = 2**63
BAD_HEADERS: dict[str, tuple[Any, ...]] = {
    # what: (header, data bytes, words of the message)
    "negative size": ({"w": entry(shape=[-1], offsets=[0, 4])}, 4, "'w'", "shape"),
    "two negative sizes": ({"w": entry(shape=[-1, -1], offsets=[0, 4])}, 4, "'w'", "shape"),
    "bool size": ({"w": entry(shape=[True])}, 4, "'w'", "shape"),
    "float size": ({"w": entry(shape=[1.0])}, 4, "'w'", "shape"),
    "text size": ({"w": entry(shape=["1"])}, 4, "'w'", "shape"),
    "null size": ({"w": entry(shape=[None])}, 4, "'w'", "shape"),
    "shape is a number": ({"w": entry(shape=1)}, 4, "'w'", "shape"),
    "shape is an object": ({"w": entry(shape={"0": 1})}, 4, "'w'", "shape"),
    "absurd size": ({"w": entry(shape=[2**62])}, 4, "'w'"),
    "absurd size and range": ({"w": entry("U8", [2**62], [0, 2**62])}, 4, "'w'", "truncated"),
    "product wraps at 64 bits": ({"w": entry("U8", [2**32, 2**32], [0, 0])}, 0, "'w'"),
    "product wraps to 4": ({"w": entry("U8", [2**62 + 1, 4], [0, 4])}, 4, "'w'"),
    "size of 2**63": ({"w": entry("U8", [HUGE], [0, HUGE])}, 4, "'w'", "shape"),
    "huge int": ({"w": entry("U8", [10**4000], [0, 4])}, 4, "'w'", "shape"),
    "rank 9": ({"w": entry("F32", [1] * 9)}, 4, "'w'", "shape"),
    "rank of 100 000": ({"w": entry("F32", [1] * 10**5)}, 4, "'w'", "shape"),
    "negative offset": ({"w": entry(offsets=[-4, 0])}, 4, "'w'", "data_offsets"),
    "backward offsets": ({"w": entry(offsets=[4, 0])}, 4, "'w'", "data_offsets"),
    "bool offsets": ({"w": entry("U8", [1], [False, True])}, 1, "'w'", "data_offsets"),
    "float offsets": ({"w": entry(offsets=[0.0, 4.0])}, 4, "'w'", "data_offsets"),
    "huge offsets": ({"w": entry(offsets=[10**30, 10**30 + 4])}, 4, "'w'", "data_offsets"),
    "one offset": ({"w": entry(offsets=[4])}, 4, "'w'", "data_offsets"),
    "three offsets": ({"w": entry(offsets=[0, 4, 4])}, 4, "'w'", "data_offsets"),
    "offsets are text": ({"w": entry(offsets="04")}, 4, "'w'", "data_offsets"),
    "offsets are null": ({"w": entry(offsets=None)}, 4, "'w'", "data_offsets"),
    "past the end": ({"w": entry(shape=[2], offsets=[0, 8])}, 4, "'w'", "truncated"),
    "begins past the end": ({"w": entry(offsets=[100, 104])}, 4, "'w'"),
    "range too long": ({"w": entry(shape=[1], offsets=[0, 8])}, 8, "'w'", "data_offsets"),
    "range too short": ({"w": entry(shape=[2], offsets=[0, 4])}, 4, "'w'", "data_offsets"),
    "overlap": ({"v": entry(), "w": entry(offsets=[2, 6])}, 6, "'w'", "overlaps"),
    "same range twice": ({"v": entry(), "w": entry()}, 4, "overlaps"),
    "empty inside another": (
        {"v": entry(), "w": entry(shape=[0], offsets=[2, 2])},
        4,
        "'w'",
        "overlaps",
    ),
    "gap before": ({"w": entry(offsets=[4, 8])}, 8, "'w'", "gap"),
    "gap between": ({"v": entry(), "w": entry(offsets=[5, 9])}, 9, "'w'", "gap"),
    "empty behind a gap": ({"v": entry(), "w": entry(shape=[0], offsets=[8, 8])}, 8, "gap"),
    "trailing bytes": ({"w": entry()}, 5, "1 bytes at the end"),
    "trailing bytes, no tensor": ({}, 1, "1 bytes at the end"),
    "unknown dtype": ({"w": entry("F31")}, 4, "'w'", "dtype", "F31"),
    "lower-case dtype": ({"w": entry("f32")}, 4, "'w'", "dtype"),
    "dtype is a number": ({"w": entry(32)}, 4, "'w'", "dtype"),
    "dtype is a list": ({"w": entry(["F32"])}, 4, "'w'", "dtype"),
    "dtype is an object": ({"w": entry({"a": 1})}, 4, "'w'", "dtype"),
    "dtype is null": ({"w": entry(None)}, 4, "'w'", "dtype"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, 4, "'w'", "dtype"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "'w'", "shape"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [1]}}, 4, "'w'", "data_offsets"),
    "an unknown field": ({"w": {**entry(), "stride": [1]}}, 4, "'w'"),
    "entry is a list": ({"w": [1]}, 4, "'w'"),
    "entry is null": ({"w": None}, 4, "'w'"),
    "entry is a number": ({"w": 4}, 4, "'w'"),
    "metadata is a list": ({"__metadata__": [], "w": entry()}, 4, "__metadata__"),
    "metadata is text": ({"__metadata__": "pt", "w": entry()}, 4, "__metadata__"),
    "newline in a name": ({"a\nb": entry("?")}, 4, "dtype"),
    "terminal escapes in a name": ({"a\x1b[2J\u2028\u202e": entry("?")}, 4, "dtype"),
    "lone surrogate in a name": ({"a\ud800": entry("?")}, 4, "dtype"),
    "newline in a dtype": ({"w": entry("F32\n")}, 4, "dtype"),
    "a very long name": ({"n" * 10**6: entry("?")}, 4, "dtype"),
    "a very long dtype": ({"w": entry("F" * 10**6)}, 4, "dtype"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, what: str) -> None:
    header, size, *words = BAD_HEADERS[what]
    refuse(raw_file(tmp_path / "x.safetensors", json.dumps(header), bytes(size)), *words)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', ["NaN"]),
        ('{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', ["Infinity"]),
        ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,-Infinity]}}', ["Infinity"]),
        ('{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', ["shape", "Infinity"]),
        ('{"w":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', ["'w'", "shape"]),
        ('{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 5000), ["number"]),
        ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % ("9" * 4000), ["'w'"]),
        (
            '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            ["'w'", "twice"],
        ),
        ('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', ["twice"]),
        ('{"__metadata__":{"a":"b","a":"c"}}', ["twice"]),
        ("[" * 10**5 + "]" * 10**5, ["deep"]),
        ('{"w":' + "[" * 10**6 + "]" * 10**6 + "}", ["deep"]),
        ('{"w":' * 10**5 + "1" + "}" * 10**5, ["deep"]),
        ("[]", ["object"]),
        ("4", ["object"]),
        ('"text"', ["object"]),
        ("null", ["object"]),
        ("", ["JSON"]),
        ("    ", ["JSON"]),
        ("{", ["JSON"]),
        ("{}{}", ["JSON"]),
        ("{'w': 1}", ["JSON"]),
        ('{"w": 1,}', ["JSON"]),
        ('{"a\nb": 1}', ["JSON"]),
        ("\ufeff{}", ["JSON"]),
        (b'{"\xff": 1}', ["UTF-8"]),
        (b'{"\xed\xa0\x80": 1}', ["UTF-8"]),
        (b"\x80\x04\x95pickle", ["UTF-8"]),
        (b"\0" * 32, ["JSON"]),
    ],
)
def test_a_header_that_is_no_strict_json_is_refused(
    tmp_path: Path, header: str | bytes, words: list[str]
) -> None:
    refuse(raw_file(tmp_path / "x.safetensors", header, bytes(4)), *words)


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_nesting_of_any_depth_is_refused(tmp_path: Path, field: str) -> None:
    """Also where the JSON can just be read and only the complaint would nest too deeply."""
    path = tmp_path / "x.safetensors"

    def message(depth: int) -> str:
        nest = "[" * depth + "]" * depth
        fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]", field: nest}
        texts = ",".join(f'"{name}":{text}' for name, text in fields.items())
        header = '{"w":{' + texts + "}}"
        raw_file(path, header, bytes(4))
        with pytest.raises(CheckpointError) as caught:
            File(path)
        check_message(caught.value, path)
        return str(caught.value)

    readable, too_deep = 2, 200_000
    assert "deep" in message(too_deep)
    while too_deep - readable > 1:
        middle = (readable + too_deep) // 2
        if "deep" in message(middle):
            too_deep = middle
        else:
            readable = middle
    for depth in range(max(2, too_deep - 40), too_deep + 3):
        message(depth)


@pytest.mark.parametrize("length", [1, 100, 2**24 + 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "x.safetensors", b"", length=length)
    refuse(path, "truncated", str(length))


def test_a_header_of_more_than_16_mib_is_refused_unread(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", b"{}", length=2**24 + 1)
    os.truncate(path, 2**40)  # sparse: reading on would take for ever
    start = time.monotonic()
    refuse(path, str(2**24 + 1), "too large")
    assert time.monotonic() - start < 2


def test_a_key_repeated_after_very_many_others_is_refused_at_once(tmp_path: Path) -> None:
    """Linear work only: a hostile header of a megabyte must not take minutes."""
    keys = [f'"k{i}":0' for i in range(30_000)]
    path = raw_file(tmp_path / "x.safetensors", "{" + ",".join([*keys, keys[-1]]) + "}")
    with no_longer_than(3), pytest.raises(CheckpointError, match="twice"):
        File(path)


def test_a_file_with_very_many_tensors_is_read_at_once(tmp_path: Path) -> None:
    header = {f"w{i}": entry("U8", [1], [i, i + 1]) for i in range(10_000)}
    path = raw_file(tmp_path / "x.safetensors", json.dumps(header), bytes(10_000))
    with no_longer_than(10):
        assert len(File(path).entries) == 10_000


def mutations(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one thing in it replaced, dropped or added."""
    junk = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, 4, 24, 2**31, 2**32, 2**62, 2**63, 2**64, -1, 10**4000]),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "BOOL", "F4", "C64"]),
        st.recursive(st.integers(0, 3), lambda s: st.lists(s, max_size=3), max_leaves=6),
        st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
        st.just(entry()),
    )
    options = [junk]
    if isinstance(value, dict) and value:
        for key in value:
            options.append(st.just({k: v for k, v in value.items() if k != key}))
            options.append(mutations(value[key]).map(lambda new, key=key: {**value, key: new}))
        options.append(st.text(max_size=5).flatmap(lambda k: junk.map(lambda v: {**value, k: v})))
    if isinstance(value, list) and value:
        for i in range(len(value)):
            options.append(st.just(value[:i] + value[i + 1 :]))
            options.append(
                mutations(value[i]).map(lambda new, i=i: [*value[:i], new, *value[i + 1 :]])
            )
        options.append(st.just([*value, value[-1]]))
    return st.one_of(options)


def good_header() -> tuple[dict[str, Any], bytes]:
    whole = library_numpy.save(some_tensors())
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@settings(QUICK, max_examples=200)
@given(header=mutations(good_header()[0]), cut=st.integers(-3, 3))
@example(header=good_header()[0], cut=0)
def test_random_header_mutations_are_refused_or_consistent(
    tmp_path: Path, header: Any, cut: int
) -> None:
    data = good_header()[1]
    data = data[:cut] if cut < 0 else data + bytes(cut)
    path = raw_file(tmp_path / "x.safetensors", json.dumps(header), data)
    file = read_or_refuse(path)
    if json.dumps(header) == json.dumps(good_header()[0]):  # as text, where 0 is not False
        assert (file is None) == (cut != 0)
    if file is not None and "__metadata__" not in header:
        assert as_we_read(file) == as_library_reads(path.read_bytes())


@settings(QUICK, max_examples=100)
@given(content=st.binary(max_size=200), prefix=st.booleans())
def test_random_bytes_are_refused_or_consistent(
    tmp_path: Path, content: bytes, prefix: bool
) -> None:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes((struct.pack("<Q", len(content)) if prefix else b"") + content)
    read_or_refuse(path)


# --- what is no file --------------------------------------------------------------------------


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    start = time.monotonic()
    refuse(tmp_path / "x.safetensors", "regular file")
    assert time.monotonic() - start < 2


def test_a_link_to_a_fifo_or_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.safetensors").symlink_to("pipe")
    refuse(tmp_path / "x.safetensors", "regular file")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    refuse(tmp_path / "zero.safetensors", "regular file")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    refuse(tmp_path / "x.safetensors", "regular file")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "x.safetensors", "no such file")


def test_a_dangling_link_and_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("nowhere")
    refuse(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").symlink_to("y.safetensors")
    refuse(tmp_path / "y.safetensors")


@pytest.mark.parametrize("size", range(9))
def test_a_file_of_almost_nothing_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    refuse(tmp_path / "x.safetensors")


def test_a_file_that_changes_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, some_tensors())
    read_header = safetensors._read_header

    def and_shrink(path: Path, *args: Any) -> Any:
        found = read_header(path, *args)
        os.truncate(path, 100)
        return found

    monkeypatch.setattr(safetensors, "_read_header", and_shrink)
    refuse(path, "changed")
