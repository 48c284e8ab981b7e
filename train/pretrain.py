"""Pre-training: every token of every document is predicted from those before it."""

from collections.abc import Iterator
from pathlib import Path

from pangu_jax.text.tokenizer import Tokenizer
from train import config, data, loop
from train.commands import Pretrain
from train.config import Config
from train.packing import Example


def run(command: Pretrain) -> int:
    """The `pretrain` command."""
    return loop.train(config.load(command.config, command.overrides), read)


def read(config: Config, tokenizer: Tokenizer) -> Iterator[Example]:
    """The documents of `data.path`, in pieces of `data.length`."""
    return data.documents(Path(config.data.path), tokenizer, config.data.length)
