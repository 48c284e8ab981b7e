"""The scheduler, with a device of a few lines: it keeps tokens in pages instead of keys and values,
and before every choice reads the whole prefix back from them.
"""

import dataclasses
import math
import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

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


@st.composite
def traffic(draw: st.DrawFn) -> tuple[Scheduler, list[Visit], int, bool]:
    """A scheduler, what comes to it, the steps it may dispatch at once, and whether results are
    known one step late.
    """
    number = lambda low, high: draw(st.integers(low, high))
    size, ranks, slots = number(1, 4), number(1, 2), number(1, 4)
    count = number(1, 12)
    context = number(1, count * size)
    limits = Limits(slots, number(1, 4), number(1, 3), context)
    scheduler = Scheduler([Pages(count, size) for _ in range(ranks)], limits)
    beginnings = [[number(1, VOCAB - 1) for _ in range(context)] for _ in range(2)]
    visits = []
    for _ in range(number(0, 8)):
        shared = beginnings[number(0, 1)][: number(0, context)]
        if visits and draw(st.booleans()):  # a conversation that goes on
            before = visits[-1].request
            shared = [*before.tokens, *answer(before.tokens, before.limit)][:context]
        own = draw(st.lists(st.integers(1, VOCAB - 1), max_size=context - len(shared)))
        prompt = [*shared, *own] or [1]
        limit = number(1, context - len(prompt) + 1)
        leaves = draw(st.none() | st.integers(0, 30))
        request = Request(prompt, limit, number(0, 2), tenant=draw(st.sampled_from("ab")))
        visits.append(Visit(request, number(0, 12), math.inf if leaves is None else leaves))
    return scheduler, visits, number(1, 4), draw(st.booleans())


@settings(max_examples=400)
@given(traffic())
def test_every_request_gets_its_answer_and_every_page_comes_back(
    drawn: tuple[Scheduler, list[Visit], int, bool],
) -> None:
    scheduler, visits, steps, late = drawn
    device = Device(scheduler.pools, scheduler.limits.slots)
    going: list[Request] = []
    flight: list[tuple[Row | Tile, list[int]]] | None = None
    for time in range(2000):
        for visit in visits:
            if visit.comes == time:
                scheduler.add(visit.request)
                going.append(visit.request)
            if visit.leaves <= time and visit.request in going:
                going.remove(visit.request)
                scheduler.remove(visit.request)
        batch = scheduler.schedule(steps)
        following = None if batch is None else device.run(batch)
        if not late:
            flight, following = following, None
        if flight is None and following is None:
            assert not going or time < 12, "requests wait, and none goes on"
            if not going and time > 12:
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
