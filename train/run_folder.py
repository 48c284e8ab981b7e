"""The folder of a run: claimed by one configuration, and known again by it."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from infer import files
from pangu_jax import strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from train import config as configs
from train.config import Config
from train.packing import Rows

CONFIG, INPUTS, LOCK = "config.toml", "inputs.sha256", ".lock"


class RunFolder:
    """config.toml, inputs.sha256, metrics.jsonl, loss.png, checkpoints/ and final/ of one run."""

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

    @contextlib.contextmanager
    def begin(self, config: Config, model: ModelConfig, rows: Rows) -> Iterator[None]:
        """Writes the configuration, and what tells model and data from others; within, no other
        process works in the folder.

        Raises InputError where the run began with others, or one does.
        """
        digest = hashlib.sha256(repr(model).encode())
        if config.model.path is not None:
            for file in sorted(Path(config.model.path).glob("*.safetensors")):
                digest.update(files.fingerprint(file).encode())
        for array in (rows.tokens, rows.segments, rows.learn):
            digest.update(array.tobytes())
        inputs = self.path / INPUTS
        if inputs.exists() and strict.read_text(inputs).strip() != digest.hexdigest():
            raise InputError(
                f"{self.path}: the data, the tokenizer or the model changed since the run began; "
                "choose another run.output"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        files.write(self.path / CONFIG, configs.to_toml(config).encode())
        with files.locked(self.path / LOCK):
            files.write(inputs, f"{digest.hexdigest()}\n".encode())
            yield

    def _check_same(self, config: Config) -> None:
        table = strict.read_toml(self.path / CONFIG)
        before = strict.build(Config, table, str(self.path / CONFIG))
        if changed := configs.differences(before, config):
            raise InputError(
                f"{self.path} holds another run: {'; '.join(changed)}. Choose another run.output, "
                "or give the same settings to go on"
            )


def _is_empty_folder(path: Path) -> bool:
    """A first write that was interrupted left nothing."""
    return path.is_dir() and all(each.name.startswith(f".{CONFIG}.") for each in path.iterdir())
