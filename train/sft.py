"""Supervised fine-tuning: only what assistants say is learnt."""

from collections.abc import Iterator
from pathlib import Path

from pangu_jax.text.tokenizer import Tokenizer
from train import config, data, loop
from train.commands import Sft
from train.config import Config
from train.packing import Example


def run(command: Sft) -> int:
    """The `sft` command."""
    return loop.train(config.load(command.config, command.overrides), read)


def read(config: Config, tokenizer: Tokenizer) -> Iterator[Example]:
    """The conversations of `data.path`."""
    return data.conversations(Path(config.data.path), tokenizer)
