"""Supervised fine-tuning: only what assistants say is learnt."""

from train import config, loop
from train.commands import Sft
from train.data import examples
from train.data.mixture import Reader

READER = Reader("sft", examples.conversations, cut=False)


def run(command: Sft) -> int:
    """The `sft` command."""
    return loop.train(config.load(command.config, command.overrides), READER)
