"""Scores for a person: a table that fits a terminal, the same as Markdown, and a plot."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infer.evaluation import score
from infer.evaluation.score import Evaluation, Score, Speed
from pangu_jax.text.markers import Think

# What fits 80 columns: more difficulties than that are shown in ranges.
WIDTH = 80
MOST_COLUMNS = 5
TASK_WIDTH = 12
MOST_PANELS = 3  # beside each other

COLOURS: dict[Think, str] = {"fast": "tab:orange", "slow": "tab:blue", "auto": "tab:green"}

Row = tuple[str, ...]


def show(evaluation: Evaluation) -> None:
    """Prints the table and the speeds on stdout; as Markdown if that is no terminal."""
    if terminal := sys.stdout.isatty():
        console = Console(emoji=False)
        # In a narrower one lines may break, but no number is cut.
        console.width = max(console.width, WIDTH)
        console.print(table(evaluation))
    else:
        print(markdown(evaluation), end="\n\n")
    for line in speeds(evaluation):
        print(line if terminal else f"- {line}")


def table(evaluation: Evaluation) -> Table:
    """The accuracies: for every task and then for all of them, a line per mode; with 95% intervals
    and the mean number of tokens.
    """
    grid = _Grid(evaluation)
    look = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    found = Table(title=grid.title, title_justify="left", **look)
    for i, name in enumerate(grid.header):
        if i < 2:
            width = TASK_WIDTH if i == 0 else None
            found.add_column(Text(name), overflow="fold", max_width=width)
        else:
            found.add_column(Text(name), justify="right", no_wrap=True)
    for row in grid.tasks:
        found.add_row(*map(Text, row))
    found.add_section()
    for row in grid.total:
        found.add_row(*map(Text, row), style="bold" if row[0] or row[1] in COLOURS else "dim")
    return found


def markdown(evaluation: Evaluation) -> str:
    """The table as Markdown."""
    grid = _Grid(evaluation)
    rule = ["---" if i < 2 else "---:" for i in range(len(grid.header))]
    rows = [grid.header, rule, *grid.tasks, *grid.total]
    line = lambda row: "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    return "\n".join([grid.title, "", *map(line, rows)])


def speeds(evaluation: Evaluation) -> list[str]:
    """A line for every mode, and one for the answers that were cut off, if there are any."""
    lines = [_speed(each) for each in evaluation.speed]
    whole = [s for s in evaluation.scores if s.task is None and s.difficulty is None]
    if any(s.cut for s in whole):
        counts = ", ".join(f"{s.mode} {s.cut:,} of {s.n:,}" for s in whole)
        lines.append(f"cut off at {evaluation.max_new_tokens} tokens, so wrong: {counts}")
    return lines


def figure(evaluation: Evaluation) -> Any:
    """A matplotlib figure of accuracy against difficulty: a panel per task and one for all, a line
    per mode, with 95% intervals.
    """
    from matplotlib.figure import Figure

    tasks = _tasks(evaluation.scores)
    panels: list[str | None] = [*tasks, None] if len(tasks) > 1 else [*tasks]
    columns = min(len(panels), MOST_PANELS)
    rows = -(-len(panels) // columns)
    found = Figure(figsize=(1 + 3 * columns, 1 + 2.4 * rows), layout="constrained")
    axes = [*found.subplots(rows, columns, sharey=True, squeeze=False).flat]
    for axis in axes:
        axis.set_axis_off()
    for axis, task in zip(axes, panels, strict=False):
        axis.set_axis_on()
        _draw(axis, [s for s in evaluation.scores if s.task == task])
        axis.set_title("all tasks" if task is None else task, parse_math=False, fontsize="medium")
    axes[0].legend()
    found.supxlabel("difficulty")
    found.supylabel("accuracy in %")
    return found


class _Grid:
    """The table as text: a title, a header, the rows of each task, the rows of all tasks."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._scores = evaluation.scores
        self._modes = list(dict.fromkeys(s.mode for s in self._scores))
        difficulties = _difficulties(self._scores)
        # With one difficulty there is no more to say than the column of all.
        self._spans = _spans(difficulties) if len(difficulties) > 1 else []
        by = ", by difficulty" if self._spans else ""
        number = len(evaluation.answers) // len(self._modes)
        self.title = f"accuracy in %{by}; {number:,} problems"
        names = [_name(span) for span in self._spans]
        self.header: Row = ("task", "think", *names, "all", "95%", "tokens")
        tasks = _tasks(self._scores)
        single = len(tasks) == 1
        self.tasks = [row for task in tasks if not single for row in self._rows(task, task)]
        self.total = [*self._rows(None, tasks[0] if single else "all", bounds=True)]

    def _rows(self, task: str | None, label: str, bounds: bool = False) -> Iterator[Row]:
        """A row per mode; with `bounds` also one of the intervals of every difficulty."""
        for i, mode in enumerate(self._modes):
            mine = [s for s in self._scores if (s.mode, s.task) == (mode, task)]
            found = [score.merge([s for s in mine if s.difficulty in span]) for span in self._spans]
            (whole,) = [s for s in mine if s.difficulty is None]
            ends = (_percent(whole), _interval(whole), _tokens(whole))
            yield (label if i == 0 else "", mode, *map(_percent, found), *ends)
            if bounds and self._spans:
                yield ("", "95%", *map(_interval, found), "", "", "")


