"""One training step: a pure function of the state and a batch.

The weights are two dictionaries by leaf name, trainable and frozen, so that what gets no gradient
has no optimizer state either, and may be of a kind (integers) that has no gradient. They are the
model's own numbers: what a layout pads or repeats is made anew in every step, so that norms,
moments and checkpoints know nothing of it.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jaxtyping import Array, Float, Int

from pangu_jax import build
from pangu_jax.model import Pangu
from pangu_jax.pytree import pytree
from pangu_jax.quant import leaves
from train import objectives
from train.objectives import Batch

Leaves = dict[str, Array]


@pytree
class State:
    """Everything that a step changes, and the frozen weights that it does not."""

    step: Int[Array, ""]
    trainable: Leaves
    frozen: Leaves
    optimizer: optax.OptState


@pytree
class Metrics:
    """Of one step: the loss before it, the norm of its gradients before clipping."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


Step = Callable[[State, Batch], tuple[State, Metrics]]


def split(model: Pangu, frozen: Callable[[str], bool]) -> tuple[Leaves, Leaves]:
    """The weights that are trained and the others, by leaf name. Integers and parts of quantised
    matrices are never trained.
    """
    found = build.weights(model)
    still = {
        name
        for name, leaf in found.items()
        if frozen(name) or leaves.is_fixed(name) or not jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return {n: x for n, x in found.items() if n not in still}, {n: found[n] for n in still}


def merge(like: Pangu, trainable: Leaves, frozen: Leaves) -> Pangu:
    """The model that the two halves of `split` came from; `like` gives its structure only."""
    return build.with_weights(like, {**trainable, **frozen})


def start(
    model: Pangu, optimizer: optax.GradientTransformation, frozen: Callable[[str], bool]
) -> State:
    """The state before the first step, placed as every step returns it: a step compiles once."""
    state = begin(model, optimizer, frozen)
    return jax.device_put(state, places(model, state))


def begin(
    model: Pangu, optimizer: optax.GradientTransformation, frozen: Callable[[str], bool]
) -> State:
    """The state before the first step, wherever it lies."""
    trainable, still = split(model, frozen)
    return State(jnp.zeros((), jnp.int32), trainable, still, optimizer.init(trainable))


def make(like: Pangu, optimizer: optax.GradientTransformation) -> Step:
    """The step for models of `like`'s structure and layout; not jitted."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss(trainable: Leaves) -> Array:
            return objectives.loss(merge(like, trainable, state.frozen), batch)

        value, grads = jax.value_and_grad(loss)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = cast(Leaves, optax.apply_updates(state.trainable, updates))
        metrics = Metrics(value, optax.tree.norm(grads))
        state = State(state.step + 1, trainable, state.frozen, moments)
        return lax.with_sharding_constraint(state, places(like, state)), metrics

    return step


def places(like: Pangu, state: State) -> Any:
    """Where everything of a state lies: moments with their weights, the rest on every device."""
    of_weights, everywhere = build.places(like), NamedSharding(like.mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = next((str(key.key) for key in path if isinstance(key, DictKey)), "")
        own = of_weights.get(name, everywhere)
        return own if leaf.ndim else everywhere

    return jax.tree_util.tree_map_with_path(place, state)
