"""Rows of one or several sources, shuffled and mixed: batches, each with a number.

A batch depends on its number and the seed alone, so a run can go on, or back, to any.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pangu_jax.errors import InputError
from train.data import packing
from train.data.packing import Packing
from train.data.store import Store
from train.objectives import Batch

# Batches that are made while the device works.
AHEAD = 4

# More than any run takes.
MOST_BATCHES = 2**40

Row = dict[str, np.ndarray]


class Rows:
    """The examples of a store packed into rows of one length.

    cut: longer examples are cut into pieces, each beginning with the last token of the one before,
        since no other token predicts it there; else they are left out
    """

    def __init__(self, store: Store, length: int, how: Packing, cut: bool) -> None:
        self._store, self._length = store, length
        ends = np.asarray(store.ends)
        begins = np.concatenate([np.zeros(min(1, ends.size), np.int64), ends[:-1]])
        sizes = ends - begins
        long = sizes > length
        self.left_out, self.longest = (0 if cut else int(long.sum())), int(sizes.max(initial=0))
        if not cut:
            begins, ends = begins[~long], ends[~long]
        self._begins, self._sizes = _pieces(begins, ends, length)
        self._packed = packing.pack(self._sizes, length, how)
        self.filled = self._sizes.sum() / max(len(self) * length, 1)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> Row:
        """`tokens`, `segments` and `learn` of one row."""
        starts = self._packed.starts
        tokens, segments = np.zeros((2, self._length), np.int32)
        learn = np.zeros(self._length, bool)
        end = 0
        for number, piece in enumerate(self._packed.members[starts[row] : starts[row + 1]], 1):
            begin, size = self._begins[piece], self._sizes[piece]
            here, there = slice(end, end + size), slice(begin, begin + size)
            tokens[here], segments[here] = self._store.tokens[there], number
            learn[here] = self._store.learn[there]
            end += size
        return {"tokens": tokens, "segments": segments, "learn": learn}


def _pieces(begins: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where every piece begins, and its size; the pieces of an example overlap by a token."""
    counts = np.maximum(-(-(ends - begins - 1) // (length - 1)), 1)
    first = np.cumsum(counts) - counts
    place = np.arange(counts.sum()) - np.repeat(first, counts)
    piece = np.repeat(begins, counts) + place * (length - 1)
    return piece, np.minimum(np.repeat(ends, counts) - piece, length)


class Shuffled:
    """All rows in one order after another, without end."""

    def __init__(self, rows: Any, seed: tuple[int, ...]) -> None:
        self._rows = rows
        order = lambda epoch: np.random.default_rng((*seed, epoch)).permutation(len(rows))
        self._order = functools.lru_cache(maxsize=2)(order)  # a batch may lie in two passes

    def __len__(self) -> int:
        return MOST_BATCHES

    def __getitem__(self, place: int) -> Row:
        epoch, place = divmod(place, len(self._rows))
        return self._rows[int(self._order(epoch)[place])]


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What Grain reads ahead: the own rows of batch after batch."""

    rows: Any
    batch: int
    own: Sequence[int]

    def __len__(self) -> int:
        return MOST_BATCHES

    def __getitem__(self, number: int) -> Row:
        found = [self.rows[number * self.batch + row] for row in self.own]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


class Feed:
    """The batches of a mixture.

    sources: rows by name; each has its weight's part of all rows
    seed: one number, or several
    own: the rows of a batch that this process is to have; None for all
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        weights: Mapping[str, float],
        batch: int,
        seed: int | tuple[int, ...],
        own: Sequence[int] | None = None,
    ) -> None:
        grain = _grain()
        total = sum(weights.values())
        named = sorted(weights)
        seeds = seed if isinstance(seed, tuple) else (seed,)
        rows = [Shuffled(sources[name], (*seeds, *name.encode())) for name in named]
        mixed = rows[0]
        if len(rows) > 1:
            mixed = grain.MapDataset.mix(
                [grain.MapDataset.source(source) for source in rows],
                [weights[name] / total for name in named],
            )
        self._batches = grain.MapDataset.source(
            _Batches(mixed, batch, range(batch) if own is None else own)
        )

    def __getitem__(self, number: int) -> Batch:
        return packing.batch(**self._batches[number])

    def since(self, number: int) -> Iterator[Batch]:
        """The batches from a number on, made ahead."""
        options = _grain().ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        for rows in self._batches[number:].to_iter_dataset(options):
            yield packing.batch(**rows)


def _grain() -> Any:
    try:
        import grain
    except ImportError:
        raise InputError("training needs Grain: pip install 'pangu-jax[train]'") from None
    return grain
