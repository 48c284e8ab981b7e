"""Rows hold every example, batches every row; a batch depends on its number and the seed alone."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing
from train.data.feed import Feed, Rows, Shuffled
from train.data.packing import Packing
from train.data.store import Store
from train.objectives import Batch

METHODS: tuple[Packing, ...] = ("knapsack", "first-fit")
NUMBER = 1000

given_few = settings(max_examples=40, deadline=None)

# --- rows

Piece = list[tuple[int, bool]]


def examples_of(sizes: list[int], seed: int) -> list[Piece]:
    """Examples whose tokens say where they come from: NUMBER * (number + 1) + place."""
    rng = np.random.default_rng(seed)
    return [
        [(NUMBER * number + place, bool(rng.random() < 0.5)) for place in range(size)]
        for number, size in enumerate(sizes, 1)
    ]


def store_of(examples: list[Piece]) -> Store:
    flat = [pair for example in examples for pair in example]
    tokens = np.array([token for token, _ in flat], np.int32)
    learn = np.array([learnt for _, learnt in flat], bool)
    ends = np.array([*itertools.accumulate(len(example) for example in examples)], np.int64)
    return Store(tokens, learn, ends, 0, 0)


def pieces_of(example: Piece, length: int) -> list[Piece]:
    """Each begins with the last token of the one before."""
    found, begin = [example[:length]], 0
    while begin + length < len(example):
        begin += length - 1
        found.append(example[begin : begin + length])
    return found


def unpacked(row: dict[str, np.ndarray], length: int) -> list[Piece]:
    """The pieces of a row, which lie side by side from the left."""
    tokens, segments, learn = (row[name].tolist() for name in ("tokens", "segments", "learn"))
    assert len(tokens) == len(segments) == len(learn) == length
    found: list[Piece] = []
    for place, segment in enumerate(segments):
        if segment == 0:
            assert segments[place:] == tokens[place:] == learn[place:] == [0] * (length - place)
            break
        if segment > len(found):
            found.append([])
        assert segment == len(found)
        found[-1].append((tokens[place], learn[place]))
    return found


def count(pieces: list[Piece]) -> Counter:
    return Counter(map(tuple, pieces))


sizes = st.lists(st.integers(1, 30), max_size=12)


@pytest.mark.parametrize("how", METHODS)
@given(sizes=sizes, length=st.integers(2, 12), seed=st.integers(0, 99))
@given_few
def test_long_examples_are_cut_into_pieces_that_share_a_token(
    how: Packing, sizes: list[int], length: int, seed: int
) -> None:
    examples = examples_of(sizes, seed)
    rows = Rows(store_of(examples), length, how, cut=True)
    found = [piece for row in range(len(rows)) for piece in unpacked(rows[row], length)]
    expected = [piece for example in examples for piece in pieces_of(example, length)]
    assert count(found) == count(expected)
    assert rows.left_out == 0
    assert rows.longest == max(sizes, default=0)
    assert rows.filled == pytest.approx(sum(map(len, expected)) / max(len(rows) * length, 1))


@pytest.mark.parametrize("how", METHODS)
@given(sizes=sizes, length=st.integers(2, 12), seed=st.integers(0, 99))
@given_few
def test_long_examples_are_left_out_and_counted(
    how: Packing, sizes: list[int], length: int, seed: int
) -> None:
    examples = examples_of(sizes, seed)
    rows = Rows(store_of(examples), length, how, cut=False)
    found = [piece for row in range(len(rows)) for piece in unpacked(rows[row], length)]
    expected = [example for example in examples if len(example) <= length]
    assert count(found) == count(expected)
    assert rows.left_out == len(examples) - len(expected)
    assert rows.longest == max(sizes, default=0)
    assert rows.filled == pytest.approx(sum(map(len, expected)) / max(len(rows) * length, 1))


@given(sizes=sizes, length=st.integers(2, 12), seed=st.integers(0, 99))
@given_few
def test_every_token_but_the_first_is_predicted_once(
    sizes: list[int], length: int, seed: int
) -> None:
    """From the one before it, wherever an example is cut."""
    examples = examples_of(sizes, seed)
    rows = Rows(store_of(examples), length, "knapsack", cut=True)
    found = []
    for row in range(len(rows)):
        batch = packing.batch(**{name: cells[None] for name, cells in rows[row].items()})
        places = np.nonzero(batch.weights[0])[0]
        found += [(int(batch.tokens[0, t]), int(batch.targets[0, t])) for t in places]
    expected = [
        (before, after)
        for example in examples
        for (before, _), (after, learnt) in itertools.pairwise(example)
        if learnt
    ]
    assert sorted(found) == expected


def test_rows_are_packed_as_they_are_told() -> None:
    store = store_of(examples_of([2, 5, 3, 5, 1, 4], 0))
    numbers = {
        how: [
            [piece[0][0] // NUMBER for piece in unpacked(row, 8)]
            for row in map(Rows(store, 8, how, cut=True).__getitem__, range(3))
        ]
        for how in METHODS
    }
    assert numbers == {
        "knapsack": [[2, 3], [4, 1, 5], [6]],
        "first-fit": [[1, 2, 5], [3, 4], [6]],
    }


# --- batches


class Plain:
    """Rows that are each known by their first token."""

    def __init__(self, rows: int, first: int = 0) -> None:
        self._rows, self._first = rows, first

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        assert 0 <= row < self._rows
        tokens = np.array([self._first + row, 7, 7], np.int32)
        return {"tokens": tokens, "segments": np.ones(3, np.int32), "learn": np.ones(3, bool)}


def rows_in(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def stream(feed: Feed, rows: int, batch: int) -> list[int]:
    """The first rows of all."""
    found = [row for number in range(-(-rows // batch)) for row in rows_in(feed[number])]
    return found[:rows]


def same(a: Batch, b: Batch) -> None:
    for name in ("tokens", "targets", "segments", "positions", "weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(rows=st.integers(1, 20), seed=st.integers(0, 2**31 - 1), epochs=st.integers(1, 4))
@given_few
def test_every_epoch_has_every_row_once(rows: int, seed: int, epochs: int) -> None:
    shuffled = Shuffled(Plain(rows), (seed, 1))
    for epoch in range(epochs):
        places = range(epoch * rows, (epoch + 1) * rows)
        assert sorted(int(shuffled[place]["tokens"][0]) for place in places) == [*range(rows)]


def test_epochs_seeds_and_names_have_orders_of_their_own() -> None:
    """Of 30 rows: one order in 10^32 is the same by chance."""
    orders = [
        tuple(stream(Feed({name: Plain(30)}, {name: 1.0}, 6, seed), 90, 6)[begin : begin + 30])
        for name in ("a", "b", "aa")
        for seed in (0, 1, 2**31 - 1)
        for begin in (0, 30, 60)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(30)) not in orders


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
    numbers=st.lists(st.integers(0, 20), min_size=1, max_size=4),
)
@given_few
def test_a_batch_depends_on_its_number_and_the_seed_alone(
    rows: list[int], batch: int, seed: int, numbers: list[int]
) -> None:
    """Not on what was asked for before, nor on how many rows a batch has: all are of one stream."""

    def feed(batch: int) -> Feed:
        sources = {f"s{i}": Plain(count, 100 * i) for i, count in enumerate(rows)}
        return Feed(sources, {name: 1.0 + i for i, name in enumerate(sources)}, batch, seed)

    ones = stream(feed(1), (max(numbers) + 1) * batch, 1)
    again = feed(batch)
    for number in numbers:
        assert rows_in(again[number]) == ones[number * batch : (number + 1) * batch]
        same(again[number], feed(batch)[number])


def test_a_batch_is_what_packing_makes_of_its_rows() -> None:
    store = store_of(examples_of([3, 9, 2, 5, 5, 1, 8], 1))
    rows = Rows(store, 9, "knapsack", cut=True)
    known = {tuple(rows[row]["tokens"].tolist()): row for row in range(len(rows))}
    batch = Feed({"a": rows}, {"a": 1.0}, len(rows), 0)[0]
    order = [known[tuple(tokens)] for tokens in batch.tokens.tolist()]
    assert sorted(order) == [*range(len(rows))]
    names = ("tokens", "segments", "learn")
    same(batch, packing.batch(**{n: np.stack([rows[row][n] for row in order]) for n in names}))


def mixture(seed: int = 3, batch: int = 3, own: Sequence[int] | None = None) -> Feed:
    sources = {"a": Plain(5), "b": Plain(7, 100), "c": Plain(1, 200)}
    return Feed(sources, {"a": 1.0, "b": 2.5, "c": 0.5}, batch, seed, own)


@pytest.mark.parametrize("begin", [0, 1, 6, 100])
def test_batches_since_a_number_are_those_of_the_numbers(begin: int) -> None:
    feed = mixture()
    for number, batch in enumerate(itertools.islice(feed.since(begin), 12), begin):
        same(batch, feed[number])


def test_another_seed_gives_other_batches() -> None:
    orders = {tuple(stream(mixture(seed), 60, 3)) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize(
    "parts", [[[0, 1], [2, 3], [4, 5]], [[0, 3], [1, 4], [2, 5]], [[5], [4, 3, 2, 1, 0]]]
)
def test_the_rows_of_all_processes_are_the_whole_batch(parts: list[list[int]]) -> None:
    whole, feeds = mixture(batch=6), [mixture(batch=6, own=own) for own in parts]
    since = [feed.since(4) for feed in feeds]
    for number in range(4, 10):
        read = [next(batches) for batches in since]
        for name in ("tokens", "targets", "segments", "positions", "weights"):
            together: Any = np.zeros_like(getattr(whole[number], name))
            for own, feed, ahead in zip(parts, feeds, read, strict=True):
                together[own] = getattr(feed[number], name)
                np.testing.assert_array_equal(getattr(ahead, name), together[own])
            np.testing.assert_array_equal(together, getattr(whole[number], name))


# --- mixing


@given(
    weights=st.lists(st.integers(1, 20) | st.floats(0.05, 20.0), min_size=2, max_size=5),
    batch=st.integers(1, 4),
)
@settings(max_examples=15, deadline=None)
def test_every_source_has_its_part_of_all_rows(weights: list[float], batch: int) -> None:
    """Of n sources, within n - 1 rows and 1.1% of it after any number of rows: Grain rounds weights
    to 1% of the smallest, and each source's part to whole rows of what the ones before it leave.
    """
    names = [f"s{i}" for i in range(len(weights))]
    sources = {name: Plain(11, 100 * i) for i, name in enumerate(names)}
    feed = Feed(sources, {n: float(w) for n, w in zip(names, weights, strict=True)}, batch, 0)
    seen: list[list[int]] = [[] for _ in names]
    for total, row in enumerate(stream(feed, 250, batch), 1):
        seen[row // 100].append(row % 100)
        for rows, weight in zip(seen, weights, strict=True):
            exact = total * weight / sum(weights)
            assert abs(len(rows) - exact) <= len(weights) - 1 + 0.011 * exact
    for rows in seen:  # and none of its rows again before all were there
        for begin in range(0, len(rows) - 10, 11):
            assert sorted(rows[begin : begin + 11]) == [*range(11)]


def test_two_sources_have_their_parts_at_every_row() -> None:
    feed = Feed({"a": Plain(9), "b": Plain(9, 100)}, {"a": 1.0, "b": 3.0}, 2, 0)
    rows = np.array(stream(feed, 400, 2)) < 100
    assert (np.abs(np.cumsum(rows) - np.arange(1, 401) / 4) < 1).all()


def test_only_what_weights_are_to_each_other_counts() -> None:
    sources = {"a": Plain(5), "b": Plain(7, 100)}
    small, large = (
        Feed(sources, {"a": 0.5 * scale, "b": 1.5 * scale}, 4, 0) for scale in (2.0**-20, 2.0**20)
    )
    assert stream(small, 80, 4) == stream(large, 80, 4)
    turned = Feed(dict(reversed(sources.items())), {"b": 1.5, "a": 0.5}, 4, 0)
    assert stream(small, 80, 4) == stream(turned, 80, 4)
