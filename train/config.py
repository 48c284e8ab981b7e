"""What one run of training is: a TOML file, checked, every field a flag of the command line too.

No JAX here: this is read before the command line is understood.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from infer.cli import flag
from pangu_jax import strict
from pangu_jax.config import named_file
from pangu_jax.errors import ConfigError

# More than any published run takes; every number of a step is exact in float32.
MOST_STEPS = 2**24

# What may be another when a run goes on.
SAME_RUN = (
    ("run", "save_every"),
    ("run", "keep"),
    ("run", "output"),
    ("run", "spike"),
    ("run", "failure"),
    ("run", "tensorboard"),
    ("model", "layout"),
    ("step", "remat"),
)

# Weights of sources are mixed in whole numbers (own choice).
MOST_UNEVEN = 10_000

# Losses whose median a spike is compared with (own choice).
SPIKE_WINDOW = 100

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
    """What is read, and how much of it a step takes; several files are a [[source]] each."""

    path: str | None = flag("JSON lines, .parquet or .arrayrecord", None, metavar="FILE")
    length: int = flag("tokens per row; examples are packed into rows", 1024)
    batch: int = flag("rows per step", 8)
    packing: Literal["knapsack", "first-fit"] = flag(
        "fill rows with what fits best, or in the order of the file", "knapsack"
    )
    learn: Literal["assistants", "last", "all"] = flag(
        "of conversations: what assistants say, their last turn, or all of it", "assistants"
    )
    bad: Literal["stop", "skip"] = flag("at a bad line: stop, or leave it out and say so", "stop")

    def __post_init__(self) -> None:
        _check(self, "length", self.length >= 2, "at least 2")
        _check(self, "batch", self.batch >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of a mixture: `weight` is its part of all rows, next to the others'."""

    name: str
    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ConfigError(
                f"name must be letters, digits, '.', '_' and '-', not {strict.shorten(self.name)}"
            )
        _check(self, "weight", 0 <= self.weight <= 1e9, "from 0 to 1e9")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run with settings of its own; what is left out is as in the other sections.

    Its learning rate falls from the first to the last along a cosine, as in the published phases
    (arXiv 2505.21411, section 3.1).
    """

    steps: int
    learning_rate: float | None = None
    last_learning_rate: float | None = None
    length: int | None = None
    batch: int | None = None
    weights: dict | None = None

    def __post_init__(self) -> None:
        _check(self, "steps", 1 <= self.steps <= MOST_STEPS, f"from 1 to {MOST_STEPS}")
        for name in ("learning_rate", "last_learning_rate"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 < value <= 1e30, "above 0, and a float32")
        _check(self, "length", self.length is None or self.length >= 2, "at least 2")
        _check(self, "batch", self.batch is None or self.batch >= 1, "at least 1")
        for name, weight in (self.weights or {}).items():
            where = f"weights.{strict.shorten(name, quote=False)}"
            value = strict.coerce(float, weight, where)
            if not 0 <= value <= 1e9:
                raise ConfigError(f"{where} must be from 0 to 1e9, not {value}")


@dataclasses.dataclass(frozen=True)
class StepSection:
    """How a step computes its loss and gradients."""

    compute: Literal["float32", "bfloat16"] = flag(
        "dtype of a step's products; the weights that are trained stay float32", "float32"
    )
    remat: Literal["dots", "full"] | None = flag(
        "what of a layer the backward pass computes again: all but products, or everything "
        "(default: dots, under fsdp full)",
        None,
    )
    accumulate: int = flag("parts of a batch, one after the other: less memory, same step", 1)
    z_loss: float = flag("weight of the mean of logsumexp(logits)^2", 0.0)
    balance: float = flag("weight of MoGE's auxiliary loss, which spreads tokens over experts", 0.0)

    def __post_init__(self) -> None:
        _check(self, "accumulate", 1 <= self.accumulate <= 2**16, "from 1 to 65536")
        for name in ("z_loss", "balance"):
            _check(self, name, 0 <= getattr(self, name) <= 1e6, "from 0 to 1e6")


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters: they alone are trained, and merged into the model at the end."""

    rank: int | None = flag("of the adapters; without one the whole model is trained", None)
    alpha: float = flag("adapters are scaled by alpha / rank", 16.0)
    targets: tuple[str, ...] = flag("matrices that have one, such as 'mlp.*' (else all)", ())
    base: Literal["w8a16", "w8a8", "w4a16", "fp8"] | None = flag(
        "round the model's own weights to so few bits, to save memory", None
    )

    def __post_init__(self) -> None:
        _check(self, "rank", self.rank is None or 1 <= self.rank <= 4096, "from 1 to 4096")
        _check(self, "alpha", 0 < self.alpha <= 1e6, "above 0, at most 1e6")
        if self.rank is None and (self.targets or self.base):
            raise ConfigError("targets and base need a rank")

    @property
    def scale(self) -> float | None:
        """Of the adapters; None where there are none."""
        return None if self.rank is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """AdamW or Muon; the learning rate rises linearly and falls along a cosine."""

    name: Literal["adamw", "muon"] = flag("muon: for matrices; the rest has AdamW", "adamw")
    learning_rate: float = flag("its highest", 1e-3)
    final_fraction: float = flag("the last learning rate, as a part of the highest", 0.1)
    warmup_steps: int = flag("steps until the highest", 100)
    beta1: float = flag("decay of the mean of gradients", 0.9)
    beta2: float = flag("decay of the mean of their squares", 0.95)
    weight_decay: float = flag("of matrices; biases and norms have none", 0.1)
    clip_norm: float = flag("gradients of a larger norm are scaled down to it", 1.0)
    ema: float | None = flag("decay of a running mean of the weights, which final/ is then", None)
    freeze: tuple[str, ...] = flag("leaves that stay as they are, such as 'blocks.*.router'", ())

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            _check(self, name, 0 < getattr(self, name) <= 1e30, "above 0, and a float32")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        _check(self, "ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1")
        _check(self, "final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1")
        _check(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _check(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where the run is kept and how long it is."""

    output: str = flag("folder of the run", metavar="DIR")
    steps: int = flag("steps in all")
    save_every: int = flag("steps between checkpoints", 500)
    keep: int = flag("how many of the newest checkpoints stay", 2)
    seed: int = flag("of random weights and the order of the data", 0)
    spike: float | None = flag(
        f"a loss this many times the median of the last {SPIKE_WINDOW} steps is a failure", None
    )
    failure: Literal["stop", "skip"] = flag(
        "at a loss that is a failure, or no number: stop, or go back to the last checkpoint and "
        "leave those batches out",
        "stop",
    )
    tensorboard: bool = flag("also write what TensorBoard reads", False)

    def __post_init__(self) -> None:
        for name in ("steps", "save_every"):
            _check(self, name, 1 <= getattr(self, name) <= MOST_STEPS, f"from 1 to {MOST_STEPS}")
        _check(self, "keep", 1 <= self.keep <= 10_000, "from 1 to 10000")
        _check(self, "seed", 0 <= self.seed < 2**31, "from 0 to 2147483647")
        _check(self, "spike", self.spike is None or self.spike > 1, "more than 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A phase with everything spelt out: steps `begin` to `end`, counted from 0 (the last not in
    it).
    """

    begin: int
    end: int
    learning_rate: float
    last_learning_rate: float
    length: int
    batch: int
    weights: dict[str, float]

    @classmethod
    def whole(cls, section: OptimizerSection, steps: int) -> "Stage":
        """A run of one phase, for those who only want its learning rates."""
        first = section.learning_rate
        return cls(0, steps, first, first * section.final_fraction, 0, 0, {})


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of pre-training or supervised fine-tuning. Raises ConfigError when inconsistent."""

    model: ModelSection
    data: DataSection
    run: RunSection
    step: StepSection = StepSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection = LoraSection()
    source: tuple[Source, ...] = ()
    phase: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if (self.data.path is None) == (not self.source):
            raise ConfigError("give either data.path or a [[source]] for each of several files")
        if self.lora.rank is not None and self.optimizer.freeze:
            raise ConfigError("optimizer.freeze: with lora.rank all but the adapters is frozen")
        if self.lora.rank is not None and self.model.path is None:
            raise ConfigError("lora.rank needs a model.path: adapters stand beside trained weights")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError("two [[source]] have the same name")
        if self.optimizer.warmup_steps > self.stages[0].end:
            raise ConfigError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) are more than "
                f"{'the first phase' if self.phase else 'run.steps'} ({self.stages[0].end})"
            )
        for number, stage in enumerate(self.stages, 1):
            where = f"phase {number}: " if self.phase else ""
            if unknown := sorted(set(stage.weights) - set(names)):
                raise ConfigError(
                    f"{where}no [[source]] is called {strict.shorten(unknown[0])}"
                    f"{strict.suggest(unknown[0], names)}"
                )
            if self.step.accumulate > stage.batch:
                raise ConfigError(
                    f"{where}step.accumulate ({self.step.accumulate}) is more than the "
                    f"{stage.batch} rows of a batch"
                )
            used = [weight for weight in stage.weights.values() if weight > 0]
            if not used:
                raise ConfigError(f"{where}all weights are 0")
            if max(used) > MOST_UNEVEN * min(used):
                raise ConfigError(
                    f"{where}the largest weight is more than {MOST_UNEVEN:,} times the smallest"
                )
        if self.phase and (total := self.stages[-1].end) != self.run.steps:
            raise ConfigError(f"the phases have {total} steps, but run.steps is {self.run.steps}")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The files; the only one of data.path is called `data`."""
        return self.source or (Source("data", str(self.data.path)),)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The phases, or the one that the whole run is."""
        rate, begin, found = self.optimizer.learning_rate, 0, []
        for phase in self.phase or (Phase(self.run.steps),):
            first = rate if phase.learning_rate is None else phase.learning_rate
            last = phase.last_learning_rate
            stage = Stage(
                begin,
                begin + phase.steps,
                first,
                first * self.optimizer.final_fraction if last is None else last,
                phase.length or self.data.length,
                phase.batch or self.data.batch,
                {source.name: source.weight for source in self.sources}
                if phase.weights is None
                else {name: float(weight) for name, weight in phase.weights.items()},
            )
            begin, _ = stage.end, found.append(stage)
        return tuple(found)


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
    for section, values in _tables(config):
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False)
            if "\\u0000" in text or any("\ud800" <= char <= "\udfff" for char in text):
                where = f"{section.strip('[]')}.{name}"
                raise ConfigError(f"{where}: not a name of a file, or not UTF-8")


def _tables(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table of the file, by the line it begins with; those of one list follow each other."""
    for name, value in dataclasses.asdict(config).items():
        for table in value if isinstance(value, tuple) else [value]:
            yield f"[[{name}]]" if isinstance(value, tuple) else f"[{name}]", table


def to_toml(config: Config) -> str:
    """The configuration with every field spelt out, as `load` reads it."""
    lines = []
    for begin, values in _tables(config):
        lines += ["", begin] if lines else [begin]
        lines += [f"{k} = {_literal(v)}" for k, v in values.items() if v is not None]
    return "\n".join(lines) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """What would make another run of it, a line each; how often it is saved does not, nor where it
    runs.
    """
    found = []
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    for section, values in before.items():
        if isinstance(values, tuple):
            if values != after[section]:
                found.append(f"a [[{section}]] is another")
            continue
        for name, value in values.items():
            if (section, name) not in SAME_RUN:
                now = after[section][name]
                if now != value:
                    was, now = strict.describe(value), strict.describe(now)
                    found.append(f"{section}.{name} was {was}, now {now}")
    return found


def _literal(value: Any) -> str:
    """TOML writes strings, numbers and lists of them as JSON does."""
    if isinstance(value, dict):
        pairs = (f"{_literal(key)} = {_literal(number)}" for key, number in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
