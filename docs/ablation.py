"""Conventional MoE against MoGE: trains, measures and writes ablation.md and ablation.png.

    JAX_NUM_CPU_DEVICES=8 python docs/ablation.py [--runs FOLDER] [--seeds N ...] [--write]

Every run takes some minutes and is kept in FOLDER; the same command goes on where it stopped. Seeds
may be run side by side; the times of steps come when all are there. With --write the page is
written from what is there.
"""

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pangu_jax
from infer import plots, progress
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.parallel import layout
from pangu_jax.text.tokenizer import Tokenizer
from train import config as configs
from train import loop, objectives, record, sft, tasks
from train.config import Config
from train.data import examples, packing
from train.objectives import Batch, Objective
from train.recipe import Recipe
from train.tasks import files as task_files

PAGE = Path(__file__).with_suffix(".md")
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- written by ablation.py: begin -->", "<!-- end -->"

# All of it own choice: a model of the published proportions in small, 64 experts of which every
# token takes 8, and as many devices as the largest number of groups.
EXPERTS, CHOSEN, RANKS, SEEDS = 64, 8, 8, (0, 1, 2)
LENGTH, BATCH, BALANCE, VALIDATION = 128, 8, 0.01, 64
STEPS = 350


@dataclasses.dataclass(frozen=True)
class Variant:
    """A router: of `groups` groups every token takes as many experts of each; 0 is the
    conventional choice among all, with the softmax over the chosen.
    """

    groups: int
    name: str

    @property
    def model(self) -> ModelConfig:
        """nano-moge with this router and 64 experts."""
        preset = pangu_jax.preset("nano-moge")
        assert preset.moge is not None
        groups = self.groups or 1
        moge = MoGEConfig(
            num_experts=EXPERTS,
            num_groups=groups,
            per_group=CHOSEN // groups,
            expert_width=preset.moge.expert_width,
            shared_width=preset.moge.shared_width,
            router="grouped" if self.groups else "topk",
        )
        return dataclasses.replace(preset, moge=moge)


VARIANTS = (
    Variant(0, "top-8 of 64, softmax after"),
    Variant(1, "top-8 of 64"),
    Variant(2, "2 x top-4 of 32"),
    Variant(4, "4 x top-2 of 16"),
    Variant(8, "8 x top-1 of 8 (MoGE)"),
)


