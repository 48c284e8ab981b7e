"""What one run of training is: a TOML file, checked, every field a flag of the command line too.

No JAX here: this is read before the command line is understood.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from infer.cli import flag
from pangu_jax import strict
from pangu_jax.config import named_file
from pangu_jax.errors import ConfigError

# More than any published run takes; every number of a step is exact in float32.
MOST_STEPS = 2**24

# What may be another when a run goes on.
SAME_RUN = (("run", "save_every"), ("run", "output"), ("model", "layout"))

Overrides = Mapping[str, Mapping[str, Any]]


def _check(section: object, name: str, right: bool, wanted: str) -> None:
    if not right:
        value = strict.describe(getattr(section, name))
        raise ConfigError(f"{name} must be {wanted}, not {value}")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """What training begins with: a preset's random weights, or a model folder's."""

    preset: str | None = flag("a preset's name or TOML file: random weights", None, metavar="NAME")
    path: str | None = flag("Hugging Face model folder to go on from", None, metavar="DIR")
    tokenizer: str | None = flag(
        "a preset's tokenizer: a folder, or nano", None, metavar="DIR|NAME"
    )
    layout: str | None = flag("a layout's name or TOML file: several devices", None, metavar="NAME")

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.path is None):
            raise ConfigError("give either preset or path")
        if (self.preset is None) == (self.tokenizer is not None):
            raise ConfigError("a preset needs a tokenizer; a folder brings its own, and no other")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What is read, and how much of it a step takes."""

    path: str = flag("JSON lines", metavar="FILE")
    length: int = flag("tokens per row; examples are packed into rows", 1024)
    batch: int = flag("rows per step", 8)

    def __post_init__(self) -> None:
        _check(self, "length", self.length >= 2, "at least 2")
        _check(self, "batch", self.batch >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """AdamW; the learning rate rises linearly and falls along a cosine."""

    learning_rate: float = flag("its highest", 1e-3)
    final_fraction: float = flag("the last learning rate, as a part of the highest", 0.1)
    warmup_steps: int = flag("steps until the highest", 100)
    beta1: float = flag("decay of the mean of gradients", 0.9)
    beta2: float = flag("decay of the mean of their squares", 0.95)
    weight_decay: float = flag("of matrices; biases and norms have none", 0.1)
    clip_norm: float = flag("gradients of a larger norm are scaled down to it", 1.0)
    freeze: tuple[str, ...] = flag("leaves that stay as they are, such as 'blocks.*.router'", ())

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            _check(self, name, 0 < getattr(self, name) <= 1e30, "above 0, and a float32")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        _check(self, "final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1")
        _check(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _check(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where the run is kept and how long it is."""

    output: str = flag("folder of the run", metavar="DIR")
    steps: int = flag("steps in all")
    save_every: int = flag("steps between checkpoints", 500)
    seed: int = flag("of random weights and the order of the data", 0)

    def __post_init__(self) -> None:
        for name in ("steps", "save_every"):
            _check(self, name, 1 <= getattr(self, name) <= MOST_STEPS, f"from 1 to {MOST_STEPS}")
        _check(self, "seed", 0 <= self.seed < 2**31, "from 0 to 2147483647")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of pre-training or supervised fine-tuning. Raises ConfigError when inconsistent."""

    model: ModelSection
    data: DataSection
    run: RunSection
    optimizer: OptimizerSection = OptimizerSection()

    def __post_init__(self) -> None:
        if self.optimizer.warmup_steps > self.run.steps:
            raise ConfigError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) are more than run.steps "
                f"({self.run.steps})"
            )


def load(name: str, overrides: Overrides) -> Config:
    """The configuration in a TOML file, or of that name in configs/train, with fields replaced.

    Raises ConfigError.
    """
    path = named_file("train", name)
    table = strict.read_toml(path)
    for section, values in overrides.items():
        if not isinstance(table.setdefault(section, {}), dict):
            raise ConfigError(f"{path}: {section} must be a table")
        table[section] = {**table[section], **values}
    # What training begins with is one choice: another one on the command line replaces it.
    begin = overrides.get("model", {})
    for one, others in (("path", ("preset", "tokenizer")), ("preset", ("path",))):
        if one in begin:
            for other in set(others) - set(begin):
                table["model"].pop(other, None)
    where = f"{path} and the command line" if overrides else str(path)
    config = strict.build(Config, table, where)
    _check_text(config)
    return config


def _check_text(config: Config) -> None:
    """Raises ConfigError for what no file can be called, or no TOML file can hold."""
    for section, values in dataclasses.asdict(config).items():
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False)
            if "\\u0000" in text or any("\ud800" <= char <= "\udfff" for char in text):
                raise ConfigError(f"{section}.{name}: not a name of a file, or not UTF-8")


def to_toml(config: Config) -> str:
    """The configuration with every field spelt out, as `load` reads it."""
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{k} = {_literal(v)}" for k, v in values.items() if v is not None]
    return "\n".join(lines) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """What would make another run of it, a line each; how often it is saved does not, nor where it
    runs.
    """
    found = []
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    for section, values in before.items():
        for name, value in values.items():
            if (section, name) not in SAME_RUN:
                now = after[section][name]
                if now != value:
                    was, now = strict.describe(value), strict.describe(now)
                    found.append(f"{section}.{name} was {was}, now {now}")
    return found


def _literal(value: Any) -> str:
    """TOML writes strings, numbers and lists of them as JSON does."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