def _draw(axis: Any, scores: Sequence[Score]) -> None:
    """The lines of one panel."""
    modes: list[Think] = list({s.mode: None for s in scores})
    levels = _difficulties(scores)
    for i, mode in enumerate(modes):
        mine = {s.difficulty: s for s in scores if s.mode == mode}
        mine = {level: mine[level] for level in levels if level in mine}
        # Side by side, so that no bar hides another.
        x = [level + 0.06 * (i - (len(modes) - 1) / 2) for level in mine]
        y = [100 * s.accuracy for s in mine.values()]
        ends = [(s.accuracy - s.interval[0], s.interval[1] - s.accuracy) for s in mine.values()]
        bars = [[100 * end[side] for end in ends] for side in (0, 1)]
        axis.errorbar(x, y, bars, label=mode, color=COLOURS[mode], marker="o", ms=4, capsize=2)
    axis.set_ylim(-4, 104)
    axis.set_xlim(levels[0] - 0.5, levels[-1] + 0.5)
    axis.grid(alpha=0.3)
    if len(levels) <= 12:
        axis.set_xticks(levels, [_name([level]) for level in levels])


def _tasks(scores: Sequence[Score]) -> list[str]:
    """The tasks, as they first come."""
    return list(dict.fromkeys(s.task for s in scores if s.task is not None))


def _difficulties(scores: Sequence[Score]) -> list[int]:
    return sorted({s.difficulty for s in scores if s.difficulty is not None})


def _spans(difficulties: list[int]) -> list[list[int]]:
    """Each difficulty alone, or MOST_COLUMNS runs of them, about equally many in each."""
    count, size = min(len(difficulties), MOST_COLUMNS), len(difficulties)
    return [difficulties[size * i // count : size * (i + 1) // count] for i in range(count)]


def _name(span: list[int]) -> str:
    if len(span) > 1:
        return f"{span[0]}-{span[-1]}"
    return str(span[0]) if span[0] else "-"


def _percent(found: Score | None) -> str:
    """The accuracy; 100 only if all are right, 0 only if none is."""
    if found is None:
        return ""
    if found.correct in (0, found.n):
        return "0" if found.correct == 0 else "100"
    return str(min(max(round(100 * found.accuracy), 1), 99))


def _interval(found: Score | None) -> str:
    """The bounds, rounded outwards."""
    if found is None:
        return ""
    low, high = found.interval
    return f"{math.floor(100 * low)}-{math.ceil(100 * high)}"


def _tokens(found: Score) -> str:
    mean = found.mean_tokens
    return f"{mean:.1f}" if mean < 1000 else f"{mean:.0f}"


def _speed(speed: Speed) -> str:
    rate = f"{speed.mode}: {speed.tokens_per_s:,.0f} tokens/s"
    total = f"{speed.tokens:,} tokens in {speed.seconds:,.1f} s"
    if speed.includes_compilation:
        return f"{rate} with compilation; {total}"
    if speed.compiled_seconds:
        return f"{rate} without compilation; {total} with it"
    return f"{rate}; {total}"
