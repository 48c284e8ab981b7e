"""Packing: every piece once and whole; a batch, place by place."""

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing
from train.data.packing import OPEN, Packed, Packing, pack
from train.objectives import Batch

LENGTH = 12
METHODS: tuple[Packing, ...] = ("knapsack", "first-fit")

sizes = st.lists(st.integers(1, LENGTH), max_size=25)
many_sizes = st.lists(st.integers(0, LENGTH), max_size=25) | st.builds(
    lambda seed, few: [random.Random(seed + i).randint(few, LENGTH) for i in range(4 * OPEN)],
    st.integers(0, 2**20),
    st.integers(1, LENGTH - 1),
)

given_sizes = settings(max_examples=100, deadline=None)


def packed(sizes: list[int], length: int = LENGTH, how: Packing = "knapsack") -> Packed:
    return pack(np.array(sizes, np.int64), length, how)


def rows_of(found: Packed) -> list[list[int]]:
    """The pieces of every row."""
    members, starts = found.members.tolist(), found.starts.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(members)
    return [members[starts[row] : starts[row + 1]] for row in range(len(found))]


def greedy(sizes: list[int], length: int) -> list[list[int]]:
    """Of the pieces that still fit the largest, of equal ones the first; else another row."""
    left, rows = list(range(len(sizes))), []
    while left:
        room, row = length, []
        while fitting := [piece for piece in left if sizes[piece] <= room]:
            best = max(fitting, key=lambda piece: (sizes[piece], -piece))
            row.append(best)
            left.remove(best)
            room -= sizes[best]
        rows.append(row)
    return rows


def first_fit(sizes: list[int], length: int, places: int) -> list[list[int]]:
    """Every piece into the first place with room; where there is none, the first of the fullest
    rows is done, and another one is begun in its place.
    """
    done: list[list[int]] = []
    rows: list[list[int]] = [[] for _ in range(places)]
    for piece, size in enumerate(sizes):
        rooms = [length - sum(sizes[each] for each in row) for row in rows]
        fitting = [place for place in range(places) if rooms[place] >= size]
        if not fitting:
            fitting = [rooms.index(min(rooms))]
            done.append(rows[fitting[0]])
            rows[fitting[0]] = []
        rows[fitting[0]].append(piece)
    return done + [row for row in rows if row]


@pytest.mark.parametrize("how", METHODS)
@given(sizes=many_sizes)
@given_sizes
def test_every_piece_is_in_one_row_once(how: Packing, sizes: list[int]) -> None:
    rows = rows_of(packed(sizes, how=how))
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    assert all(rows)
    assert all(sum(sizes[piece] for piece in row) <= LENGTH for row in rows)


@given(sizes=many_sizes)
@given_sizes
def test_knapsack_takes_the_largest_that_fits(sizes: list[int]) -> None:
    assert rows_of(packed(sizes)) == greedy(sizes, LENGTH)


@given(sizes=many_sizes)
@given_sizes
def test_first_fit_takes_pieces_in_their_order(sizes: list[int]) -> None:
    assert rows_of(packed(sizes, how="first-fit")) == first_fit(sizes, LENGTH, OPEN)


