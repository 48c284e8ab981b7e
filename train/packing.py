"""Short examples side by side in rows of one length, so that little of a batch is padding."""

import bisect
import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from train.objectives import Batch


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids, and which of them are to be learnt."""

    ids: Int[np.ndarray, " T"]
    learn: Bool[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed examples: `segments` counts 1, 2, ... within a row and is 0 for padding."""

    tokens: Int[np.ndarray, "R T"]
    segments: Int[np.ndarray, "R T"]
    learn: Bool[np.ndarray, "R T"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def filled(self) -> float:
        """The part of all places that is not padding."""
        return float((self.segments > 0).mean())

    def batch(self, rows: Int[np.ndarray, " B"]) -> Batch:
        """The named rows as a step takes them. No example predicts the first token of another."""
        tokens, segments, learn = self.tokens[rows], self.segments[rows], self.learn[rows]
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


def pack(examples: Iterable[Example], length: int) -> Rows:
    """Each example whole in a row of `length`: the longest first, each where least room is left
    over (best fit, decreasing).

    Raises ValueError for an example longer than `length`.
    """
    by_room: dict[int, list[list[Example]]] = {}
    rooms: list[int] = []  # its keys in order; a row without room is in none
    full: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -example.ids.size):
        size = example.ids.size
        if size > length:
            raise ValueError(f"an example of {size} tokens does not fit into {length}")
        place = bisect.bisect_left(rooms, size)
        room, row = length, []
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        row.append(example)
        if room == size:
            full.append(row)
            continue
        if room - size not in by_room:
            by_room[room - size] = []
            bisect.insort(rooms, room - size)
        by_room[room - size].append(row)
    return _rows([*full, *(row for room in rooms for row in by_room[room])], length)


def _rows(packed: list[list[Example]], length: int) -> Rows:
    shape = (len(packed), length)
    rows = Rows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for r, examples in enumerate(packed):
        end = 0
        for number, example in enumerate(examples, 1):
            start, end = end, end + example.ids.size
            rows.tokens[r, start:end] = example.ids
            rows.segments[r, start:end] = number
            rows.learn[r, start:end] = example.learn
    return rows
