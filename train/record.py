"""What a run was like: metrics.jsonl, a line per step, and the plot made of it."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer import files
from pangu_jax import strict
from pangu_jax.errors import ConfigError, PanguError
from train.step import Metrics

# Losses are shown as they are and averaged over this part of the run (own choice).
SMOOTHED = 50
DRAWN = 4000  # points at most


class TrainingError(PanguError):
    """A run that cannot go on."""


class Record:
    """metrics.jsonl, a line per step, and the progress bar.

    A step's metrics are looked at when the next step is under way: the device never waits for the
    host.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        rates: Sequence[float] | np.ndarray,
        show: Callable[[int, float, float], None],
    ) -> None:
        """Goes on after `step`: what an interrupted run wrote later is dropped.

        rates: the learning rate of every step
        show: called with every step, its loss, and tokens per second
        Raises ConfigError for a file that holds something else.
        """
        kept = [line for line in read(path) if line["step"] <= step] if path.exists() else []
        files.write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._rates, self._show = rates, show
        self._waiting: tuple[int, Metrics, int] | None = None
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Metrics, tokens: int) -> None:
        """Takes a step's metrics and number of tokens, and writes those of the step before.

        Raises TrainingError where the loss is no number any more.
        """
        self._write()
        self._waiting = (step, metrics, tokens)

    def flush(self) -> None:
        """Everything so far is in the file. Raises TrainingError as `add`."""
        self._write()
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _write(self) -> None:
        if self._waiting is None:
            return
        step, metrics, tokens = self._waiting
        self._waiting = None
        loss, norm = float(metrics.loss), float(metrics.grad_norm)  # waits for the step
        for name, value in (("loss", loss), ("norm of the gradients", norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at step {step}: begin another run with a lower "
                    "optimizer.learning_rate"
                )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(self._rates[step - 1]),
            "tokens": tokens,
            "seconds": round(seconds, 6),
        }
        self._file.write(json.dumps(line) + "\n")
        self._show(step, loss, tokens / seconds)


def read(path: Path) -> list[dict[str, Any]]:
    """The metrics of every step; a last line that was cut off is left out. Raises ConfigError."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        value = strict.parse_json_object(line, f"{path}, line {number}")
        if not isinstance(value.get("step"), int) or not isinstance(value.get("loss"), float):
            raise ConfigError(f"{path}, line {number}: no metrics of a step")
        found.append(value)
    return found


def plot(path: Path) -> Any:
    """A matplotlib figure of the loss and the learning rate in a metrics.jsonl."""
    from matplotlib.figure import Figure

    lines = read(path)
    steps, losses, rates = (
        np.array([line[name] for line in lines]) for name in ("step", "loss", "learning_rate")
    )
    window = max(1, len(losses) // SMOOTHED)
    sums = np.concatenate([np.zeros(1), np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    shown = slice(None, None, -(-len(losses) // DRAWN))
    steps, losses, means, rates = (x[shown] for x in (steps, losses, means, rates))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="lightsteelblue", linewidth=0.7, label="loss of each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_yscale("log")
    right = axes.twinx()
    right.plot(steps, rates, color="tab:gray", linestyle=":", label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
