"""The loop between scheduler and runner: while the device works, the next step is prepared.

A thread of its own; whoever submits a request is told its text, from that thread, as it becomes
certain.
"""

import collections
import contextlib
import dataclasses
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from infer import inputs
from infer.engine.pages import Pages
from infer.engine.request import Request
from infer.engine.runner import Asked, Flight, Result, Runner, Shape
from infer.engine.scheduler import Limits, Scheduler
from infer.engine.step import MOST_STOPS
from infer.generation import STREAM_SECONDS, Prompt
from infer.output import Completion, FinishReason, Row
from infer.sampling import Sampling
from pangu_jax import strict
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer

# Steps whose times are remembered.
REMEMBERED = 4096

Told = Callable[[str, "Completion | BaseException | None"], None]
"""Called with new text, and with the last one the Completion, or what stopped the engine."""


class Ticket:
    """A request that was submitted.

    times: when it was submitted, got its first token, and ended, by `time.perf_counter`
    """

    def __init__(self, row: Row, asked: Asked, told: Told) -> None:
        self.row, self.asked, self.told = row, asked, told
        self.times = [time.perf_counter()]
        self.request: Request | None = None
        self.failure: BaseException | None = None
        self.done = threading.Event()

    def result(self) -> Completion:
        """The completion; waits for it. Raises what stopped the engine."""
        self.done.wait()
        if self.failure is not None:
            raise RuntimeError("the engine stopped") from self.failure
        return self.row.completion


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done since it started.

    host, wait: seconds of the last steps that the host worked, and that it waited for the device
    """

    steps: int
    tokens: int
    prompt_tokens: int
    prefix_tokens: int
    preemptions: int
    compiled: int
    running: int
    waiting: int
    free_pages: int
    host: list[float]
    wait: list[float]


class Engine:
    """Continuous batching of many requests on one model.

    tokenizer: gives completions their text; stop strings and thinking budgets need one
    Call `start` (or use it in a `with`), then `submit` from any thread.
    """

    def __init__(self, model: Pangu, shape: Shape, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.shape, self.tokenizer = model, shape, tokenizer
        ranks = model.layout.size(model.layout.of("batch"))
        self._pools = [Pages(shape.pages, shape.page) for _ in range(ranks)]
        limits = Limits(shape.slots, shape.tile, shape.tiles, shape.context)
        self.scheduler = Scheduler(self._pools, limits)
        self._tickets: dict[Request, Ticket] = {}
        self.runner = Runner(model, shape, tokenizer, lambda r: self._tickets[r].asked)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pangu-engine", daemon=True)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._started = self._closing = False
        self._step_seconds = 0.0
        self._done = collections.Counter[str]()
        self._host = collections.deque[float](maxlen=REMEMBERED)
        self._wait = collections.deque[float](maxlen=REMEMBERED)

    # --- for any thread ---------------------------------------------------------------------------

    def warm_up(self) -> Iterator[str]:
        """Compiles all that will run; says what comes next before each program. Before `start`."""
        yield from self.runner.warm_up()

    @property
    def started(self) -> bool:
        """Whether it works, or has worked."""
        return self._started

    @property
    def capacity(self) -> int:
        """Requests at a time, of all replicas of attention."""
        return self.shape.slots * len(self._pools)

    def start(self) -> None:
        """Begins to work; nothing if it does."""
        with self._lock:
            if not self._started and not self._closing:
                self._started = True
                self._thread.start()

    def close(self) -> None:
        """Gives up what is not done yet ("cancelled"), and stops."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        elif self._failure is None:  # it was never started
            self._drain()
            self._give_up()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        seconds: float = math.inf,
        tenant: str = "",
        told: Told = lambda text, completion: None,
    ) -> list[Ticket]:
        """A ticket for each of the prompt's `sampling.n` completions.

        priority: higher ones go first, and may push lower ones out
        seconds: how long it may take; then it ends as it is ("deadline")
        tenant: prefixes are shared, and turns taken, by tenant
        told: called from the engine's thread with each new text; it must be quick. One that raises
            is not called again, and its request is given up.
        Raises InputError for what this model or engine cannot do.
        """
        _check_manners(priority, seconds, tenant)
        tickets = self._tickets_for(prompt, sampling or Sampling(), told)
        ids, limit = [int(token) for token in prompt], self._limit(len(prompt), sampling)
        deadline = self.scheduler.clock() + seconds
        requests = [Request(ids.copy(), limit, priority, deadline, tenant) for _ in tickets]

        def add() -> None:
            for ticket, request in zip(tickets, requests, strict=True):
                ticket.request = request
                self._tickets[request] = ticket
            for request in requests:
                self.scheduler.add(request)

        self._post(add)
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request as it is ("cancelled"), soon; nothing if it has ended."""
        self._post(lambda: self._end(ticket, "cancelled"))

    @property
    def stats(self) -> Stats:
        """What was done, and how things stand."""
        done, scheduler = self._done, self.scheduler
        return Stats(
            done["steps"],
            done["tokens"],
            done["prompt"],
            scheduler.prefix_tokens,
            scheduler.preemptions,
            self.runner.compiled,
            scheduler.running,
            scheduler.waiting,
            sum(pool.free for pool in self._pools),
            list(self._host),
            list(self._wait),
        )

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises InputError for what this engine cannot do: a prompt that can never fit, ..."""
        config = self.model.config
        length = inputs.check_prompt(config, prompt).size
        inputs.check_sampling(sampling, config, self.tokenizer)
        count = len(inputs.end_ids(sampling, config))
        if count > MOST_STOPS:
            raise InputError(
                f"{count} stop token ids, the model's own included; at most {MOST_STOPS} may be"
            )
        if length > self.shape.context:
            raise InputError(
                f"a prompt of {length:,} tokens does not fit: this engine has room for "
                f"{self.shape.context:,} tokens of a request ({self.shape.pages:,} pages of "
                f"{self.shape.page}; the model has {self.model.config.max_positions:,} positions); "
                "shorten it, or give the engine more context or memory"
            )

    def _limit(self, prompt_length: int, sampling: Sampling | None) -> int:
        """The token after the last one that fits is chosen, but never read."""
        wanted = (sampling or Sampling()).max_new_tokens
        return min(wanted, self.shape.context - prompt_length + 1)

    def _tickets_for(self, prompt: Prompt, sampling: Sampling, told: Told) -> list[Ticket]:
        self.check(prompt, sampling)
        ends = inputs.end_ids(sampling, self.model.config)
        seed = secrets.randbits(31) if sampling.seed is None else int(sampling.seed) % 2**31
        asked = [Asked(sampling, seed, which, tuple(ends)) for which in range(sampling.n)]
        return [Ticket(Row(sampling, ends, self.tokenizer), each, told) for each in asked]

    def _post(self, action: Callable[[], None]) -> None:
        with self._lock:
            if self._failure is not None:
                raise RuntimeError("the engine stopped") from self._failure
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._inbox.put(action)

    # --- the engine's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._loop()
        except BaseException as failure:  # noqa: BLE001 (whoever waits must know)
            with self._lock:
                self._failure = failure
            self._drain()
            for ticket in list(self._tickets.values()):
                ticket.failure = failure
                ticket.done.set()
                self._tell(ticket, "", failure)

    def _loop(self) -> None:
        flight: Flight | None = None
        while self._take(wait=flight is None and not self._tickets):
            start = time.perf_counter()
            for request in self.scheduler.expired():
                if request in self._tickets:
                    self._end(self._tickets[request], "deadline")
            batch = self.scheduler.schedule(self._steps())
            following = self.runner.dispatch(batch) if batch else None
            if flight is None and following is None and self._tickets:
                raise RuntimeError("requests wait, and none of them can go on")
            ready = time.perf_counter()
            results = self.runner.collect(flight) if flight else []
            back = time.perf_counter()
            for result in results:
                self._deliver(result)
            if flight is not None:
                self._note(results, back - start, time.perf_counter() - back + ready - start)
                self._wait.append(back - ready)
            flight = following
        self._give_up()

    def _give_up(self) -> None:
        for ticket in list(self._tickets.values()):
            self._end(ticket, "cancelled")

    def _take(self, wait: bool) -> bool:
        """Does what was asked for since the last step; False when it is time to stop."""
        while True:
            try:
                action = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()
            wait = False

    def _drain(self) -> None:
        """Requests that came too late are told too."""
        while not self._inbox.empty():
            action = self._inbox.get()
            if action is not None:
                with contextlib.suppress(Exception):  # it may be what went wrong
                    action()

    def _steps(self) -> int:
        """Decode steps of the next dispatch: text shall come in time."""
        if not self._step_seconds:
            return 1
        return max(1, min(self.shape.steps, int(STREAM_SECONDS / self._step_seconds)))

    def _note(self, results: list[Result], seconds: float, host: float) -> None:
        longest = max(((result.ids >= 0).sum() for result in results), default=0)
        if longest:
            each = seconds / longest
            self._step_seconds = 0.8 * self._step_seconds + 0.2 * each
        self._host.append(host)
        self._done["steps"] += int(longest)

    def _deliver(self, result: Result) -> None:
        request = result.of.request
        tokens = [int(id) for id in result.ids if id >= 0]
        ticket = self._tickets.get(request)
        if ticket is None:
            return
        self.scheduler.record(result.of, tokens)
        self._done["tokens"] += len(tokens)
        row = ticket.row
        if len(ticket.times) == 1:
            ticket.times.append(time.perf_counter())
        text = row.take(result.ids, result.logprobs, result.top)
        if row.finish_reason is None and row.num_tokens >= request.limit:
            text += row.end()
        if row.finish_reason is not None:
            self._finish(ticket, text)
        elif text and not self._tell(ticket, text, None):
            self._end(ticket, "cancelled")

    def _end(self, ticket: Ticket, reason: FinishReason) -> None:
        if ticket.request in self._tickets:
            self._finish(ticket, ticket.row.give_up(reason))

    def _finish(self, ticket: Ticket, text: str) -> None:
        assert ticket.request is not None
        self._done["prompt"] += ticket.request.prompt
        self.scheduler.remove(ticket.request)
        del self._tickets[ticket.request]
        ticket.times.append(time.perf_counter())
        ticket.done.set()
        self._tell(ticket, text, ticket.row.completion)

    def _tell(self, ticket: Ticket, text: str, end: Completion | BaseException | None) -> bool:
        """False where the listener cannot hear any more: that is no reason to stop for the rest."""
        try:
            ticket.told(text, end)
        except BaseException:  # noqa: BLE001 (a listener's own mistake)
            ticket.told = lambda text, end: None
            return False
        return True


def _check_manners(priority: Any, seconds: Any, tenant: Any) -> None:
    """Raises InputError for what only the engine's thread would stumble over."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InputError(f"priority must be an integer, not {strict.describe(priority)}")
    if not isinstance(seconds, int | float) or math.isnan(seconds):
        raise InputError(f"seconds must be a number, not {strict.describe(seconds)}")
    if not isinstance(tenant, str) or not tenant.isprintable():
        raise InputError(f"tenant must be printable text, not {strict.describe(tenant)}")