def main() -> None:
    """Trains what is missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.runs)
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    data = _data(arguments.runs)
    for seed in arguments.seeds:
        for variant in VARIANTS:
            run(arguments.runs, variant, seed, arguments.steps, data)
    if all(_result(arguments.runs, v, seed).exists() for v in VARIANTS for seed in SEEDS):
        step_times(arguments.runs, data)


def run(home: Path, variant: Variant, seed: int, steps: int, data: dict[str, Path]) -> None:
    """One run and its measures on what no run learns from, if they are not there yet."""
    result = _result(home, variant, seed)
    if result.exists():
        return
    progress.say(f"{variant.name}, seed {seed}")
    config = _config(home, variant, seed, steps, data["train"])
    if loop.train(config, sft.READER):
        raise SystemExit(130)
    folder = Path(config.run.output)
    model = pangu_jax.load(folder, "float32", None, "stacked")
    found = validate(model, data["validation"])
    losses = [line["loss"] for line in record.read(folder / "metrics.jsonl")]
    result.write_text(json.dumps({**found, "losses": losses}), encoding="utf-8")


def _result(home: Path, variant: Variant, seed: int) -> Path:
    return home / f"{variant.groups}-{seed}.json"


def _config(home: Path, variant: Variant, seed: int, steps: int, data: Path) -> Config:
    preset = home / f"{variant.groups}.toml"
    preset.write_text(_toml(variant.model), encoding="utf-8")
    overrides = {
        "model": {"preset": str(preset), "tokenizer": "nano"},
        "data": {"path": str(data), "length": LENGTH, "batch": BATCH},
        "step": {"balance": BALANCE},
        "optimizer": {"warmup_steps": steps // 10},
        "run": {
            "output": str(home / f"{variant.groups}-{seed}"),
            "steps": steps,
            "save_every": 200,
            "seed": seed,
        },
    }
    return configs.load("nano-moge", overrides)


def validate(model: Any, file: Path) -> dict[str, float]:
    """Loss, and how uneven the ranks' work is, of rows that no run learns from.

    imbalance: (most - fewest pairs of a rank) / tokens of a batch, mean of layers and batches
    slowest: the pairs of the fullest rank of a batch, to the mean of the ranks
    expert_spread: of an expert's pairs in all rows: standard deviation to the mean
    """
    tokenizer = Tokenizer.load(loop.tokenizer_folder(configs.load("nano-moge", {})))
    batches = _batches(file, tokenizer)
    of_batch = jax.jit(lambda model, batch: objectives.objective(model, batch, Objective())[1])
    losses, loads, tokens = [], [], []
    for batch in batches:
        measures = of_batch(model, batch)
        losses.append(float(measures.cross_entropy) * float(batch.weights.sum()))
        loads.append(np.asarray(measures.router.load))
        tokens.append(int((batch.segments > 0).sum()))
    ranks = np.array(loads).reshape(len(loads), -1, RANKS, EXPERTS // RANKS).sum(-1)
    uneven = (ranks.max(-1) - ranks.min(-1)) / np.array(tokens)[:, None]
    whole = np.sum(loads, axis=0)
    return {
        "loss": sum(losses) / sum(float(batch.weights.sum()) for batch in batches),
        "imbalance": float(uneven.mean()),
        "slowest": float((ranks.max(-1) / ranks.mean(-1)).mean()),
        "expert_spread": float((whole.std(-1) / whole.mean(-1)).mean()),
    }


def _batches(file: Path, tokenizer: Tokenizer) -> list[Batch]:
    from train.data import records

    encode = examples.conversations(tokenizer)
    found = [each for line in records.read(file) for each in examples.of(line, encode)]
    found = [each for each in found if each.ids.size <= LENGTH]
    packed = packing.pack(np.array([each.ids.size for each in found]), LENGTH, "first-fit")
    rows = []
    for begin, end in zip(packed.starts[:VALIDATION], packed.starts[1:], strict=False):
        grid = np.zeros((3, LENGTH), np.int32)
        place = 0
        for number, member in enumerate(packed.members[begin:end], 1):
            here = slice(place, place + found[member].ids.size)
            grid[0, here], grid[1, here], grid[2, here] = (
                found[member].ids,
                number,
                found[member].learn,
            )
            place = here.stop
        rows.append(grid)
    cut = [np.stack(rows[i : i + BATCH], axis=1) for i in range(0, VALIDATION, BATCH)]
    return [packing.batch(each[0], each[1], each[2].astype(bool)) for each in cut]


def step_times(home: Path, data: dict[str, Path], repeats: int = 7) -> None:
    """Seconds of a step on eight virtual devices, whole groups on each: of the routers that can be
    laid out so, in turns.
    """
    target = home / "steps.json"
    if target.exists():
        return
    where = layout.load("ep8")
    tokenizer = Tokenizer.load(loop.tokenizer_folder(configs.load("nano-moge", {})))
    batch = _batches(data["validation"], tokenizer)[0]
    steps = {}
    for variant in (VARIANTS[0], VARIANTS[-1]):
        trained = pangu_jax.load(home / f"{variant.groups}-0", "float32", where, "stacked")
        recipe = Recipe(_config(home, variant, 0, STEPS, data["train"]), trained)
        step, state = jax.jit(recipe.step()), recipe.start(trained)
        jax.block_until_ready(step(state, batch))
        steps[variant.groups] = (step, state)
    times: dict[int, list[float]] = {groups: [] for groups in steps}
    for _ in range(repeats):
        for groups, (step, state) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            times[groups].append(time.perf_counter() - start)
    target.write_text(json.dumps(times), encoding="utf-8")


def _data(home: Path) -> dict[str, Path]:
    """Problems to learn from, and others, worked as the first are, that no training set holds."""
    files = {"train": home / task_files.TRAINING, "validation": home / "validation.jsonl"}
    if not files["train"].exists():
        task_files.write(home, tuple(tasks.TASKS), 60_000, 0, 0)
    lines = []
    for number in range(32):
        for task, difficulty in itertools.product(tasks.TASKS, tasks.DIFFICULTIES):
            rng = random.Random(f"{number} {task} {difficulty}")
            problem = next(tasks.draw(task, difficulty, rng, "held-out"))
            lines.append(task_files.conversation(problem, ("fast", "slow")[number % 2]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files["validation"].write_text(text, encoding="utf-8")
    return files


def _toml(model: ModelConfig) -> str:
    """A preset's file."""
    lines, tables = [], []
    for name, value in dataclasses.asdict(model).items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]"]
            tables += [f"{k} = {json.dumps(v)}" for k, v in value.items() if v is not None]
        elif value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def write(home: Path) -> None:
    """The table and the picture from all runs that are there."""
    found = {
        variant: [
            json.loads(file.read_text(encoding="utf-8"))
            for seed in SEEDS
            if (file := _result(home, variant, seed)).exists()
        ]
        for variant in VARIANTS
    }
    times = json.loads((home / "steps.json").read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join(_table(found, times))
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    plots.save(_figure(found), PICTURE)


def _table(found: dict[Variant, list[dict]], times: dict[str, list[float]]) -> list[str]:
    head = (
        *("router", "held-out loss", "less MoGE's, same seed", "imbalance", "fullest rank"),
        *("spread of experts", "step, s"),
    )
    of_moge = [run["loss"] for run in found[VARIANTS[-1]]]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for variant, runs in found.items():
        of = lambda name, digits, runs=runs: _said([run[name] for run in runs], digits)
        apart = [run["loss"] - other for run, other in zip(runs, of_moge, strict=True)]
        values = [of("loss", 4), "" if variant == VARIANTS[-1] else _said(apart, 4)]
        values += [of("imbalance", 3), of("slowest", 3), of("expert_spread", 2)]
        own = times.get(str(variant.groups))
        step = (
            "" if own is None else f"{statistics.median(own):.3f} ({min(own):.3f}-{max(own):.3f})"
        )
        lines.append(" | ".join([variant.name, *values, step]))
    return [f"| {line} |" for line in lines]


def _said(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation between seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _figure(found: dict[Variant, list[dict]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for variant, runs in found.items():
        losses = np.array([run["losses"] for run in runs])
        window = max(1, losses.shape[1] // 35)
        ends = np.arange(window, losses.shape[1] + 1, window)
        means = np.stack([losses[:, end - window : end].mean(1) for end in ends], axis=1)
        middle, spread = means.mean(0), means.std(0, ddof=1)
        (line,) = curves.plot(ends, middle, label=variant.name, linewidth=1.2)
        curves.fill_between(
            ends, middle - spread, middle + spread, color=line.get_color(), alpha=0.15, linewidth=0
        )
    curves.set(xlabel="step", ylabel=f"training loss, mean of {window} steps", yscale="log")
    curves.legend(frameon=False, fontsize="small")
    names = [variant.name.replace(", ", ",\n").replace(" (", "\n(") for variant in found]
    values = [[run["imbalance"] for run in runs] for runs in found.values()]
    bars.bar(
        names,
        [statistics.mean(each) for each in values],
        yerr=[statistics.stdev(each) for each in values],
        color=[f"C{i}" for i in range(len(names))],
        capsize=3,
    )
    bars.set_ylabel("imbalance of 8 ranks")
    bars.tick_params(axis="x", labelrotation=45, labelsize="small")
    return figure


if __name__ == "__main__":
    main()
