"""AdamW under a warm-up and cosine schedule, with clipping: Optax, told which leaves are which."""

import fnmatch
from collections.abc import Callable, Iterable

import optax

from pangu_jax import strict
from pangu_jax.errors import ConfigError
from train.config import OptimizerSection
from train.step import Leaves

# Names of leaves that are no matrices: shrinking them towards 0 would make no sense.
NOT_DECAYED = ("bias", "norm.weight", "router_scale")


def schedule(section: OptimizerSection, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0: linear from 0 to `learning_rate`, then a
    cosine that ends, at the last step, at `final_fraction` of it.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=section.learning_rate,
        warmup_steps=section.warmup_steps,
        decay_steps=max(steps, section.warmup_steps + 1),
        end_value=section.learning_rate * section.final_fraction,
    )


def make(section: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """The optimizer of leaves by name (train.step.Leaves)."""
    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        optax.adamw(
            schedule(section, steps),
            b1=section.beta1,
            b2=section.beta2,
            weight_decay=section.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(leaves: Leaves) -> dict[str, bool]:
    return {name: not name.endswith(NOT_DECAYED) for name in leaves}


def frozen(patterns: Iterable[str], names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a leaf's name matches one of the patterns, with `*` for anything.

    Raises ConfigError for a pattern that matches none of `names`.
    """
    names, patterns = list(names), list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"optimizer.freeze: no leaf matches {strict.shorten(pattern)}"
                f"{strict.suggest(pattern, names)} (leaves: {', '.join(names)})"
            )
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
