"""The pages of one pool: which are free, which are in use, and which still hold a known prefix.

A page holds the keys and values of `size` consecutive tokens. A full page of known tokens has a
name, a digest of everything up to its end; a prompt that begins with the same tokens takes the page
instead of computing it. Pages nobody uses are kept until their room is needed, the least recently
used first.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Name = bytes


def root(tenant: str) -> Name:
    """The name of an empty prefix. Tenants do not see, by how fast an answer comes, what others
    have asked.
    """
    return hashlib.blake2b(tenant.encode(), digest_size=16, person=b"pangu-prefix").digest()


def extend(name: Name, tokens: Sequence[int]) -> Name:
    """The name of a prefix with one more page of tokens.

    A cryptographic digest: tokens are chosen by users, and two prefixes with one name would answer
    each other's questions.
    """
    return hashlib.blake2b(name + np.asarray(tokens, "<i4").tobytes(), digest_size=16).digest()


class Pages:
    """Pages 0 to count - 1. Every one is either in use (by one or more), or free; a free one may
    still have a name.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._uses = [0] * count
        self._names: dict[int, Name] = {}
        self._named: dict[Name, int] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """Pages that `take` has left, named ones included."""
        return len(self._blank) + len(self._kept)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill or begin."""
        return -(-tokens // self.size)

    def match(self, names: Sequence[Name]) -> list[int]:
        """The pages of the longest known prefix, not taken yet."""
        found = []
        for name in names:
            if name not in self._named:
                break
            found.append(self._named[name])
        return found

    def can_take(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether there is room for `count` fresh pages beside `shared` ones."""
        idle = sum(self._uses[page] == 0 for page in shared)
        return count + idle <= self.free

    def freed_by(self, pages: Iterable[int]) -> int:
        """How many pages would be free if each of these had one user less."""
        return sum(self._uses[page] == less for page, less in collections.Counter(pages).items())

    def share(self, pages: Sequence[int]) -> None:
        """One user more of each page, from `match`."""
        for page in pages:
            if self._uses[page] == 0:
                del self._kept[page]
            self._uses[page] += 1

    def take(self, count: int) -> list[int]:
        """Fresh pages with one user. Names of the least recently used go if they must."""
        if count > self.free:
            raise ValueError(f"{count} pages wanted, {self.free} are free")
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(page)]
            self._uses[page] = 1
            taken.append(page)
        return taken

    def name(self, page: int, name: Name) -> None:
        """Says what a page in use holds from now on. Of two alike the first keeps the name."""
        if self._uses[page] == 0:
            raise ValueError(f"page {page} is not in use")
        if name not in self._named and page not in self._names:
            self._named[name], self._names[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each page. The last pages of a prefix are the first to be forgotten."""
        for page in reversed(pages):
            if self._uses[page] == 0:
                raise ValueError(f"page {page} is not in use")
            self._uses[page] -= 1
            if self._uses[page] == 0:
                if page in self._names:
                    self._kept[page] = None
                else:
                    self._blank.append(page)
