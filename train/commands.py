"""The commands of `pangu-train`.

No JAX here: this is read before the command line is understood.
"""

import dataclasses

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


COMMANDS = {"pretrain": Pretrain, "sft": Sft, "tasks": Tasks, "tokenizer": Tokenizer}
HANDLERS = {
    "Pretrain": "train.pretrain:run",
    "Sft": "train.sft:run",
    "Tasks": "train.tasks.files:run",
    "Tokenizer": "train.tokenizer:run",
}
