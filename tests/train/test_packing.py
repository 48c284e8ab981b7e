"""Packing: every example once and whole, none sees or predicts another."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.objectives import Batch
from train.packing import Example, Rows, pack

LENGTH = 12
LONGEST = 100

sizes = st.lists(st.integers(1, LENGTH), min_size=1, max_size=25)


def examples_of(sizes: list[int], seed: int = 0) -> list[Example]:
    """Examples whose tokens say where they come from: LONGEST * (number + 1) + place."""
    rng = random.Random(seed)
    return [
        Example(
            np.arange(size, dtype=np.int32) + np.int32(LONGEST * (number + 1)),
            np.array([rng.random() < 0.5 for _ in range(size)]),
        )
        for number, size in enumerate(sizes)
    ]


def whole(rows: Rows) -> Batch:
    return rows.batch(np.arange(len(rows)))


def runs(segments: np.ndarray) -> list[tuple[int, int, int]]:
    """(segment, start, end) of every run of equal segments in a row, padding left out."""
    found: list[tuple[int, int, int]] = []
    for place, segment in enumerate(segments.tolist()):
        if segment == 0:
            continue
        if found and found[-1][0] == segment and found[-1][2] == place:
            found[-1] = (segment, found[-1][1], place + 1)
        else:
            found.append((segment, place, place + 1))
    return found


def best_fit_decreasing(sizes: list[int], length: int) -> list[int]:
    """How full the rows are, sorted."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        if fitting := [room for room in rooms if room >= size]:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(length - size)
    return sorted(length - room for room in rooms)


def first_fit(sizes: list[int], length: int) -> int:
    """Rows that take every example where it first fits, in the order of the data."""
    filled: list[int] = []
    for size in sizes:
        for row, used in enumerate(filled):
            if used + size <= length:
                filled[row] += size
                break
        else:
            filled.append(size)
    return len(filled)


@given(sizes, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_example_is_whole_in_one_row_once(sizes: list[int], seed: int) -> None:
    examples = examples_of(sizes, seed)
    rows = pack(examples, LENGTH)
    seen = []
    for tokens, segments, learn in zip(rows.tokens, rows.segments, rows.learn, strict=True):
        found = runs(segments)
        assert [segment for segment, _, _ in found] == list(range(1, len(found) + 1))
        # Side by side from the left; what is left over is one stretch of padding.
        assert [start for _, start, _ in found] == [0, *(end for _, _, end in found[:-1])]
        assert not segments[found[-1][2] :].any()
        assert not tokens[segments == 0].any()
        assert not learn[segments == 0].any()
        for _, start, end in found:
            number = int(tokens[start]) // LONGEST - 1
            seen.append(number)
            np.testing.assert_array_equal(tokens[start:end], examples[number].ids)
            np.testing.assert_array_equal(learn[start:end], examples[number].learn)
    assert sorted(seen) == list(range(len(examples)))


@given(sizes, st.integers(0, 99), st.data())
@settings(max_examples=80, deadline=None)
def test_a_batch_place_by_place(sizes: list[int], seed: int, data: st.DataObject) -> None:
    examples = examples_of(sizes, seed)
    rows = pack(examples, LENGTH)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = rows.batch(np.array(chosen))
    assert batch.tokens.shape == (len(chosen), LENGTH)
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "targets", "weights")}
    assert kinds == {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    assert batch.segments.dtype == batch.positions.dtype == np.int32
    for b, row in enumerate(chosen):
        np.testing.assert_array_equal(batch.tokens[b], rows.tokens[row])
        np.testing.assert_array_equal(batch.segments[b], rows.segments[row])
        for t in range(LENGTH):
            token = int(batch.tokens[b, t])
            if batch.segments[b, t] == 0:
                assert batch.weights[b, t] == 0
                continue
            number, place = token // LONGEST - 1, token % LONGEST
            assert batch.positions[b, t] == place
            if place + 1 == sizes[number]:
                assert batch.weights[b, t] == 0
            else:
                assert batch.targets[b, t] == token + 1
                assert batch.weights[b, t] == float(examples[number].learn[place + 1])


@given(sizes, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_weight_is_lost(sizes: list[int], seed: int) -> None:
    examples = examples_of(sizes, seed)
    batch = whole(pack(examples, LENGTH))
    assert batch.weights.sum() == sum(int(example.learn[1:].sum()) for example in examples)


@given(sizes, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_same_examples_give_the_same_rows(sizes: list[int], seed: int) -> None:
    a = pack(examples_of(sizes, seed), LENGTH)
    b = pack(iter(examples_of(sizes, seed)), LENGTH)
    for name in ("tokens", "segments", "learn"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(sizes)
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_best_fit_decreasing(sizes: list[int]) -> None:
    rows = pack(examples_of(sizes), LENGTH)
    fills = (rows.segments > 0).sum(1).tolist()
    assert sorted(fills) == best_fit_decreasing(sizes, LENGTH)
    assert rows.filled == pytest.approx(sum(sizes) / (len(rows) * LENGTH))
    # Otherwise one could have taken in the other.
    assert len(fills) == 1 or sum(sorted(fills)[:2]) > LENGTH
    assert math.ceil(sum(sizes) / LENGTH) <= len(rows) <= first_fit(sizes, LENGTH) * 11 / 9 + 1


@pytest.mark.parametrize("seed", range(5))
def test_many_examples_waste_less_than_first_fit_in_their_order(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [min(99, 2 + int(rng.expovariate(1 / 30))) for _ in range(400)]
    assert len(pack(examples_of(sizes), 99)) < first_fit(sizes, 99)


def test_edges() -> None:
    full, single, pair = examples_of([2, 1, 2])
    rows = pack([full, single, pair], 2)
    assert sorted(rows.tokens.tolist()) == [[100, 101], [200, 0], [300, 301]]
    ones = pack(examples_of([1] * 5), 2)
    assert len(ones) == 3
    assert not whole(ones).weights.any()
    assert whole(ones).positions[(ones.segments > 0)].tolist() == [0] * 5
    exact = pack(examples_of([LENGTH] * 3), LENGTH)
    assert (exact.segments == 1).all()
    assert exact.filled == 1.0
    # The last target would be that of another example, if there were one.
    assert not whole(exact).weights[:, -1].any()
    assert whole(exact).positions.tolist() == [list(range(LENGTH))] * 3


@pytest.mark.parametrize("sizes", [[LENGTH + 1], [1, LENGTH + 1, 2], [5 * LENGTH]])
def test_what_does_not_fit_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{max(sizes)} tokens does not fit into {LENGTH}"):
        pack(examples_of(sizes), LENGTH)


def test_nothing_makes_no_rows() -> None:
    rows = pack([], LENGTH)
    assert len(rows) == 0
    assert rows.tokens.shape == (0, LENGTH)
