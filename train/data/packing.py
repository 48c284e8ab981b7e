"""Short examples side by side in rows of one length, so that little of a batch is padding."""

import bisect
import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from train.objectives import Batch

Packing = Literal["knapsack", "first-fit"]

# Rows that first-fit keeps open at a time; when nothing fits, the fullest is closed (own choice).
OPEN = 64


@dataclasses.dataclass(frozen=True)
class Packed:
    """Which pieces lie in which row: row r holds `members[starts[r] : starts[r + 1]]`, in order."""

    members: Int[np.ndarray, " P"]
    starts: Int[np.ndarray, " Q"]

    def __len__(self) -> int:
        return len(self.starts) - 1


def pack(sizes: Int[np.ndarray, " P"], length: int, how: Packing = "knapsack") -> Packed:
    """Every piece whole in a row of `length`.

    knapsack: a row is filled with the largest piece that still fits, again and again (greedy);
        little is left over, and rows of many short pieces come last
    first-fit: pieces in their order, each into the first open row with room for it

    Raises ValueError for a piece longer than `length`.
    """
    if sizes.size and sizes.max() > length:
        raise ValueError(f"a piece of {sizes.max()} tokens does not fit into {length}")
    rows = (_knapsack if how == "knapsack" else _first_fit)(sizes.tolist(), length)
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    members = np.array([piece for row in rows for piece in row], np.int64)
    return Packed(members, np.concatenate([np.zeros(1, np.int64), ends]))


def _knapsack(sizes: list[int], length: int) -> list[list[int]]:
    waiting: dict[int, list[int]] = {}
    for piece in reversed(range(len(sizes))):  # of equal ones the first is taken first
        waiting.setdefault(sizes[piece], []).append(piece)
    kinds, rows = sorted(waiting), []
    while kinds:
        room, row = length, []
        while place := bisect.bisect_right(kinds, room):
            size = kinds[place - 1]
            row.append(waiting[size].pop())
            room -= size
            if not waiting[size]:
                del kinds[place - 1]
        rows.append(row)
    return rows


def _first_fit(sizes: list[int], length: int) -> list[list[int]]:
    rooms = np.full(OPEN, length)
    rows: list[list[int]] = [[] for _ in range(OPEN)]
    closed = []
    for piece, size in enumerate(sizes):
        place = int(np.argmax(rooms >= size))
        if rooms[place] < size:
            place = int(np.argmin(rooms))
            closed.append(rows[place])
            rows[place], rooms[place] = [], length
        rows[place].append(piece)
        rooms[place] -= size
    return closed + [row for row in rows if row]


def batch(tokens: Any, segments: Any, learn: Any) -> Batch:
    """Rows as a step takes them. No example predicts the first token of another.

    tokens, segments, learn: [B, T]; segments count 1, 2, ... within a row and are 0 for padding
    """
    after = lambda x: np.pad(x[:, 1:], [(0, 0), (0, 1)])
    inside = (after(segments) == segments) & (segments > 0)
    new = np.diff(segments, axis=1, prepend=0) != 0
    place = np.arange(tokens.shape[1])[None, :]
    begin = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    return Batch(
        tokens=tokens,
        targets=after(tokens),
        segments=segments,
        positions=(place - begin).astype(np.int32),
        weights=(after(learn) & inside).astype(np.float32),
    )
