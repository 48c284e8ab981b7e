"""The commands of `pangu-train`.

No JAX here: this is read before the command line is understood.
"""

import dataclasses

from infer.cli import flag


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Train a tokenizer: text in, tokenizer.model and tokenizer_config.json out.

    It is of the published kind (SentencePiece BPE with the published special tokens), but small.
    The same text gives the same tokenizer.
    """

    input: str = flag("UTF-8 text file, one sentence or short paragraph per line", metavar="FILE")
    output: str = flag("folder for the two files; an earlier tokenizer stays", metavar="DIR")
    vocab_size: int = flag("pieces, special tokens and single bytes counted", 1024)


COMMANDS = {"tokenizer": Tokenizer}
HANDLERS = {"Tokenizer": "train.tokenizer:run"}
