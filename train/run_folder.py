"""The folder of a run: claimed by one configuration, and known again by it."""

import hashlib
import os
from pathlib import Path

from pangu_jax import strict
from pangu_jax.errors import InputError
from train import config as configs
from train.config import Config
from train.packing import Rows

CONFIG, DATA = "config.toml", "data.sha256"


class RunFolder:
    """config.toml, data.sha256, metrics.jsonl, loss.png, checkpoints/ and final/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"

    @classmethod
    def claim(cls, config: Config) -> "RunFolder":
        """The folder of `config.run.output`: new, empty, or of the same run.

        Raises InputError.
        """
        folder = cls(Path(config.run.output))
        known = folder.path / CONFIG
        if known.is_file():
            folder._check_same(config)
        elif folder.path.exists() and not _is_empty_folder(folder.path):
            raise InputError(
                f"{folder.path}: exists and is no folder of a run; choose another run.output"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        _write(known, configs.to_toml(config))
        return folder

    def _check_same(self, config: Config) -> None:
        table = strict.read_toml(self.path / CONFIG)
        before = strict.build(Config, table, str(self.path / CONFIG))
        if changed := configs.differences(before, config):
            raise InputError(
                f"{self.path} holds another run: {'; '.join(changed)}. Choose another run.output, "
                "or give the same settings to go on"
            )

    def check_data(self, rows: Rows) -> None:
        """Remembers the run's data, or recognises them. Raises InputError where they changed."""
        digest = hashlib.sha256()
        for array in (rows.tokens, rows.segments, rows.learn):
            digest.update(array.tobytes())
        file = self.path / DATA
        if not file.exists():
            _write(file, digest.hexdigest() + "\n")
        elif strict.read_text(file).strip() != digest.hexdigest():
            raise InputError(
                f"{self.path}: the data or the tokenizer changed since the run began; choose "
                "another run.output"
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
