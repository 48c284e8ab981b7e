"""Answers to scores: which are right, how often, and within what bounds."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pangu_jax.text.markers import Think

# Of the normal distribution, 95% lie within so many standard deviations.
Z = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to a problem.

    thinking, answer: as `parse` takes an output apart
    tokens: how many were generated
    cut: it had not ended at the most tokens, or at the model's last position
    """

    task: str
    difficulty: int
    mode: Think
    question: str
    expected: str
    answer: str
    thinking: str
    tokens: int
    cut: bool

    @property
    def correct(self) -> bool:
        """Whether it is the expected answer; one that was cut is not, whatever it says."""
        return not self.cut and correct(self.answer, self.expected)

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        return {**dataclasses.asdict(self), "correct": self.correct}


@dataclasses.dataclass(frozen=True)
class Score:
    """How a group of answers did.

    task, difficulty: of the group; None is all of them
    n, correct, cut: how many there are, are right, were cut off
    tokens: generated for all of them
    """

    mode: Think
    task: str | None
    difficulty: int | None
    n: int
    correct: int
    cut: int
    tokens: int

    @property
    def accuracy(self) -> float:
        """The part that is right."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% bounds of the accuracy on all such problems."""
        return wilson(self.correct, self.n)

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer, on average."""
        return self.tokens / self.n

    def as_json(self) -> dict[str, Any]:
        """The score as a JSON object."""
        low, high = self.interval
        rates = {"accuracy": self.accuracy, "low": low, "high": high}
        return {**dataclasses.asdict(self), **rates, "mean_tokens": self.mean_tokens}


@dataclasses.dataclass(frozen=True)
class Speed:
    """What the answers of a mode took: tokens, and seconds of generation.

    compiled_tokens, compiled_seconds: the part of both during which programs were compiled, too
    """

    mode: Think
    tokens: int
    seconds: float
    compiled_tokens: int
    compiled_seconds: float

    @property
    def includes_compilation(self) -> bool:
        """Whether there is no other part, so that the rate is that of a cold start."""
        return self.compiled_tokens == self.tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second for all rows together, without compilation if possible."""
        tokens, seconds = self.tokens, self.seconds
        if not self.includes_compilation:
            tokens, seconds = tokens - self.compiled_tokens, seconds - self.compiled_seconds
        return tokens / seconds

    def as_json(self) -> dict[str, Any]:
        """The speed as a JSON object."""
        return {
            "mode": self.mode,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "includes_compilation": self.includes_compilation,
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's answers by mode and then in the problems' order, with their scores and speeds."""

    scores: tuple[Score, ...]
    speed: tuple[Speed, ...]
    answers: tuple[Answer, ...]
    max_new_tokens: int

    def as_json(self) -> dict[str, Any]:
        """All but the answers, as a JSON object."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "scores": [score.as_json() for score in self.scores],
            "speed": [speed.as_json() for speed in self.speed],
        }

    def answers_as_lines(self) -> str:
        """The answers as JSON lines."""
        lines = [json.dumps(each.as_json(), ensure_ascii=False) for each in self.answers]
        return "".join(f"{line}\n" for line in lines)


def correct(answer: str, expected: str) -> bool:
    """Whether two answers are equal; runs of white space count as one space, around them as none
    (own choice).
    """
    return answer.split() == expected.split()


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95% bounds of a probability of which `correct` of `n` draws came true: the score interval,

        (p + z^2/2n +- z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    (Wilson 1927; formula 3 of Newcombe 1998), which holds for few draws, too, and near 0 and 1.
    """
    if n == 0:
        return 0.0, 1.0
    p, square = correct / n, Z**2 / n
    centre = p + square / 2
    half = math.sqrt(square * (p * (1 - p) + square / 4))
    low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    # Rounding must not put the bounds within p.
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def tally(answers: Iterable[Answer]) -> tuple[Score, ...]:
    """The score of every task and difficulty, of each over all of the other, and of everything; for
    each mode.
    """
    groups: dict[tuple[Think, str | None, int | None], list[Answer]] = {}
    for answer in answers:
        for task in (answer.task, None):
            for difficulty in (answer.difficulty, None):
                groups.setdefault((answer.mode, task, difficulty), []).append(answer)
    return tuple(
        Score(
            *key,
            n=len(group),
            correct=sum(answer.correct for answer in group),
            cut=sum(answer.cut for answer in group),
            tokens=sum(answer.tokens for answer in group),
        )
        for key, group in groups.items()
    )


def merge(scores: Sequence[Score]) -> Score | None:
    """The score of all their answers together, as one of all difficulties; None if there are
    none.
    """
    if not scores:
        return None
    total = lambda name: sum(getattr(score, name) for score in scores)
    first = scores[0]
    counts = {name: total(name) for name in ("n", "correct", "cut", "tokens")}
    return Score(first.mode, first.task, None, **counts)
