"""The folder of a run: claimed by one configuration, and known again by it."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtyping import Array

from infer import files
from pangu_jax import strict
from pangu_jax.checkpoint import native
from pangu_jax.checkpoint.hf import COMPANIONS
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from train import config as configs
from train.config import Config

CONFIG, INPUTS, LOCK = "config.toml", "inputs.sha256", ".lock"
METRICS, PICTURE = "metrics.jsonl", "loss.png"


class RunFolder:
    """config.toml, inputs.sha256, data/, metrics.jsonl, loss.png, checkpoints/, final/ and what
    makes it a model folder (`pangu_jax.checkpoint.native`), of one run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.plot = path / PICTURE
        self.data = path / "data"
        self.router = path / "router.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / native.CHECKPOINTS
        self.final = path / native.FINAL

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder of `config.run.output`, untouched: new, empty, or of the same run.

        Raises InputError.
        """
        folder = cls(Path(config.run.output))
        named = (folder.path / CONFIG).is_file()
        if named and (folder.path / INPUTS).is_file():  # else nothing came of it yet
            folder._check_same(config)
        elif not named and folder.path.exists() and not _is_empty_folder(folder.path):
            raise InputError(
                f"{folder.path}: exists and is no folder of a run; choose another run.output"
            )
        return folder

    @contextlib.contextmanager
    def claimed(self, config: Config) -> Iterator[None]:
        """Writes the configuration; within, no other process works in the folder.

        Raises InputError where one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path / LOCK):
            files.write(self.path / CONFIG, configs.to_toml(config).encode())
            yield

    def check_inputs(self, config: Config, model: ModelConfig, data: str) -> None:
        """Keeps what tells model and data from others, or compares it.

        data: a digest of the data
        Raises InputError where the run began with others.
        """
        digest = hashlib.sha256(repr(model).encode())
        if config.model.path is not None:
            for file in native.weight_files(native.home(Path(config.model.path))):
                digest.update(files.fingerprint(file).encode())
        digest.update(data.encode())
        inputs = self.path / INPUTS
        if not inputs.exists():
            files.write(inputs, f"{digest.hexdigest()}\n".encode())
        elif strict.read_text(inputs).strip() != digest.hexdigest():
            raise InputError(
                f"{self.path}: the data, the tokenizer or the model changed since the run began; "
                "choose another run.output"
            )

    def describe(
        self, config: Config, model: Pangu, frozen: Mapping[str, Array], home: Path
    ) -> None:
        """Makes the folder one that `pangu_jax.load` opens: all that its checkpoints do not hold.

        frozen: leaves that are never trained
        home: where tokenizer and generation files lie
        """
        for file in (home / name for name in COMPANIONS):
            if file.is_file() and not (self.path / file.name).exists():
                files.write(self.path / file.name, file.read_bytes())
        if config.lora.scale is not None:
            base = native.Base(
                str(Path(str(config.model.path)).absolute()),
                config.lora.rank or 0,
                config.lora.scale,
                config.lora.targets,
                config.lora.base,
            )
            files.write(self.path / native.BASE, json.dumps(dataclasses.asdict(base)).encode())
        if config.lora.scale is None:
            native.write_frozen(self.path, frozen)
        native.write_config(self.path, model)

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
    left = (LOCK, f".{CONFIG}.")
    return path.is_dir() and all(each.name.startswith(left) for each in path.iterdir())
