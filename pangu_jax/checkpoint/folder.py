"""The tensors of a checkpoint folder: one safetensors file, or shards with an index."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pangu_jax import strict
from pangu_jax.checkpoint import safetensors
from pangu_jax.errors import CheckpointError, ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NAME = 255
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Folder:
    """Every tensor of a folder by name, read from memory maps. Raises CheckpointError.

    As in Transformers a single `model.safetensors` goes before an index. Links are followed: the
    Hugging Face cache is made of them. Names in an index must be files of the folder itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, safetensors.File] = {}
        if (path / SINGLE).exists():
            file = safetensors.File(path / SINGLE)
            self._files = dict.fromkeys(file.entries, file)
        elif (path / INDEX).exists():
            self._open_shards(path / INDEX)
        else:
            raise CheckpointError(f"{path}: {_what_is_there(path)}")

    @property
    def names(self) -> Mapping[str, Any]:
        """The tensor names, in no particular order."""
        return self._files

    def entry(self, name: str) -> safetensors.Entry:
        """The dtype and shape of a tensor."""
        return self._files[name].entries[name]

    def file_of(self, name: str) -> Path:
        """The file a tensor lies in, for messages."""
        return self._files[name].path

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in its file."""
        return self._files[name].read(name)

    def _open_shards(self, index: Path) -> None:
        try:
            listed = strict.read_json_object(index).get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{index}: needs a weight_map from tensor names to files")
        for name, file in listed.items():
            _check_file_name(index, name, file)
        shards = {file: safetensors.File(self.path / file) for file in sorted(set(listed.values()))}
        for file, shard in shards.items():
            for name in shard.entries:
                if listed.get(name) != file:
                    raise CheckpointError(
                        f"{self.path / file}: tensor {strict.shorten(name)} is not listed for this "
                        f"file in {INDEX}"
                    )
        for name, file in listed.items():
            if name not in shards[file].entries:
                raise CheckpointError(
                    f"{self.path / file}: tensor {strict.shorten(name)} is missing; {INDEX} has it"
                )
            self._files[name] = shards[file]


def _check_file_name(index: Path, name: str, file: object) -> None:
    where = f"{index}: tensor {strict.shorten(name)}"
    if not isinstance(file, str):
        raise CheckpointError(f"{where}: its file must be a name, not {strict.describe(file)}")
    if not file.isprintable() or len(file) > MAX_NAME:
        raise CheckpointError(f"{where}: {strict.shorten(file)} is not a file name")
    if file in ("", ".", "..") or "/" in file or "\\" in file:
        raise CheckpointError(f"{where}: the file {strict.shorten(file)} lies outside the folder")
    if file.endswith(PICKLES):
        raise CheckpointError(f"{where}: {strict.shorten(file)} is a pickle, which is never loaded")
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{where}: {strict.shorten(file)} is not a safetensors file")


def _what_is_there(path: Path) -> str:
    """Why a folder without model.safetensors and index cannot be loaded."""
    names = sorted(entry.name for entry in os.scandir(path))
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles:
        return (
            f"holds only pickled weights ({strict.shorten(pickles[0])}), which are never loaded; "
            "convert them to safetensors"
        )
    if others:
        return f"has {strict.shorten(others[0])} but neither {SINGLE} nor {INDEX}"
    return f"has no weights: expected {SINGLE} or {INDEX}"
