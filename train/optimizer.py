"""AdamW under a warm-up and cosine schedule, with clipping: Optax, told which leaves are which."""

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pangu_jax import strict
from pangu_jax.errors import ConfigError
from train.config import OptimizerSection
from train.step import Leaves

# Names of leaves that are no matrices: shrinking them towards 0 would make no sense.
NOT_DECAYED = ("bias", "norm.weight", "router_scale")


def schedule(section: OptimizerSection, steps: int) -> Callable[[Any], Array]:
    """The learning rate of each step, counted from 0: it rises linearly to `learning_rate` at the
    last step of the warm-up, and falls along a cosine to `final_fraction` of it at the last of all.
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=section.learning_rate,
        warmup_steps=section.warmup_steps,
        decay_steps=max(steps, section.warmup_steps + 1),
        end_value=section.learning_rate * section.final_fraction,
    )

    def of_step(step: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            return jnp.asarray(rate(jnp.asarray(step) + 1), jnp.float32)

    return of_step


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

    The leaves of stacked layers are frozen in all of them, and called `blocks.*.attention.qkv`.
    Raises ConfigError for a pattern that matches none of `names`, or when they all match.
    """
    names, patterns = [_of_all_layers(name) for name in names], list(patterns)
    is_frozen = lambda name: any(
        fnmatch.fnmatchcase(_of_all_layers(name), pattern) for pattern in patterns
    )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"optimizer.freeze: no leaf matches {strict.shorten(pattern)}"
                f"{strict.suggest(pattern, names)} (leaves: {', '.join(names)})"
            )
    if all(map(is_frozen, names)):
        raise ConfigError("optimizer.freeze: nothing is left to train")
    return is_frozen


def _of_all_layers(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
