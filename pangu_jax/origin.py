"""Where a model came from: what `save_hf` needs beside the weights."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a loaded model remembers of its folder, so that `save_hf` can write it again.

    It is static, part of the model's type, and two origins are equal when they would write the same
    files, wherever those lie: so a compiled function that was traced with one model can never hand
    its tokenizer to another, and models saved and loaded again still share compiled functions.

    config: JSON of what config.json said beyond the ModelConfig
    companions: name and SHA-256 of each tokenizer and generation file
    """

    config: str = "{}"
    companions: tuple[tuple[str, str], ...] = ()
    folder: Path | None = dataclasses.field(default=None, compare=False)
