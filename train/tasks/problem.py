"""A problem with one right answer, and which of the two sets it belongs to."""

import dataclasses
import hashlib
from typing import Literal

Split = Literal["train", "held-out"]

# One problem in so many is held out (own choice).
HELD_OUT_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, the steps that lead to its answer, and the answer: all exact text.

    key: what the problem is, however it is asked: problems with equal keys have equal answers, or
        such near ones (the same numbers in another order) that knowing one is knowing the other
    """

    task: str
    difficulty: int
    question: str
    steps: str
    answer: str
    key: str

    @property
    def split(self) -> Split:
        """Decided by the key alone, so that no training set ever holds a held-out problem."""
        digest = hashlib.sha256(f"{self.task} {self.key}".encode()).digest()
        return "held-out" if digest[0] % HELD_OUT_SHARE == 0 else "train"