@given(sizes=sizes, places=st.integers(1, 4))
@given_sizes
def test_first_fit_keeps_a_few_rows_open(sizes: list[int], places: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN", places)
        assert rows_of(packed(sizes, how="first-fit")) == first_fit(sizes, LENGTH, places)


@given(sizes=sizes)
@given_sizes
def test_knapsack_wastes_little(sizes: list[int]) -> None:
    """No two rows could be one, so it has at most twice the rows that are needed."""
    fills = sorted(sum(sizes[piece] for piece in row) for row in rows_of(packed(sizes)))
    assert sum(fills) == sum(sizes)
    assert len(fills) < 2 or sum(fills[:2]) > LENGTH
    assert math.ceil(sum(sizes) / LENGTH) <= len(fills) <= len(sizes)


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_wastes_less_than_first_fit(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [min(99, 2 + int(rng.expovariate(1 / 30))) for _ in range(400)]
    assert len(packed(sizes, 99)) < len(packed(sizes, 99, "first-fit"))


def test_by_hand() -> None:
    sizes = [2, 5, 3, 5, 1, 4]
    assert rows_of(packed(sizes, 8)) == [[1, 2], [3, 0, 4], [5]]
    assert rows_of(packed(sizes, 8, "first-fit")) == [[0, 1, 4], [2, 3], [5]]


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("sizes", [[LENGTH + 1], [1, LENGTH + 1, 2], [5 * LENGTH]])
def test_what_does_not_fit_is_refused(sizes: list[int], how: Packing) -> None:
    with pytest.raises(ValueError, match=f"{max(sizes)} tokens does not fit into {LENGTH}"):
        packed(sizes, how=how)


@pytest.mark.parametrize("how", METHODS)
def test_nothing_makes_no_rows(how: Packing) -> None:
    assert rows_of(packed([], how=how)) == []


@pytest.mark.parametrize("how", METHODS)
def test_hundreds_of_thousands_of_pieces_are_packed(how: Packing) -> None:
    """What takes quadratic time would take hours."""
    sizes = np.random.default_rng(0).integers(1, 2048, 200_000)
    found = pack(sizes, 2048, how)
    np.testing.assert_array_equal(np.sort(found.members), np.arange(sizes.size))
    assert np.add.reduceat(sizes[found.members], found.starts[:-1]).max() <= 2048


# --- batches


def drawn_rows(rows: list[list[tuple[int, list[bool]]]]) -> dict[str, np.ndarray]:
    """Rows of examples, each a first token and, of every token, whether it is learnt."""
    found: dict[str, Any] = {name: [] for name in ("tokens", "segments", "learn")}
    for row in rows:
        tokens, segments, learn = [], [], []
        for number, (first, chosen) in enumerate(row, 1):
            tokens += range(first, first + len(chosen))
            segments += [number] * len(chosen)
            learn += chosen
        left = LENGTH - len(tokens)
        found["tokens"].append(tokens + [0] * left)
        found["segments"].append(segments + [0] * left)
        found["learn"].append(learn + [False] * left)
    kinds = {"tokens": np.int32, "segments": np.int32, "learn": bool}
    return {name: np.array(found[name], kind) for name, kind in kinds.items()}


examples = st.tuples(st.integers(1, 99), st.lists(st.booleans(), min_size=1, max_size=LENGTH))
full_rows = st.lists(examples, max_size=6).filter(
    lambda row: sum(len(learn) for _, learn in row) <= LENGTH
)


@given(rows=st.lists(full_rows, min_size=1, max_size=4))
@given_sizes
def test_a_batch_place_by_place(rows: list[list[tuple[int, list[bool]]]]) -> None:
    plain = drawn_rows(rows)
    batch = packing.batch(**plain)
    assert isinstance(batch, Batch)
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "targets", "segments")}
    assert set(kinds.values()) == {np.dtype(np.int32)}
    assert (batch.positions.dtype, batch.weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(batch.tokens, plain["tokens"])
    np.testing.assert_array_equal(batch.segments, plain["segments"])
    for r, row in enumerate(rows):
        place = 0
        for first, learn in row:
            for i in range(len(learn)):
                assert batch.positions[r, place] == i
                if i + 1 < len(learn):
                    assert batch.targets[r, place] == first + i + 1
                    assert batch.weights[r, place] == float(learn[i + 1])
                else:  # what follows is another example's
                    assert batch.weights[r, place] == 0
                place += 1
        assert not batch.weights[r, place:].any()


@given(rows=st.lists(full_rows, min_size=1, max_size=4))
@given_sizes
def test_no_target_is_lost(rows: list[list[tuple[int, list[bool]]]]) -> None:
    batch = packing.batch(**drawn_rows(rows))
    assert batch.weights.sum() == sum(sum(learn[1:]) for row in rows for _, learn in row)


@given(rows=st.lists(full_rows, min_size=1, max_size=4))
@given_sizes
def test_padding_counts_for_nothing_whatever_is_said_of_it(
    rows: list[list[tuple[int, list[bool]]]],
) -> None:
    plain = drawn_rows(rows)
    everywhere = plain["learn"] | (plain["segments"] == 0)
    said = packing.batch(plain["tokens"], plain["segments"], everywhere)
    np.testing.assert_array_equal(said.weights, packing.batch(**plain).weights)


def test_edges_of_rows() -> None:
    whole, half = (1, [True] * LENGTH), (50, [True] * (LENGTH // 2))
    batch = packing.batch(**drawn_rows([[whole], [half, half], []]))
    # The last target would be that of another example, if there were one.
    assert batch.weights[0].tolist() == [1.0] * (LENGTH - 1) + [0.0]
    assert batch.weights[1].tolist() == ([1.0] * (LENGTH // 2 - 1) + [0.0]) * 2
    assert not batch.weights[2].any()
    assert batch.positions[:2].tolist() == [[*range(LENGTH)], [*range(LENGTH // 2)] * 2]
