"""The folder of a run: claimed by one configuration, and known again by it."""

import hashlib
from pathlib import Path

from infer import files
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
    def of(cls, config: Config) -> "RunFolder":
        """The folder of `config.run.output`, untouched: new, empty, or of the same run.

        Raises InputError.
        """
        folder = cls(Path(config.run.output))
        if (folder.path / CONFIG).is_file():
            folder._check_same(config)
        elif folder.path.exists() and not _is_empty_folder(folder.path):
            raise InputError(
                f"{folder.path}: exists and is no folder of a run; choose another run.output"
            )
        return folder

    def begin(self, config: Config, rows: Rows) -> None:
        """Writes the configuration, and what tells the data from others.

        Raises InputError where the run began with other data.
        """
        digest = hashlib.sha256()
        for array in (rows.tokens, rows.segments, rows.learn):
            digest.update(array.tobytes())
        data = self.path / DATA
        if data.exists() and strict.read_text(data).strip() != digest.hexdigest():
            raise InputError(
                f"{self.path}: the data or the tokenizer changed since the run began; choose "
                "another run.output"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        files.write(self.path / CONFIG, configs.to_toml(config).encode())
        files.write(data, f"{digest.hexdigest()}\n".encode())

    def _check_same(self, config: Config) -> None:
        table = strict.read_toml(self.path / CONFIG)
        before = strict.build(Config, table, str(self.path / CONFIG))
        if changed := configs.differences(before, config):
            raise InputError(
                f"{self.path} holds another run: {'; '.join(changed)}. Choose another run.output, "
                "or give the same settings to go on"
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
