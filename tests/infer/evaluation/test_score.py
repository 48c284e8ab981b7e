"""Scores: the interval against definition and published values, counts against a recount."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.evaluation import score
from infer.evaluation.score import Answer, Evaluation, Score, Speed
from pangu_jax.text.markers import Think

MODES: tuple[Think, ...] = ("fast", "slow", "auto")

draws = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
said = st.text(st.sampled_from("12 \n"), max_size=3)
answers = st.builds(
    Answer,
    task=st.sampled_from(["add", "sort", "date"]),
    difficulty=st.integers(0, 3),
    mode=st.sampled_from(MODES),
    question=said,
    expected=said,
    answer=said,
    thinking=said,
    tokens=st.integers(1, 512),
    cut=st.booleans(),
)


# --- the interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert score.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(draws)
def test_the_bounds_solve_the_score_equation(draw: tuple[int, int]) -> None:
    """They are the two p with (p - k/n)^2 = z^2 p (1 - p) / n; in exact arithmetic."""
    correct, n = draw
    square = Fraction(score.Z) ** 2
    for bound in map(Fraction, score.wilson(correct, n)):
        off = (bound - Fraction(correct, n)) ** 2 - square * bound * (1 - bound) / n
        assert abs(off) < 1e-15
    low, high = score.wilson(correct, n)
    assert high - low > 0.5 * score.Z / (n + score.Z**2)


@given(draws)
def test_an_interval_holds_its_rate(draw: tuple[int, int]) -> None:
    correct, n = draw
    low, high = score.wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert (low == 0) == (correct == 0)
    assert (high == 1) == (correct == n)
    mirrored = score.wilson(n - correct, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    wider = score.wilson(correct * 4, n * 4)
    assert wider[1] - wider[0] < high - low


def test_nothing_is_known_of_nothing() -> None:
    assert score.wilson(0, 0) == (0, 1)


def test_z_is_the_normal_quantile() -> None:
    assert math.erf(score.Z / math.sqrt(2)) == pytest.approx(0.95, abs=1e-15)


# --- what is right


@pytest.mark.parametrize("answer", ["a b", " a b\n", "a  b", "a\t\nb", "a\u3000b"])
def test_white_space_does_not_matter(answer: str) -> None:
    assert score.correct(answer, "a b")


@pytest.mark.parametrize("answer", ["", "ab", "a b.", "A b", "a b c", "432"])
def test_anything_else_does(answer: str) -> None:
    assert not score.correct(answer, "a b")


def test_what_is_cut_is_wrong() -> None:
    whole = Answer("add", 1, "fast", "1 + 1?", "2", "2", "", 3, cut=False)
    assert whole.correct
    assert not Answer("add", 1, "fast", "1 + 1?", "2", "2", "", 3, cut=True).correct
    assert whole.as_json()["correct"] is True


# --- counts


@given(st.lists(answers, max_size=40))
def test_the_tally_is_a_recount(found: list[Answer]) -> None:
    scores = score.tally(found)
    groups = {(s.mode, s.task, s.difficulty): s for s in scores}
    assert len(groups) == len(scores)
    for mode in MODES:
        for task in ("add", "sort", "date", None):
            for difficulty in (0, 1, 2, 3, None):
                group = [
                    a
                    for a in found
                    if a.mode == mode
                    and task in (None, a.task)
                    and difficulty in (None, a.difficulty)
                ]
                if not group:
                    assert (mode, task, difficulty) not in groups
                    continue
                got = groups[mode, task, difficulty]
                right = [a for a in group if not a.cut and a.answer.split() == a.expected.split()]
                assert got.n == len(group)
                assert got.correct == len(right)
                assert got.cut == len([a for a in group if a.cut])
                assert got.accuracy == len(right) / len(group)
                assert got.mean_tokens == sum(a.tokens for a in group) / len(group)
                assert got.interval == score.wilson(len(right), len(group))


@given(st.lists(answers, min_size=1, max_size=40))
def test_scores_merge_to_those_of_all_difficulties(found: list[Answer]) -> None:
    scores = score.tally(found)
    for whole in scores:
        if whole.difficulty is None:
            parts = [
                s
                for s in scores
                if (s.mode, s.task) == (whole.mode, whole.task) and s.difficulty is not None
            ]
            assert score.merge(parts) == whole
    assert score.merge([]) is None


def test_json_has_everything_but_the_answers() -> None:
    answer = Answer("add", 3, "slow", "2 + 2?", "4", "4", "2+2=4", 9, cut=False)
    found = Evaluation(
        score.tally([answer]), (Speed("slow", 90, 3.0, 60, 2.5),), (answer,), max_new_tokens=16
    )
    said = json.loads(json.dumps(found.as_json()))
    assert set(said) == {"max_new_tokens", "scores", "speed"}
    assert [(s["task"], s["difficulty"]) for s in said["scores"]] == [
        ("add", 3),
        ("add", None),
        (None, 3),
        (None, None),
    ]
    low, high = score.wilson(1, 1)
    assert said["scores"][0] == {
        "mode": "slow",
        "task": "add",
        "difficulty": 3,
        "n": 1,
        "correct": 1,
        "cut": 0,
        "tokens": 9,
        "accuracy": 1.0,
        "low": low,
        "high": high,
        "mean_tokens": 9.0,
    }
    assert said["speed"] == [
        {
            "mode": "slow",
            "tokens": 90,
            "seconds": 3.0,
            "tokens_per_s": 60.0,
            "includes_compilation": False,
        }
    ]


def test_a_speed_with_compilation_says_so() -> None:
    cold = Speed("fast", 60, 2.0, 60, 2.0)
    assert cold.includes_compilation
    assert cold.tokens_per_s == 30


def test_scores_are_values() -> None:
    assert Score("fast", None, None, 2, 1, 0, 9) == Score("fast", None, None, 2, 1, 0, 9)
