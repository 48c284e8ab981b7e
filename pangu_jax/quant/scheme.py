"""Which matrices of a model are held in which numbers. No JAX here."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError

Numbers = Literal["int8", "int4", "fp8"]
Activations = Literal["float", "dynamic", "static"]
CacheNumbers = Literal["int8"]
RecipeName = Literal["w8a8", "w8a16", "w4a16", "fp8"]

# Of int4, the largest that divides every width (own choice; 128 is what other engines like best).
GROUPS = (128, 64, 32, 16, 8)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one matrix is held, and how it meets activations.

    numbers: int8 and fp8 (e4m3fn) with a scale per output channel; int4, two in a byte, with a
        scale per `group` inputs
    activations: "float" leaves them as they are (weight-only); "dynamic" rounds each token to the
        weight's kind of numbers with a scale of its own; "static" to int8 with a fixed scale and
        offset, as calibrated

    Raises ConfigError for a combination that does not exist.
    """

    numbers: Numbers
    activations: Activations = "float"
    group: int | None = None

    def __post_init__(self) -> None:
        for value, kind in ((self.numbers, Numbers), (self.activations, Activations)):
            if value not in get_args(kind):
                raise ConfigError(f"{value!r} is not one of {', '.join(get_args(kind))}")
        if (self.group is None) == (self.numbers == "int4"):
            raise ConfigError("int4 weights, and only they, have groups of inputs")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ConfigError(f"a group must be an even number of inputs, not {self.group}")
        if self.numbers == "int4" and self.activations != "float":
            raise ConfigError("int4 weights are for float activations")
        if self.numbers == "fp8" and self.activations == "static":
            raise ConfigError("static activations are for int8 weights")


Schemes = tuple[tuple[str, Scheme], ...]
"""The quantised leaves of a layer, such as `attention.qkv`, in order."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which leaves of every layer are quantised, and how; and the numbers of the KV cache.

    runs: (number of layers, their schemes) of consecutive equal layers; () is a float model
    cache: "int8" holds keys and values in int8. Scales are fixed per head and channel where
        `cache_scales`; else every token's key and value has one of its own.
    """

    runs: tuple[tuple[int, Schemes], ...] = ()
    cache: CacheNumbers | None = None
    cache_scales: bool = False

    def __post_init__(self) -> None:
        if self.cache not in (None, *get_args(CacheNumbers)):
            raise ConfigError(f"the KV cache can be int8, not {self.cache!r}")
        if self.cache_scales and self.cache is None:
            raise ConfigError("cache_scales are of an int8 cache")

    @classmethod
    def of_layers(cls, layers: Sequence[Schemes], cache: CacheNumbers | None = None) -> "Recipe":
        """A recipe from the schemes of each layer."""
        if not any(layers):
            return cls(cache=cache)
        runs = tuple((len(list(group)), schemes) for schemes, group in itertools.groupby(layers))
        return cls(runs, cache)

    def layers(self, count: int) -> Iterator[Schemes]:
        """The schemes of each of a model's layers. Raises ConfigError where it has not `count`."""
        own = sum(length for length, _ in self.runs)
        if self.runs and own != count:
            raise ConfigError(f"a recipe for {own} layers does not fit a model of {count}")
        for length, schemes in self.runs or ((count, ()),):
            yield from itertools.repeat(schemes, length)

    def scheme(self, leaf: str) -> Scheme | None:
        """The scheme of a leaf by its name in separate form, such as `blocks.3.attention.qkv`."""
        kind, _, rest = leaf.partition(".")
        if kind != "blocks" or not self.runs:
            return None
        index, _, name = rest.partition(".")
        at = int(index)
        for length, schemes in self.runs:
            if at < length:
                return dict(schemes).get(name)
            at -= length
        return None


FLOAT = Recipe()


def matrices(config: ModelConfig) -> dict[str, int]:
    """The leaves of a layer that may be quantised, and the numbers of inputs of their products.

    The router, norms, biases, embedding and head stay float, as in every published recipe.
    """
    D, out = config.hidden_size, config.num_heads * config.head_dim
    found = {"attention.qkv": D, "attention.out": out, "mlp.gate_up": D}
    if config.moge is None:
        assert config.intermediate_size is not None
        return {**found, "mlp.down": config.intermediate_size}
    found |= {"mlp.down": config.moge.expert_width}
    return {**found, "mlp.shared.gate_up": D, "mlp.shared.down": config.moge.shared_width}


def named(name: str, config: ModelConfig, cache: CacheNumbers | None = None) -> Recipe:
    """A recipe by its name: every matrix of every layer alike.

    w8a8: int8 weights, activations rounded per token; w8a16: int8 weights only; w4a16: int4 weights
    in groups of inputs; fp8: weights and activations, per token.
    Raises ConfigError for an unknown name, or widths that no group divides.
    """
    if name not in get_args(RecipeName):
        raise ConfigError(f"no recipe named {name!r}; known: {', '.join(get_args(RecipeName))}")
    inputs = matrices(config)
    if name == "w4a16":
        group = next((g for g in GROUPS if all(n % g == 0 for n in inputs.values())), None)
        if group is None:
            raise ConfigError(
                f"w4a16: no group of {', '.join(map(str, GROUPS))} inputs divides the widths "
                f"{', '.join(map(str, sorted(set(inputs.values()))))}"
            )
        scheme = Scheme("int4", group=group)
    else:
        scheme = {
            "w8a8": Scheme("int8", "dynamic"),
            "w8a16": Scheme("int8"),
            "fp8": Scheme("fp8", "dynamic"),
        }[name]
    layer = tuple((leaf, scheme) for leaf in inputs)
    return Recipe.of_layers([layer] * config.num_layers, cache)
