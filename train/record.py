"""What a run was like: metrics.jsonl, a line per step, and the plot made of it."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer import files
from pangu_jax import strict
from pangu_jax.errors import ConfigError, PanguError
from train.step import Metrics

# Losses are shown as they are and averaged over this part of the run (own choice).
SMOOTHED = 50


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
        rate: Callable[[int], Any],
        show: Callable[[int, float, float], None],
    ) -> None:
        """Goes on after `step`: what an interrupted run wrote later is dropped.

        rate: the learning rate of a step counted from 0
        show: called with every step, its loss, and tokens per second
        Raises ConfigError for a file that holds something else.
        """
        kept = [line for line in read(path) if line["step"] <= step] if path.exists() else []
        files.write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._rate, self._show = rate, show
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
        loss = float(metrics.loss)  # waits for the step
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {step}: begin another run with a lower "
                "optimizer.learning_rate (checkpoints before this step are good)"
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(self._rate(step - 1)),
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
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    window = max(1, len(losses) // SMOOTHED)
    means = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="lightsteelblue", linewidth=0.7, label="loss of each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_yscale("log")
    right = axes.twinx()
    rates = [line["learning_rate"] for line in lines]
    right.plot(steps, rates, color="tab:gray", linestyle=":", label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
