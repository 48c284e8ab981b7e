"""One training step: a pure function of the state and a batch.

The weights are two dictionaries by leaf name, trainable and frozen, so that what gets no gradient
has no optimizer state either, and may be of a kind (integers) that has no gradient. They are the
model's own numbers: what a layout pads or repeats is made anew in every step, so that norms,
moments and checkpoints know nothing of it.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pangu_jax import build, lora
from pangu_jax.model import Pangu
from pangu_jax.pytree import pytree
from pangu_jax.quant import leaves
from train import objectives
from train.objectives import Batch, Measures, Objective, Router

Leaves = dict[str, Array]


@pytree
class State:
    """Everything that a step changes, and the frozen weights that it does not.

    skipped: batches that were left out so far
    ema: a running mean of the trainable weights; empty where none is kept
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    trainable: Leaves
    frozen: Leaves
    optimizer: optax.OptState
    ema: Leaves


@pytree
class Metrics:
    """Of one step: the cross-entropy before it and the other parts of its objective, the norm of
    its gradients before clipping, that of the weights after it.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    weight_norm: Float[Array, ""]
    z: Float[Array, ""]
    balance: Float[Array, ""] | None
    router: Router | None


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
    model: Pangu,
    optimizer: optax.GradientTransformation,
    frozen: Callable[[str], bool],
    ema: bool = False,
    adapters: Leaves | None = None,
) -> State:
    """The state before the first step, placed as every step returns it: a step compiles once."""
    state = begin(model, optimizer, frozen, ema, adapters)
    return jax.device_put(state, places(model, state))


def begin(
    model: Pangu,
    optimizer: optax.GradientTransformation,
    frozen: Callable[[str], bool],
    ema: bool = False,
    adapters: Leaves | None = None,
) -> State:
    """The state before the first step, wherever it lies.

    adapters: what is trained in place of the model's weights (lora.init)
    """
    trainable, still = split(model, frozen)
    if adapters is not None:
        trainable, still = adapters, {**trainable, **still}
    mean = jax.tree.map(jnp.copy, trainable) if ema else {}
    none = lambda: jnp.zeros((), jnp.int32)
    return State(none(), none(), trainable, still, optimizer.init(trainable), mean)


def make(
    like: Pangu,
    optimizer: optax.GradientTransformation,
    wanted: Objective = Objective(),
    dtype: DTypeLike = jnp.float32,
    parts: int = 1,
    ema: float | None = None,
    adapt: float | None = None,
) -> Step:
    """A step for `jax.jit`; its state may be donated.

    like: a model of the structure and layout that the state came from; its arrays are not used
    dtype: of the products; weights, gradients' sums and the optimizer are float32
    parts: of a batch, one after the other; each has as many rows as the others, or padding
    ema: decay of the running mean in `State.ema`, which a state begun with one has
    adapt: the scale of adapters, where they are what is trained
    """
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        found, grads = _gradients(like, state, batch, wanted, jnp.dtype(dtype), parts, adapt)
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
            trainable = cast(Leaves, optax.apply_updates(state.trainable, updates))
        mean = state.ema
        if (kept := ema) is not None:
            mean = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, mean, trainable)
        metrics = Metrics(
            found.cross_entropy,
            optax.tree.norm(grads),
            optax.tree.norm(trainable),
            found.z,
            found.balance,
            found.router,
        )
        state = State(state.step + 1, state.skipped, trainable, state.frozen, moments, mean)
        return lax.with_sharding_constraint(state, places(like, state)), metrics

    return step


def _gradients(
    like: Pangu,
    state: State,
    batch: Batch,
    wanted: Objective,
    dtype: jnp.dtype,
    parts: int,
    adapt: float | None,
) -> tuple[Measures, Leaves]:
    """What a batch's objective is made of, and its float32 gradient."""
    lower, still = (_cast(own, dtype) for own in (state.trainable, state.frozen))
    of_model = functools.partial(
        objectives.objective,
        wanted=wanted,
        count=batch.weights.sum(),
        share=1 / parts,
        tokens=jnp.maximum((batch.segments > 0).sum(), 1).astype(jnp.float32),
    )

    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradients(lower: Leaves, part: Batch) -> tuple[Array, Measures]:
        if adapt is None:
            return of_model(merge(like, lower, still), part, adapters=None)
        adapters = lora.held(like, lower, adapt)
        return of_model(merge(like, {}, still), part, adapters=adapters)

    def of_part(part: Batch) -> tuple[Measures, Leaves]:
        (_, found), grads = gradients(lower, part)
        return found, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

    if parts == 1:
        return of_part(batch)
    cut = lambda number: _cut(batch, parts, like, number)
    add = lambda sums, number: (jax.tree.map(jnp.add, sums, of_part(cut(number))), None)
    shapes = jax.eval_shape(lambda: of_part(cut(0)))
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.scan(add, blank, jnp.arange(parts))[0]


def _cast(own: Leaves, dtype: jnp.dtype) -> Leaves:
    """The weights as a step multiplies them; parts of quantised matrices stay as they are."""
    if dtype == jnp.float32:
        return own
    is_low = lambda name, leaf: leaf.dtype == jnp.float32 and not leaves.is_fixed(name)
    return {n: x.astype(dtype) if is_low(n, x) else x for n, x in own.items()}


def _cut(batch: Batch, parts: int, like: Pangu, number: Any) -> Batch:
    """Part `number` of a batch: every `parts`-th row, so that each device has its own rows in all
    parts.
    """

    def one(grid: Array) -> Array:
        rows = grid.shape[0]
        size = like.layout.round_rows(-(-rows // parts))
        grid = jnp.pad(grid, [(0, size * parts - rows), (0, 0)])
        grid = grid.reshape(size, parts, -1)
        return lax.dynamic_index_in_dim(grid, number, axis=1, keepdims=False)

    return jax.tree.map(one, batch)


def places(like: Pangu, state: State) -> Any:
    """Where everything of a state lies: moments with their weights, the rest on every device."""
    of_weights: dict = build.places(like) | lora.places(like, state.trainable)
    everywhere = NamedSharding(like.mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        # The last one: Optax's groups, of which Muon is one, are dictionaries too.
        name = next((str(key.key) for key in reversed(path) if isinstance(key, DictKey)), "")
        own = of_weights.get(name, everywhere)
        return own if leaf.ndim else everywhere

    return jax.tree_util.tree_map_with_path(place, state)
