"""Limits that tests of hostile input set themselves."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Turns a hang into a failure."""

    def ring(*_: object) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
