"""The commands of `pangu-train`.

No JAX here: this is read before the command line is understood.
"""

import dataclasses
from typing import Literal

from infer.cli import flag, positional, sections
from train.config import Config, Overrides


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Train a tokenizer: text in, tokenizer.model and tokenizer_config.json out.

    It is of the published kind (SentencePiece BPE with the published special tokens), but small.
    The same text gives the same tokenizer.
    """

    input: str = flag("UTF-8 text file, one sentence or short paragraph per line", metavar="FILE")
    output: str = flag("folder for the two files; an earlier tokenizer stays", metavar="DIR")
    vocab_size: int = flag("pieces, special tokens and single bytes counted", 1024)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training, and what replaces fields of its configuration."""

    config: str = positional("TOML file, or the name of one in configs/train", "CONFIG")
    overrides: Overrides = sections(Config)


@dataclasses.dataclass(frozen=True)
class Pretrain(Run):
    """Train on documents: {"text": ...} lines.

    The run is kept in run.output: config.toml, metrics.jsonl, loss.png, checkpoints, and final/, a
    Hugging Face folder. The same command again goes on where it stopped. Every field of CONFIG can
    be given here.
    """


@dataclasses.dataclass(frozen=True)
class Sft(Run):
    """Train on conversations: {"messages": [...]} lines, of which assistants' turns are learnt.

    An assistant's message may have "thinking"; a line may have "think" (fast, slow or auto: how its
    last user asks for an answer) and "tools". Kept and resumed as by pretrain.
    """


@dataclasses.dataclass(frozen=True)
class Plan(Run):
    """Plan a run's step on a machine you do not have: memory, collectives, the most tokens/s.

    By formula, and by the target's own compiler where it is installed (pangu-jax[tpu], [gpu]).
    Nothing runs: everything is planned, not measured. The data are not read. Every field of CONFIG
    can be given here; model.layout is what to try first.
    """

    target: str = flag("such as v5p:2x2x2, v5e:4x4, h200:8, h200:2x8, or FILE.toml:8")
    formulas: bool = flag("compile nothing", False)
    json: bool = flag("print one JSON object on stdout", False)
    plot: str | None = flag("draw memory and times: .png or .svg", None, metavar="FILE")


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the metrics of a run, also while it is going on: loss, rates, speed, and its routers."""

    run: str = positional("folder of a run (run.output)", "RUN")
    output: str | None = flag(".png or .svg (else RUN/loss.png)", None, metavar="FILE")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Write problems with worked steps and one exact answer: train.jsonl and held-out.jsonl.

    Arithmetic, sorting, counting, edits, dates, in four difficulties. The first file is for
    pangu-train sft, the second for pangu-infer eval; no problem is in both, whatever the seeds.
    """

    output: str = flag("folder for the two files", metavar="DIR")
    tasks: tuple[str, ...] | None = flag("only this task; may be given again (else all)", None)
    examples: int = flag("lines to learn from", 50_000)
    held_out: int = flag("questions of each task and difficulty", 50)
    seed: int = flag("other seeds, other problems of the same two sets", 0)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a nano Pangu to think fast and slow, and ask it what it never saw: some minutes.

    Needs no weights and no network. Kept in a folder per model and seed; the same command again
    goes on where it stopped.
    """

    model: Literal["nano", "nano-moge"] = flag("dense, or with 8 groups of experts", "nano")
    output: str = flag("folder of the demos", "runs/demo", metavar="DIR")
    seed: int = flag("of the weights, the data and the questions", 0)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the speed of a training step against the FLOP bound of this machine.

    Random weights in float32, full rows of random tokens of 2 to 4 examples each, AdamW. The bound,
    a large product, is measured in the same run; so is the same step in PyTorch with --peer, whose
    losses and gradients must be the same (exit code 1 where they are not).
    """

    model: str = flag("name or TOML file of a preset", metavar="NAME|TOML")
    length: int = flag("tokens per row", 128)
    batch: int = flag("rows per step", 8)
    repeats: int = flag("timed repetitions, of half a second or a step", 5)
    peer: bool = flag("compare with PyTorch (dense models, on a CPU)", False)
    json: bool = flag("print one JSON object on stdout", False)


COMMANDS = {
    "bench": Bench,
    "demo": Demo,
    "plan": Plan,
    "plot": Plot,
    "pretrain": Pretrain,
    "sft": Sft,
    "tasks": Tasks,
    "tokenizer": Tokenizer,
}
HANDLERS = {
    "Bench": "train.bench:run",
    "Demo": "train.demo:run",
    "Plan": "train.plan:run",
    "Plot": "train.record:run",
    "Pretrain": "train.pretrain:run",
    "Sft": "train.sft:run",
    "Tasks": "train.tasks.files:run",
    "Tokenizer": "train.tokenizer:run",
}
