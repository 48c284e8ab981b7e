"""What a run was like: metrics.jsonl, a line per step, and the plot made of it."""

import collections
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infer import files, plots, progress
from pangu_jax import strict
from pangu_jax.errors import ConfigError, InputError, PanguError
from train.commands import Plot
from train.config import SPIKE_WINDOW
from train.run_folder import METRICS, PICTURE, RunFolder
from train.step import Metrics

# Losses are shown as they are and averaged over this part of the run (own choice).
SMOOTHED = 50
DRAWN = 4000  # points at most

# What is drawn below the loss: what an axis says, and by metric the colour and name of a line.
PANEL_OF_NORM = ("norm of the\ngradients", {"grad_norm": ("tab:green", "")})
PANEL_OF_SPEED = ("tokens/s", {"tokens_per_s": ("tab:orange", "")})
PANEL_OF_EXPERTS = (
    "load of experts,\nto the mean",
    {"load_max": ("tab:red", "the fullest"), "load_spread": ("tab:purple", "spread")},
)


class TrainingError(PanguError):
    """A run that cannot go on."""


class Failure(TrainingError):
    """A step's numbers are none, or far from those before it."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} at step {step}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class Taken:
    """What is known of a step when it is sent off.

    tokens: in it, without padding
    flops: model FLOPs (`train.flops.step_flops`)
    """

    step: int
    rate: float
    tokens: int
    flops: float


class Record:
    """metrics.jsonl, a line per step; router.jsonl, a line per checkpoint; the progress bar.

    A step's metrics are looked at when the next step is under way: the device never waits for the
    host.
    """

    def __init__(
        self,
        folder: RunFolder,
        step: int,
        show: Callable[[int, float, float], None],
        *,
        spike: float | None = None,
        peak: float | None = None,
        tensorboard: bool = False,
    ) -> None:
        """Goes on after `step`: what an interrupted run wrote later is dropped.

        show: called with every step, its loss, and tokens per second
        spike: a loss so many times the median of the last ones is a failure
        peak: FLOP/s of all devices, if it is known

        Raises ConfigError for a file that holds something else, InputError where TensorBoard's
        writer is not installed.
        """
        kept = _cut(folder.metrics, step, read)
        _cut(folder.router, step, _objects)
        self._board = _board(folder.tensorboard, step) if tensorboard else None  # may be refused
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._router_file = folder.router.open("a", encoding="utf-8")
        self._losses = collections.deque([line["loss"] for line in kept], SPIKE_WINDOW)
        self._show, self._spike, self._peak = show, spike, peak
        self._load: np.ndarray | None = None
        self._waiting: tuple[Taken, Metrics] | None = None
        self._since = time.perf_counter()

    def add(self, taken: Taken, metrics: Metrics) -> None:
        """Takes a step's metrics, and writes those of the step before. Raises Failure."""
        self._write()
        self._waiting = (taken, metrics)

    def flush(self) -> None:
        """Everything so far is in the files. Raises Failure."""
        taken = self._waiting[0] if self._waiting is not None else None
        self._write()
        if self._load is not None and taken is not None:
            line = {"step": taken.step, "load": self._load.astype(int).tolist()}
            self._router_file.write(json.dumps(line) + "\n")
            self._load = None
        for file in (self._file, self._router_file, self._board):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Ends the files."""
        for file in (self._file, self._router_file, self._board):
            if file is not None:
                file.close()

    def _write(self) -> None:
        if self._waiting is None:
            return
        (taken, metrics), self._waiting = self._waiting, None
        found = jax.device_get(metrics)  # waits for the step
        self._check(taken.step, found)
        self._losses.append(float(found.loss))
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        line = {
            "step": taken.step,
            "loss": float(found.loss),
            "grad_norm": float(found.grad_norm),
            "weight_norm": float(found.weight_norm),
            "z": float(found.z),
            "learning_rate": taken.rate,
            "tokens": taken.tokens,
            "seconds": round(seconds, 6),
            "tokens_per_s": round(taken.tokens / seconds, 1),
            "tflops": round(taken.flops / seconds / 1e12, 6),
        }
        if self._peak is not None:
            line["mfu"] = round(taken.flops / seconds / self._peak, 4)
        if (bytes_used := memory()) is not None:
            line["memory_gb"] = round(bytes_used / 1e9, 3)
        if found.router is not None:
            line |= self._of_router(found)
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, taken.step)
        self._show(taken.step, float(found.loss), taken.tokens / seconds)

    def _check(self, step: int, found: Metrics) -> None:
        loss = float(found.loss)
        for name, value in (
            ("loss", loss),
            ("norm of the gradients", float(found.grad_norm)),
            ("norm of the weights", float(found.weight_norm)),
            ("mean of logsumexp(logits)^2", float(found.z)),
        ):
            if not math.isfinite(value):
                raise Failure(step, f"the {name} is {value}")
        if self._spike is not None and len(self._losses) >= SPIKE_WINDOW:
            usual = statistics.median(self._losses)
            if loss > self._spike * usual:
                raise Failure(step, f"the loss is {loss:.3f}, after a median of {usual:.3f},")

    def _of_router(self, found: Metrics) -> dict[str, float]:
        """Of all layers' experts: the largest load and the spread of loads, as parts of the mean;
        how many had nothing to do; the entropy of the choice, in nats.
        """
        assert found.router is not None
        assert found.balance is not None
        load = np.asarray(found.router.load)
        self._load = load if self._load is None else self._load + load
        parts = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)
        return {
            "balance": float(found.balance),
            "load_max": round(float(parts.max()), 4),
            "load_spread": round(float(parts.std(axis=1).mean()), 4),
            "idle_experts": round(float((load == 0).mean()), 4),
            "router_entropy": round(float(np.mean(found.router.entropy)), 4),
        }


def memory() -> int | None:
    """The most bytes in use so far: of the fullest device of this process; on a CPU of the process.
    None where nobody knows.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    used = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in jax.local_devices()]
    return max((int(each) for each in used if each is not None), default=None)


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("run.tensorboard needs `pip install tensorboardX`") from None
    # Named by the second alone, two starts in one would have one file.
    return SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=f".{time.time_ns()}")


