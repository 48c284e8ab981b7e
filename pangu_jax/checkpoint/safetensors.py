"""The safetensors format: a strict header reader over a memory map, and a writer that streams.

A file is an 8-byte little-endian header length, a JSON header and the tensors' bytes. The reader
holds nothing in memory but the header and checks what the format promises: known dtypes, byte
ranges that match the shapes, follow each other without gap or overlap, and end where the file ends.
"""

import dataclasses
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pangu_jax import strict
from pangu_jax.errors import CheckpointError, ConfigError

MAX_HEADER_BYTES = strict.MAX_TEXT_BYTES
MAX_RANK = 8

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype name, shape and byte range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.start


class File:
    """A checked safetensors file, mapped read-only.

    Raises CheckpointError naming file and tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would block
                raise CheckpointError(f"{path}: not a regular file")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self._data_start = _read_header(path, file, size)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: changed while it was being read") from None

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in the map; its pages are read when touched."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        count = (entry.end - entry.start) // dtype.itemsize
        flat = np.frombuffer(self._map, dtype, count, self._data_start + entry.start)
        return flat.reshape(entry.shape)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Entry], int]:
    """The entries, and where the data section begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated, {size} bytes hold no header")
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise CheckpointError(
            f"{path}: truncated or not safetensors, its header claims {length} bytes of {size}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes is too large")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: the header is not UTF-8, so not safetensors") from None
    try:
        header = strict.parse_json_object(text, f"{path}: header")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: header: __metadata__ must be an object")
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    _check_ranges(path, entries, size - 8 - length)
    return entries, 8 + length


def _entry(path: Path, name: str, fields: Any) -> Entry:
    where = f"{path}: tensor {strict.shorten(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {strict.describe(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: bad shape {strict.describe(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: bad data_offsets {strict.describe(offsets)}")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{where}: {dtype} {shape} does not take the {end - start} bytes of its data_offsets"
        )
    return Entry(dtype, tuple(shape), start, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _check_ranges(path: Path, entries: dict[str, Entry], data_bytes: int) -> None:
    """Every byte of the data section belongs to exactly one tensor."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        where = f"{path}: tensor {strict.shorten(name)}"
        if entry.end > data_bytes:
            raise CheckpointError(
                f"{where}: truncated, it ends at byte {entry.end} of a data section of {data_bytes}"
            )
        if entry.start != at:
            what = "overlaps the one before" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(f"{where}: {what}, at byte {entry.start} instead of {at}")
        at = entry.end
    if at != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - at} bytes at the end belong to no tensor")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor to be written: name, dtype and shape, before its data exists."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, specs: Iterable[Spec], tensors: Iterator[np.ndarray]) -> None:
    """A safetensors file with the tensors of `specs`, drawn one at a time in that order, synced to
    disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    specs, at = list(specs), 0
    for spec in specs:
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise AssertionError(f"{spec.name}: {tensor.dtype}{tensor.shape} is not {spec}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
