"""What the scheduler knows of a request: its tokens, what it may use, and how far it is."""

import dataclasses
import math

import numpy as np

from infer.engine import pages
from infer.engine.pages import Name

NOWHERE = -1


@dataclasses.dataclass(eq=False)
class Request:
    """One completion to be made. `Scheduler` alone changes it.

    tokens: of the prompt, then those generated that the host knows
    prompt: how many of them are the prompt's
    limit: the most tokens to generate
    priority: higher ones go first, and may push lower ones out
    deadline: by the scheduler's clock; it is given up then
    tenant: prefixes are shared, and turns taken, by tenant
    """

    tokens: list[int]
    limit: int
    priority: int = 0
    deadline: float = math.inf
    tenant: str = ""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.arrival = 0
        self.rank = self.slot = NOWHERE
        """The replica of attention that has its pages, and its place among the rows there."""
        self.pages: list[int] = []
        self.table = np.zeros(0, np.int32)
        """The same pages, as the device reads them."""
        self.computed = 0
        """Tokens whose keys and values are in pages, or will be when what is dispatched is done."""
        self.pending = 0
        """Tokens that are being chosen on the device: not in `tokens` yet."""
        self.ended = False
        self.decoding = False
        """Whether all that is known was read: the next token is the one the device chose last."""
        self._names: list[Name] = []
        self._named = 0

    @property
    def running(self) -> bool:
        """Whether it has a place."""
        return self.rank != NOWHERE

    @property
    def left(self) -> int:
        """Tokens that may still be asked for."""
        return self.limit - (len(self.tokens) - self.prompt) - self.pending

    def names(self, size: int) -> list[Name]:
        """Of all full pages of known tokens."""
        for i in range(len(self._names), len(self.tokens) // size):
            before = self._names[i - 1] if i else pages.root(self.tenant)
            self._names.append(pages.extend(before, self.tokens[i * size : (i + 1) * size]))
        return self._names

    def newly_full(self, size: int) -> list[tuple[int, Name]]:
        """(page, name) of pages that have become known and full since the last time.

        While decoding, the last known token does not count: it may have been the last of all, and
        is then never read.
        """
        known = len(self.tokens) - 1 if self.decoding else len(self.tokens)
        full = min(self.computed, known) // size
        found = [(self.pages[i], self.names(size)[i]) for i in range(self._named, full)]
        self._named = max(self._named, full)
        return found

    def place(self, rank: int, slot: int, shared: list[int], table: np.ndarray, size: int) -> None:
        """Gives it a place, with the pages of a known prefix."""
        self.rank, self.slot, self.table = rank, slot, table
        self.pages = []
        self.hold(shared)
        self.computed, self._named = len(shared) * size, len(shared)

    def hold(self, more: list[int]) -> None:
        """Adds pages."""
        self.table[len(self.pages) : len(self.pages) + len(more)] = more
        self.pages += more

    def displace(self) -> None:
        """Takes its place away; it can start again from its tokens."""
        self.rank = self.slot = NOWHERE
        self.pages, self.computed, self._named = [], 0, 0
        self.decoding = False
