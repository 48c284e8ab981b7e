"""The pages of a pool: never in two states at once, never given twice, forgotten in order."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from infer.engine import pages
from infer.engine.pages import Pages

COUNT, SIZE = 6, 2


class Machine(RuleBasedStateMachine):
    """Against sets and dictionaries that say what should be so."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pages(COUNT, SIZE)
        self.uses = dict.fromkeys(range(COUNT), 0)
        self.names: dict[bytes, int] = {}
        self.idle_since: dict[int, int] = {}
        self.time = 0

    @rule(target=held, count=st.integers(0, COUNT + 1))
    def take(self, count: int):
        before = {page for page, uses in self.uses.items() if uses == 0}
        if count > len(before):
            assert not self.pool.can_take(count)
            with pytest.raises(ValueError, match="are free"):
                self.pool.take(count)
            return []
        assert self.pool.can_take(count)
        named = set(self.names.values())
        got = self.pool.take(count)
        assert len(set(got)) == count
        assert set(got) <= before
        lost = [page for page in got if page in named]
        if lost:  # only when nothing blank is left, and the oldest first
            assert before - set(got) <= named
            kept = [self.idle_since[page] for page in before - set(got)]
            assert max(self.idle_since[page] for page in lost) <= min(kept, default=self.time)
        for page in got:
            self.uses[page] = 1
            self.names = {name: own for name, own in self.names.items() if own != page}
        return got

    @rule(mine=held, name=st.binary(min_size=1, max_size=1))
    def name(self, mine: list[int], name: bytes) -> None:
        for page in mine[:1]:
            self.pool.name(page, name)
            if name not in self.names and page not in self.names.values():
                self.names[name] = page

    @rule(target=held, names=st.lists(st.binary(min_size=1, max_size=1), max_size=3, unique=True))
    def share(self, names: list[bytes]):
        known = []
        for name in names:
            if name not in self.names:
                break
            known.append(self.names[name])
        found = self.pool.match(names)
        assert found == known
        self.pool.share(found)
        for page in found:
            self.uses[page] += 1
        return found

    @rule(mine=consumes(held))
    def release(self, mine: list[int]) -> None:
        self.pool.release(mine)
        for page in reversed(mine):
            self.uses[page] -= 1
            self.time += 1
            self.idle_since[page] = self.time

    @invariant()
    def counts(self) -> None:
        assert self.pool.free == sum(uses == 0 for uses in self.uses.values())
        assert {name: self.pool.match([name]) for name in self.names} == {
            name: [page] for name, page in self.names.items()
        }


TestPages = Machine.TestCase


def test_a_page_is_not_released_twice() -> None:
    pool = Pages(2, SIZE)
    mine = pool.take(1)
    pool.release(mine)
    with pytest.raises(ValueError, match="not in use"):
        pool.release(mine)
    with pytest.raises(ValueError, match="not in use"):
        pool.name(mine[0], b"x")


def test_shared_pages_that_nobody_uses_count_as_room_that_goes() -> None:
    pool = Pages(3, SIZE)
    mine = pool.take(2)
    for page, name in zip(mine, (b"a", b"b"), strict=True):
        pool.name(page, name)
    pool.release(mine)
    assert pool.can_take(1, mine)
    assert not pool.can_take(2, mine)


def test_names_tell_prefixes_and_tenants_apart() -> None:
    a, b = pages.root(""), pages.root("b")
    assert len({a, b, pages.extend(a, [1]), pages.extend(b, [1]), pages.extend(a, [2])}) == 5
    twice = pages.extend(pages.extend(a, [1, 2]), [3, 4])
    assert twice != pages.extend(a, [1, 2, 3, 4])
    assert twice == pages.extend(pages.extend(a, (1, 2)), (3, 4))
