"""What the next step does. Pure Python: it can be tried a million times without a model.

A step decodes one token (or several, when no prompt is to be read) of every request that has been
read, and reads a part of the prompts that have not, in tiles of a few tokens. Requests stay on the
replica of attention ("rank") that has their pages. When pages run out, the least important request
of that rank starts again later, from its tokens: what it had computed is often still there.
"""

import collections
import dataclasses
import heapq
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from infer.engine.pages import Pages
from infer.engine.request import Request

# Tenants whose turns are remembered.
MOST_TENANTS = 4096


@dataclasses.dataclass(frozen=True)
class Row:
    """Decoding of one request: `steps` tokens from `position` on."""

    request: Request
    slot: int
    position: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tokens of a prompt, at positions from `start` on. A prompt's last tile chooses a token."""

    request: Request
    slot: int
    start: int
    tokens: list[int]
    last: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step: rows and tiles of every rank."""

    rows: list[list[Row]]
    tiles: list[list[Tile]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """slots: requests at a time on a rank
    tile: tokens of a tile
    tiles: of a rank and step
    context: tokens of a request at most, prompt and answer
    """

    slots: int
    tile: int
    tiles: int
    context: int


class Scheduler:
    """The requests of an engine.

    pools: the pages of each rank
    clock: seconds, for deadlines
    """

    def __init__(
        self, pools: Sequence[Pages], limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pools, self.limits, self.clock = list(pools), limits, clock
        self.preemptions = 0
        self.prefix_tokens = 0
        """Tokens of prompts that were found in pages."""
        self._waiting = _Queue()
        self._running: list[Request] = []
        self._slots = [list(range(limits.slots - 1, -1, -1)) for _ in pools]
        self._deadlines: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._must_wait = False

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a place."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Puts a request in the queue."""
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        if request.deadline < math.inf:
            if len(self._deadlines) > 2 * (self.waiting + self.running) + 64:
                self._deadlines = [each for each in self._deadlines if not each[2].ended]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))
        self._waiting.add(request)

    def remove(self, request: Request) -> None:
        """Forgets a request that has ended or is not wanted any more; its pages are free."""
        request.ended = True
        if request.running:
            self._displace(request)
        else:
            self._waiting.discard(request)

    def expired(self) -> list[Request]:
        """Those whose deadline has passed since the last time; some may have ended before."""
        now, found = self.clock(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            found.append(heapq.heappop(self._deadlines)[2])
        return found

    def schedule(self, steps: int = 1) -> Batch | None:
        """The next step; None when there is nothing to do, or nothing before the results of what is
        dispatched are known.

        steps: the most tokens that rows may decode at a time
        """
        self._must_wait = False
        self._push_out()
        rows = self._decode(1 if self._prompts_to_read() else steps)
        if self._must_wait:  # what gives way has tokens on the device that nobody knows yet
            return None
        tiles = self._read()
        if not any(rows) and not any(tiles):
            return None
        return self._started(rows, tiles)

    def record(self, row: Row | Tile, tokens: Iterable[int]) -> None:
        """What the device chose for a row or last tile; of a request that is gone, nothing."""
        request = row.request
        if not request.running:
            return
        request.pending -= row.steps if isinstance(row, Row) else 1
        request.tokens.extend(tokens)
        self._name(request)

    # --- decoding -------------------------------------------------------------------------------

    def _decode(self, steps: int) -> list[list[Row]]:
        """Rows for all that decode, and the pages they need."""
        ready = sorted((r for r in self._running if r.decoding and r.left > 0), key=_importance)
        while steps > 1 and not self._fits(ready, steps):
            steps //= 2
        rows = self._nothing()
        for request in ready:
            if not request.running:
                continue  # made room for a more important one
            wanted = self._missing(request, steps)
            if self._make_room(request, wanted):
                request.hold(self.pools[request.rank].take(wanted))
                count = min(steps, request.left)
                rows[request.rank].append(Row(request, request.slot, request.computed, count))
            if self._must_wait:
                break
        return rows

    def _fits(self, ready: list[Request], steps: int) -> bool:
        wanted = [0] * len(self.pools)
        for request in ready:
            wanted[request.rank] += self._missing(request, steps)
        return all(count <= pool.free for count, pool in zip(wanted, self.pools, strict=True))

    def _missing(self, request: Request, steps: int) -> int:
        """Pages that a request needs more to decode so many tokens."""
        end = request.computed + min(steps, request.left)
        return max(0, self.pools[request.rank].needed(end) - len(request.pages))

    def _make_room(self, request: Request, wanted: int) -> bool:
        """Displaces less important requests of the rank, at last the request itself, until there is
        room; False if there is none.
        """
        pool = self.pools[request.rank]
        while pool.free < wanted:
            others = [r for r in self._running if r.rank == request.rank]
            victim = max(others, key=_importance)
            if victim.pending:
                self._must_wait = True
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        self.preemptions += 1
        self._displace(victim)
        self._waiting.add(victim, again=True)

    def _displace(self, request: Request) -> None:
        pool = self.pools[request.rank]
        pool.release(request.pages)
        self._slots[request.rank].append(request.slot)
        self._running.remove(request)
        request.displace()

    # --- reading --------------------------------------------------------------------------------

    def _prompts_to_read(self) -> bool:
        first = self._waiting.first()
        enters = first is not None and self._rank_for(first) is not None
        return enters or any(not r.decoding for r in self._running)

    def _read(self) -> list[list[Tile]]:
        """Tiles of prompts: first of those that have a place, then of those that get one."""
        tiles = self._nothing()
        for request in sorted((r for r in self._running if not r.decoding), key=_importance):
            self._cut(request, tiles[request.rank])
        while (request := self._waiting.first()) is not None:
            full = [len(own) >= self.limits.tiles for own in tiles]
            rank = self._rank_for(request, full)
            if rank is None:
                break
            self._admit(request, rank)
            self._cut(request, tiles[rank])
        return tiles

    def _rank_for(self, request: Request, full: Sequence[bool] | None = None) -> int | None:
        """The rank with room that knows most of a request's tokens, and has most pages; None where
        there is none.

        full: ranks that are not to be considered
        """
        best: tuple[int, int, int] | None = None
        for rank, pool in enumerate(self.pools):
            if not self._slots[rank] or (full is not None and full[rank]):
                continue
            known = self._known(request, pool)
            # A page for each that is running already: it will want one soon.
            here = sum(r.rank == rank for r in self._running)
            fresh = pool.needed(len(request.tokens)) - len(known)
            if pool.can_take(fresh + here, known):
                best = max(best or (-1, 0, 0), (len(known), pool.free, -rank))
        return None if best is None else -best[2]

    def _known(self, request: Request, pool: Pages) -> list[int]:
        """Pages that hold the beginning of a request's tokens, the last token never included: its
        state chooses the next one.
        """
        full = (len(request.tokens) - 1) // pool.size
        return pool.match(request.names(pool.size)[:full])

    def _admit(self, request: Request, rank: int) -> None:
        pool, context = self.pools[rank], self.limits.context
        known = self._known(request, pool)
        pool.share(known)
        self._waiting.choose(request)
        table = np.zeros(pool.needed(context), np.int32)
        request.place(rank, self._slots[rank].pop(), known, table, pool.size)
        request.hold(pool.take(pool.needed(len(request.tokens)) - len(known)))
        self._running.append(request)
        self.prefix_tokens += request.computed

    def _push_out(self) -> None:
        """Requests of lower priority make room for the first of the queue, where that is enough."""
        first = self._waiting.first()
        if first is None or self._rank_for(first) is not None:
            return
        rank = next((r for r in range(len(self.pools)) if self._could_clear(r, first)), None)
        while rank is not None and self._rank_for(first) is None:
            lower = self._lower(rank, first)
            if not lower:
                return
            victim = max(lower, key=_importance)
            if victim.pending:
                self._must_wait = True
                return
            self._preempt(victim)

    def _lower(self, rank: int, request: Request) -> list[Request]:
        """Those on a rank with less priority."""
        return [r for r in self._running if r.rank == rank and r.priority < request.priority]

    def _could_clear(self, rank: int, request: Request) -> bool:
        """Whether a request would have room without those of less priority."""
        pool, lower = self.pools[rank], self._lower(rank, request)
        stay = sum(r.rank == rank for r in self._running) - len(lower)
        freed = pool.freed_by(itertools.chain(*(r.pages for r in lower)))
        return bool(lower) and pool.needed(len(request.tokens)) + stay <= pool.free + freed

    def _cut(self, request: Request, tiles: list[Tile]) -> None:
        """As many tiles of a request's known tokens as there is room for."""
        while len(tiles) < self.limits.tiles and not request.decoding:
            start = request.computed
            own = request.tokens[start : start + self.limits.tile]
            request.computed += len(own)
            last = request.computed == len(request.tokens)
            tiles.append(Tile(request, request.slot, start, own, last))
            self._waiting.serve(request.tenant, len(own))
            if last:
                request.decoding = True

    # --- both -----------------------------------------------------------------------------------

    def _nothing(self) -> list[list]:
        return [[] for _ in self.pools]

    def _started(self, rows: list[list[Row]], tiles: list[list[Tile]]) -> Batch:
        """A batch, and what it will have done."""
        for row in itertools.chain(*rows):
            row.request.computed += row.steps
            row.request.pending += row.steps
            self._waiting.serve(row.request.tenant, row.steps)
        for tile in itertools.chain(*tiles):
            tile.request.pending += tile.last
            self._name(tile.request)
        return Batch(rows, tiles)

    def _name(self, request: Request) -> None:
        pool = self.pools[request.rank]
        for page, name in request.newly_full(pool.size):
            pool.name(page, name)


def _importance(request: Request) -> tuple[int, int]:
    """Sorts the most important first: by priority, then who came first."""
    return -request.priority, request.arrival


class _Queue:
    """Waiting requests: by priority, then in turn by tenant, whoever has had least first; each
    tenant's own in the order they came.

    Who comes late, or back, has no claim on the past: a tenant begins where the one was that was
    chosen last (start-time fair queueing).
    """

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, collections.deque[Request]]] = {}
        self._served: dict[str, int] = {}
        self._floor = self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: Request, again: bool = False) -> None:
        """again: it was here before, and goes to the front of its line"""
        tenants, tenant = self._lines.setdefault(request.priority, {}), request.tenant
        if tenant not in tenants:
            if len(self._served) >= MOST_TENANTS:  # names are users' to choose
                self._forget()
            self._served[tenant] = max(self._served.get(tenant, 0), self._floor)
        line = tenants.setdefault(tenant, collections.deque())
        if again:
            line.appendleft(request)
        else:
            line.append(request)
        self._count += 1

    def first(self) -> Request | None:
        """Whose turn it is."""
        if not self._lines:
            return None
        tenants = self._lines[max(self._lines)]
        return tenants[min(tenants, key=self._had)][0]

    def choose(self, request: Request) -> None:
        """Takes out the first."""
        self._floor = max(self._floor, self._had(request.tenant))
        self.discard(request)

    def discard(self, request: Request) -> None:
        """Takes a request out, if it is there."""
        tenants = self._lines.get(request.priority, {})
        line = tenants.get(request.tenant)
        if line is None or request not in line:
            return
        line.remove(request)
        self._count -= 1
        if not line:
            del tenants[request.tenant]
        if not tenants:
            del self._lines[request.priority]

    def serve(self, tenant: str, tokens: int) -> None:
        """Notes that a tenant got so many tokens of work."""
        self._served[tenant] = self._had(tenant) + tokens

    def _forget(self) -> None:
        """Half of the tenants: those who had least now had as much as the one in the middle."""
        self._floor = max(self._floor, statistics.median_low(self._served.values()))
        self._served = {t: n for t, n in self._served.items() if n > self._floor}

    def _had(self, tenant: str) -> int:
        return self._served.get(tenant, self._floor)
