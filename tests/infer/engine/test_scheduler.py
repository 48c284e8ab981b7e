"""The scheduler, with a device of a few lines: it keeps tokens in pages instead of keys and values,
and before every choice reads the whole prefix back from them.
"""

import dataclasses
import math
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.engine import scheduler as schedulers
from infer.engine.pages import Pages
from infer.engine.request import Request
from infer.engine.scheduler import Batch, Limits, Row, Scheduler, Tile

END, VOCAB = 0, 4


def choose(prefix: list[int]) -> int:
    """The "model": every token of the prefix counts."""
    return zlib.crc32(np.asarray(prefix, np.int32).tobytes()) % VOCAB


def answer(prompt: list[int], limit: int) -> list[int]:
    """What the model says, alone."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit and (tokens[len(prompt) :] or [1])[-1] != END:
        tokens.append(choose(tokens))
    return tokens[len(prompt) :]


class Device:
    """Runs batches in order; a finished row does nothing."""

    def __init__(self, pools: list[Pages], slots: int) -> None:
        self.size = pools[0].size
        self.memory = [np.full((pool.count, self.size), -1) for pool in pools]
        self.token = np.zeros((len(pools), slots), int)
        self.left = np.zeros((len(pools), slots), int)
        self.slots = slots

    def run(self, batch: Batch) -> list[tuple[Row | Tile, list[int]]]:
        found: list[tuple[Row | Tile, list[int]]] = []
        for rank, (rows, tiles) in enumerate(zip(batch.rows, batch.tiles, strict=True)):
            assert not (tiles and any(row.steps > 1 for row in rows))
            assert len({part.slot for part in (*rows, *tiles)}) >= len(rows)
            # All write before any reads, as in a layer.
            for tile in tiles:
                assert tile.tokens
                self._write(rank, tile.request.table, tile.start, tile.tokens)
            for row in rows:
                found.append((row, self._decode(rank, row)))
            for tile in tiles:
                prefix = self._read(rank, tile.request.table, tile.start + len(tile.tokens))
                assert prefix == tile.request.tokens[: len(prefix)]
                if tile.last:
                    request = tile.request
                    self.left[rank, tile.slot] = (
                        request.limit - len(request.tokens) + request.prompt
                    )
                    found.append((tile, [self._choose(rank, tile.slot, prefix)]))
        return found

    def _decode(self, rank: int, row: Row) -> list[int]:
        tokens: list[int] = []
        for i in range(row.steps):
            if self.left[rank, row.slot] == 0:
                break
            self._write(rank, row.request.table, row.position + i, [self.token[rank, row.slot]])
            prefix = self._read(rank, row.request.table, row.position + i + 1)
            tokens.append(self._choose(rank, row.slot, prefix))
        return tokens

    def _choose(self, rank: int, slot: int, prefix: list[int]) -> int:
        token = choose(prefix)
        self.token[rank, slot] = token
        self.left[rank, slot] = 0 if token == END else self.left[rank, slot] - 1
        return token

    def _write(self, rank: int, table: np.ndarray, start: int, tokens: list[int]) -> None:
        for i, token in enumerate(tokens, start):
            self.memory[rank][table[i // self.size], i % self.size] = token

    def _read(self, rank: int, table: np.ndarray, end: int) -> list[int]:
        memory = self.memory[rank]
        return [int(memory[table[i // self.size], i % self.size]) for i in range(end)]


@dataclasses.dataclass
class Visit:
    """A request that comes at a time, and may be given up at another."""

    request: Request
    comes: int
    leaves: float


Visits = list[tuple[int, int, list[int], int, int, str, int | None]]


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[int], list[list[int]], Visits]:
    """Sizes (page, ranks, slots, pages, tile, tiles, context); two beginnings of prompts; of each
    visit what it says, how much it is allowed, how it is treated, when it comes and leaves.
    """
    number = lambda low, high: draw(st.integers(low, high))
    size, count = number(1, 4), number(1, 12)
    context = number(1, count * size)
    sizes = [size, number(1, 2), number(1, 4), count, number(1, 4), number(1, 3), context]
    beginnings = [[number(1, VOCAB - 1) for _ in range(context)] for _ in range(2)]
    visits: Visits = []
    for _ in range(number(0, 8)):
        own = draw(st.lists(st.integers(1, VOCAB - 1), max_size=context))
        leaves = draw(st.none() | st.integers(0, 30))
        tenant = draw(st.sampled_from("ab"))
        shared, limit = number(-1, 2 * context), number(1, context)
        visits.append((shared, limit, own, number(0, 2), number(0, 12), tenant, leaves))
    return sizes, beginnings, visits


def made_of(sizes: list[int], beginnings: list[list[int]], plan: Visits) -> tuple[Scheduler, list]:
    size, ranks, slots, count, tile, tiles, context = sizes
    limits = Limits(slots, tile, tiles, context)
    scheduler = Scheduler([Pages(count, size) for _ in range(ranks)], limits)
    visits: list[Visit] = []
    for shared, limit, own, priority, comes, tenant, leaves in plan:
        prompt = beginnings[shared % 2][: max(shared, 0) // 2]
        if shared < 0 and visits:  # a conversation that goes on
            before = visits[-1].request
            prompt = [*before.tokens, *answer(before.tokens, before.limit)]
        prompt = [*prompt, *own][:context] or [1]
        request = Request(prompt, min(limit, context - len(prompt) + 1), priority, tenant=tenant)
        visits.append(Visit(request, comes, math.inf if leaves is None else leaves))
    return scheduler, visits


@settings(max_examples=100)
@given(traffic(), st.integers(1, 4), st.booleans())
def test_every_request_gets_its_answer_and_every_page_comes_back(
    drawn: tuple[list[int], list[list[int]], Visits], steps: int, late: bool
) -> None:
    """late: results are known one step late"""
    scheduler, visits = made_of(*drawn)
    device = Device(scheduler.pools, scheduler.limits.slots)
    going: list[Request] = []
    flight: list[tuple[Row | Tile, list[int]]] | None = None
    for now in range(2000):
        for visit in visits:
            if visit.comes == now:
                scheduler.add(visit.request)
                going.append(visit.request)
            if visit.leaves <= now and visit.request in going:
                going.remove(visit.request)
                scheduler.remove(visit.request)
        batch = scheduler.schedule(steps)
        following = None if batch is None else device.run(batch)
        if not late:
            flight, following = following, None
        if flight is None and following is None:
            assert not going or now < 12, "requests wait, and none goes on"
            if not going and now > 12:
                break
        for part, tokens in flight or []:
            scheduler.record(part, tokens)
            request = part.request
            done = len(request.tokens) - request.prompt
            if request in going and (request.tokens[-1] == END or done >= request.limit):
                going.remove(request)
                scheduler.remove(request)
                prompt = request.tokens[: request.prompt]
                assert request.tokens[request.prompt :] == answer(prompt, request.limit)
        flight = following
    assert not going
    assert scheduler.running == scheduler.waiting == 0
    assert all(pool.free == pool.count for pool in scheduler.pools)


# --- who is next --------------------------------------------------------------------------------


def scheduler_of(pages: int, slots: int = 4, clock: Any = time.monotonic) -> Scheduler:
    """Pages and tiles of two tokens, one rank."""
    return Scheduler([Pages(pages, 2)], Limits(slots, 2, 8, 2 * pages), clock)


def tiles_of(batch: Batch | None) -> list[Request]:
    return [] if batch is None else [tile.request for tile in batch.tiles[0]]


def serve(scheduler: Scheduler, requests: list[Request], most: int = 500) -> list[Request]:
    """Runs until all have ended; the order in which they came in."""
    device, order, going = Device(scheduler.pools, scheduler.limits.slots), [], set(requests)
    for _ in range(most):
        batch = scheduler.schedule()
        order += [each for each in tiles_of(batch) if each not in order]
        for part, tokens in [] if batch is None else device.run(batch):
            scheduler.record(part, tokens)
            done = len(part.request.tokens) - part.request.prompt
            if part.request in going and (tokens[-1:] == [END] or done >= part.request.limit):
                going.remove(part.request)
                scheduler.remove(part.request)
        if not going:
            return order
    raise AssertionError("they do not end")


def test_higher_priorities_go_first() -> None:
    scheduler = scheduler_of(40, slots=1)
    requests = [Request([1, 2], 1, priority) for priority in (0, 2, 1, 2)]
    for request in requests:
        scheduler.add(request)
    assert [r.priority for r in serve(scheduler, requests)] == [2, 2, 1, 0]


def test_tenants_take_turns_whatever_they_had_before() -> None:
    scheduler = scheduler_of(40, slots=1)
    early = [Request([1, 2], 1, tenant="a") for _ in range(20)]
    for request in early:
        scheduler.add(request)
    serve(scheduler, early)
    both = [Request([1, 2], 1, tenant=tenant) for tenant in "bbbbbbaaa"]
    for request in both:
        scheduler.add(request)
    order = "".join(r.tenant for r in serve(scheduler, both))
    assert order[:6].count("a") in (2, 3)


def test_nobody_is_pushed_out_in_vain() -> None:
    scheduler = scheduler_of(10)
    device = Device(scheduler.pools, 4)
    high, low = Request([1] * 13, 4, priority=1), Request([2], 4)
    for request in (high, low):
        scheduler.add(request)
    for part, tokens in device.run(scheduler.schedule() or Batch([[]], [[]])):
        scheduler.record(part, tokens)
    scheduler.add(Request([3] * 9, 1, priority=1))  # five pages: more than low's and the rest
    scheduler.schedule()
    assert low.running
    assert scheduler.preemptions == 0


def test_a_prompt_that_cannot_enter_slows_nobody() -> None:
    scheduler = scheduler_of(6)
    device = Device(scheduler.pools, 4)
    first = Request([1] * 7, 3)
    scheduler.add(first)
    for part, tokens in device.run(scheduler.schedule() or Batch([[]], [[]])):
        scheduler.record(part, [token or 1 for token in tokens])
    scheduler.add(Request([2] * 9, 1))
    batch = scheduler.schedule(steps=2)
    assert batch is not None
    assert [row.steps for row in batch.rows[0]] == [2]


def test_deadlines_pass_once_and_are_forgotten_with_their_requests() -> None:
    now = [0.0]
    scheduler = scheduler_of(40, clock=lambda: now[0])
    kept = Request([1], 1, deadline=2.0)
    scheduler.add(kept)
    for _ in range(1000):
        request = Request([1], 1, deadline=1e6)
        scheduler.add(request)
        scheduler.remove(request)
    assert len(scheduler._deadlines) < 200
    assert scheduler.expired() == []
    now[0] = 2.0
    assert scheduler.expired() == [kept]
    assert scheduler.expired() == []


def test_names_of_tenants_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulers, "MOST_TENANTS", 64)
    scheduler = scheduler_of(40)
    for i in range(300):
        request = Request([1, 2], 1, tenant=str(i))
        scheduler.add(request)
        serve(scheduler, [request])
    assert len(scheduler._waiting._served) <= 65
    assert scheduler.waiting == 0
