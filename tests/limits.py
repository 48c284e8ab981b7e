"""Limits that tests of hostile input set themselves."""

import contextlib
import signal
from collections.abc import Iterator

# How much longer than its own work something may take on a machine that does other work too.
BUSY = 10


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Turns a hang into a failure: more CPU time than that, or BUSY times as long by the clock."""

    def ring(*_: object) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    clocks = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, BUSY * seconds),
    }
    before = {number: signal.signal(number, ring) for number in clocks}
    for clock, limit in clocks.values():
        signal.setitimer(clock, limit)
    try:
        yield
    finally:
        for number, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
