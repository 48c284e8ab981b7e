"""AdamW and Muon under the schedule of the phases, with clipping: Optax, told which leaves are
which.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from pangu_jax import strict
from pangu_jax.errors import ConfigError
from train.config import OptimizerSection, Stage
from train.step import Leaves

# Names of leaves that are no matrices: shrinking them towards 0 would make no sense.
NOT_DECAYED = ("bias", "norm.weight", "router_scale")

# Root mean square of Muon's updates before the learning rate (arXiv 2502.16982).
MUON_RMS = 0.2


def schedule(section: OptimizerSection, stages: Sequence[Stage]) -> Callable[[Any], Array]:
    """The learning rate of each step, counted from 0: it rises linearly to `learning_rate` at the
    last step of the warm-up, and in every phase falls along a cosine from its first rate to its
    last.
    """
    begins = [stage.begin for stage in stages[1:]]
    rate = optax.join_schedules([_of_stage(section, stage) for stage in stages], begins)

    def of_step(step: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            return jnp.asarray(rate(jnp.asarray(step)), jnp.float32)

    return of_step


def _of_stage(section: OptimizerSection, stage: Stage) -> Callable[[Any], Any]:
    """The rate of a phase's steps, counted from its first: the last one has its last rate."""
    rise = section.warmup_steps if stage.begin == 0 else 0
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if rise else stage.learning_rate,
        peak_value=stage.learning_rate,
        warmup_steps=rise,
        decay_steps=max(stage.end - stage.begin, rise + 1),
        end_value=stage.last_learning_rate,
    )
    return lambda step: rate(step + 1)


def make(section: OptimizerSection, stages: Sequence[Stage]) -> optax.GradientTransformation:
    """The optimizer of leaves by name (train.step.Leaves).

    Muon (the momentum of a matrix made orthogonal) has the matrices of all layers, each by itself:
    of fused leaves every head's, gate and up apart, every expert's (own choice). Its updates are
    scaled to the size of AdamW's, so that rates and decay are the same (arXiv 2502.16982, section
    2.2). The embedding, the head, norms and biases have AdamW.
    """
    direction = optax.scale_by_adam(b1=section.beta1, b2=section.beta2)
    if section.name == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_dimensions),
            optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adams, updates)),
        )
        kind = lambda leaves: {n: "muon" if _is_matrix(n) else "adam" for n in leaves}
        direction = optax.partition({"muon": muon, "adam": direction}, kind)
    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        direction,
        optax.add_decayed_weights(section.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule(section, stages)),
    )


def _decayed(leaves: Leaves) -> dict[str, bool]:
    return {name: not name.endswith(NOT_DECAYED) for name in leaves}


def _is_matrix(name: str) -> bool:
    return name.startswith("blocks.") and not name.endswith(NOT_DECAYED)


def _as_large_as_adams(update: Array) -> Array:
    """An orthogonal matrix has a root mean square of 1 / sqrt(its longer side)."""
    return update * (MUON_RMS * max(update.shape[-2:]) ** 0.5)


def _dimensions(leaves: Any) -> Any:
    """The last two axes of a leaf are a matrix [out, in]; there is one for every place of the
    others.
    """
    hidden = lambda leaf: isinstance(leaf, optax.MaskedNode)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return {name: leaf if hidden(leaf) else numbers for name, leaf in leaves.items()}


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
