"""What a person sees while something takes long: bars on stderr, if that is a terminal."""

import contextlib
import io
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, emoji=False)

Advance = Callable[[int, int], None]


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters become U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def safe(text: str, stream: io.TextIOBase | TextIO) -> str:
    """Text as it may be written to the stream: as it is, or printable on a terminal."""
    return printable(text) if stream.isatty() else text


def say(line: str) -> None:
    """One line on stderr."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def reading(what: str = "reading") -> Iterator[Advance]:
    """A bar of bytes; call the result with (done, total)."""
    with _bar(what, DownloadColumn()) as (bar, task):
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def generating(most: int) -> Iterator[Callable[[int], None]]:
    """A bar of tokens; call the result with the number generated so far."""
    with _bar("compiling, then generating", MofNCompleteColumn(), most) as (bar, task):
        yield lambda done: bar.update(task, completed=done, description="generating")


@contextlib.contextmanager
def answering(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar of prompts; call the result with the tokens of each prompt that is answered."""
    tokens, start = 0, time.perf_counter()
    with _bar("answering", MofNCompleteColumn(), total) as (bar, task):
        bar.update(task, completed=done)

        def advance(more: int) -> None:
            nonlocal tokens
            tokens += more
            rate = tokens / (time.perf_counter() - start)
            bar.update(task, advance=1, description=f"answering, {rate:,.0f} tokens/s")

        yield advance


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[], None]]:
    """A number that grows by one with every call of the result: nobody knows how far."""
    with _bar(what, MofNCompleteColumn()) as (bar, task):
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def training(total: int, done: int) -> Iterator[Callable[[int, float, float], None]]:
    """A bar of steps; call the result with each step, its loss, and tokens per second.

    Where there is no terminal, twenty lines instead.
    """
    start = time.perf_counter()
    with _bar("compiling, then training", MofNCompleteColumn(), total) as (bar, task):
        bar.update(task, completed=done)

        def show(step: int, loss: float, rate: float) -> None:
            text = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
            bar.update(task, completed=step, description=text)
            if not console.is_terminal and step * 20 // total > (step - 1) * 20 // total:
                left = (time.perf_counter() - start) / (step - done) * (total - step)
                say(f"step {step:,} of {total:,}: {text}, {left:,.0f} s left")

        yield show


@contextlib.contextmanager
def _bar(
    what: str, counter: ProgressColumn, total: int | None = None
) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        yield bar, bar.add_task(what, total=total)
