"""Pre-training: every token of every document is predicted from those before it."""

from pangu_jax.text.tokenizer import Tokenizer
from train import config, loop
from train.commands import Pretrain
from train.data import examples
from train.data.examples import Encode, Learn
from train.data.mixture import Reader


def run(command: Pretrain) -> int:
    """The `pretrain` command."""
    return loop.train(config.load(command.config, command.overrides), READER)


def encode(tokenizer: Tokenizer, learn: Learn) -> Encode:
    """Documents; of conversations among them what `learn` says."""
    return examples.either(examples.documents(tokenizer), examples.conversations(tokenizer, learn))


READER = Reader("pretrain", encode, cut=True)