def _cut(path: Path, step: int, read: Callable[[Path], list[dict]]) -> list[dict[str, Any]]:
    """The lines up to a step; the others are dropped from the file."""
    kept = [line for line in read(path) if line["step"] <= step] if path.exists() else []
    files.write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def _objects(path: Path) -> list[dict[str, Any]]:
    """Lines with a step; a last line that was cut off is left out. Raises ConfigError."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        value = strict.parse_json_object(line, f"{path}, line {number}")
        if not isinstance(value.get("step"), int):
            raise ConfigError(f"{path}, line {number}: no metrics of a step")
        found.append(value)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The metrics of every step; a last line that was cut off is left out. Raises ConfigError."""
    found = _objects(path)
    for number, line in enumerate(found, 1):
        if not isinstance(line.get("loss"), float):
            raise ConfigError(f"{path}, line {number}: no metrics of a step")
    return found


def run(command: Plot) -> int:
    """The `plot` command."""
    folder = Path(command.run)
    metrics = folder / METRICS
    if not metrics.is_file():
        raise InputError(f"{metrics}: no such file; is {folder} the folder of a run?")
    target = Path(command.output or folder / PICTURE)
    plots.check(target, "plot")
    plots.save(plot(metrics), target)
    progress.say(f"wrote {target}")
    return 0


def plot(path: Path) -> Any:
    """A matplotlib figure of a metrics.jsonl: loss and learning rate, norm of the gradients, speed
    and, where there are experts, their loads.

    Raises ConfigError for a file without any step.
    """
    from matplotlib.figure import Figure

    lines = read(path)
    if not lines:
        raise ConfigError(f"{path}: no step yet")
    every = slice(None, None, -(-len(lines) // DRAWN))
    column = lambda name: np.array([line.get(name, math.nan) for line in lines])
    steps, window = column("step"), max(1, len(lines) // SMOOTHED)
    panels = [PANEL_OF_NORM, PANEL_OF_SPEED]
    panels += [PANEL_OF_EXPERTS] if "load_max" in lines[-1] else []
    figure = Figure(figsize=(7, 3 + 1.6 * len(panels)), layout="constrained")
    ratios = [2.0] + [1.0] * len(panels)
    loss, *others = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
    draw = lambda axes, values, **style: axes.plot(steps[every], values[every], **style)
    draw(loss, column("loss"), color="lightsteelblue", linewidth=0.7, label="loss of each step")
    if window > 1:
        mean = f"mean of {window} steps"
        draw(loss, _smoothed(column("loss"), window), color="tab:blue", label=mean)
    loss.set_ylabel("cross-entropy,\nnats per token")
    loss.set_yscale("log")
    right = loss.twinx()
    draw(right, column("learning_rate"), color="tab:gray", linestyle=":", label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    for axes, (label, names) in zip(others, panels, strict=True):
        for name, (color, legend) in names.items():
            draw(axes, _smoothed(column(name), window), color=color, label=legend)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize="small")
    (others[-1] if others else loss).set_xlabel("step")
    handles = [*loss.get_lines(), *right.get_lines()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at every place."""
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
