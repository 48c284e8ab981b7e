"""Verifiable tasks: problems of graded difficulty with worked steps and one exact answer.

The fast answer is the answer alone; the slow one thinks the steps first. Training and held-out
problems are disjoint by construction: `Problem.split`.
"""

import random
from collections.abc import Callable, Iterator

from train.tasks import arithmetic, symbolic
from train.tasks.problem import Problem, Split

Generator = Callable[[random.Random, int], Problem]

TASKS: dict[str, Generator] = {
    "add": arithmetic.add,
    "subtract": arithmetic.subtract,
    "multiply": arithmetic.multiply,
    "total": arithmetic.total,
    "sort": symbolic.sort,
    "count": symbolic.count,
    "edit": symbolic.edit,
    "date": symbolic.date,
}
DIFFICULTIES = (1, 2, 3, 4)


def draw(task: str, difficulty: int, rng: random.Random, split: Split) -> Iterator[Problem]:
    """Problems of one set without end; small kinds repeat themselves."""
    while True:
        problem = TASKS[task](rng, difficulty)
        if problem.split == split:
            yield problem
