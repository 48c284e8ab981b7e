"""A run's files, as its configuration has them: stores, and the feed of each phase."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from infer import progress
from pangu_jax.checkpoint.hf import COMPANIONS, GENERATION
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import Tokenizer
from train.config import Config, Stage
from train.data import store as stores
from train.data.examples import Encode, Learn
from train.data.feed import Feed, Rows
from train.data.store import Store


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a command makes of a record.

    cut: an example longer than a row is cut into pieces; else it is left out
    """

    name: str
    encode: Callable[[Tokenizer, Learn], Encode]
    cut: bool


class Data:
    """All files of a run, tokenised in a folder of the run."""

    def __init__(
        self, config: Config, reader: Reader, tokenizer: Tokenizer, home: Path, folder: Path
    ) -> None:
        """home: where the tokenizer's files lie. Raises InputError."""
        encode = reader.encode(tokenizer, config.data.learn)
        made_by = {"reader": reader.name, "learn": config.data.learn, "tokenizer": _digest(home)}
        self._config, self._reader = config, reader
        self._rows: dict[tuple[str, int], Rows] = {}
        self.stores: dict[str, Store] = {}
        for source in config.sources:
            path = Path(source.path)
            with progress.counting(f"tokenising {path}") as advance:
                found = stores.of(
                    folder / source.name, path, encode, made_by, config.data.bad, advance
                )
            if found.skipped:
                told = folder / source.name / stores.SKIPPED
                progress.say(f"{path}: {found.skipped:,} bad lines are left out; see {told}")
            if not found.learn.any():
                raise InputError(f"{path}: nothing to learn from")
            self.stores[source.name] = found

    @property
    def digest(self) -> str:
        """Of all tokens, and of what is learnt."""
        return repr([(name, len(s), s.digest) for name, s in self.stores.items()])

    def feed(self, stage: Stage) -> Feed:
        """The batches of a phase. Raises InputError where nothing fits into its rows."""
        weights = {name: weight for name, weight in stage.weights.items() if weight > 0}
        rows = {name: self._packed(name, stage.length) for name in weights}
        return Feed(rows, weights, stage.batch, (self._config.run.seed, stage.begin))

    def _packed(self, name: str, length: int) -> Rows:
        if (name, length) in self._rows:
            return self._rows[name, length]
        found = Rows(self.stores[name], length, self._config.data.packing, self._reader.cut)
        path = next(source.path for source in self._config.sources if source.name == name)
        if not len(found):
            raise InputError(f"{path}: nothing to learn from in rows of {length} tokens")
        _tell(path, len(self.stores[name]), found, length)
        self._rows[name, length] = found
        return found


def _tell(path: str, examples: int, rows: Rows, length: int) -> None:
    if rows.left_out:
        progress.say(
            f"{path}: {rows.left_out:,} of {examples:,} examples are longer than data.length "
            f"({length}) and left out; the longest has {rows.longest:,} tokens"
        )
    progress.say(
        f"{path}: {examples - rows.left_out:,} examples in {len(rows):,} rows of {length} tokens, "
        f"{rows.filled:.1%} filled"
    )


def _digest(home: Path) -> str:
    """Of all files that say how text becomes token ids."""
    digest = hashlib.sha256()
    for name in sorted(set(COMPANIONS) - {GENERATION}):
        if (home / name).is_file():
            digest.update(name.encode())
            digest.update(hashlib.sha256((home / name).read_bytes()).digest())
    return digest.hexdigest()
