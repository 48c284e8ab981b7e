"""One step: pure, frozen leaves frozen, and it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pangu_jax
from pangu_jax import build
from pangu_jax.model import Pangu
from train import step as steps
from train.objectives import Batch
from train.packing import Example, pack
from train.step import State


@pytest.fixture(scope="module")
def model() -> Pangu:
    small = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}
    config = dataclasses.replace(pangu_jax.preset("nano"), **small)
    return pangu_jax.init(config, jax.random.key(0), form="stacked")


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(3, 900, 20).astype(np.int32), np.ones(20, bool)) for _ in range(6)
    ]
    return pack(examples, 40).batch(np.arange(3))


def run(model: Pangu, batch: Batch, frozen, count: int) -> tuple[State, State, list[float]]:
    optimizer = optax.adamw(1e-2)
    step = jax.jit(steps.make(model, optimizer))
    first = state = steps.start(model, optimizer, frozen)
    losses = []
    for _ in range(count):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return first, state, losses


def test_split_and_merge_are_inverse(model: Pangu) -> None:
    trainable, frozen = steps.split(model, lambda name: "mlp" in name)
    assert set(trainable) | set(frozen) == {name for name, _ in build.named_leaves(model)}
    assert not set(trainable) & set(frozen)
    assert frozen
    assert all("mlp" in name for name in frozen)
    again = steps.merge(model, trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))


def test_integers_are_frozen(model: Pangu) -> None:
    whole = jax.tree.map(lambda leaf: leaf, model)
    quantised = build.fill(
        whole, lambda name, leaf: leaf.astype(jnp.int8) if name == "embed" else leaf
    )
    _, frozen = steps.split(quantised, lambda name: False)
    assert set(frozen) == {"embed"}


def test_a_memorisable_batch_is_memorised(model: Pangu, batch: Batch) -> None:
    _, state, losses = run(model, batch, lambda name: False, 60)
    assert losses[0] == pytest.approx(np.log(1024), rel=0.2)
    assert losses[-1] < 0.5
    assert int(state.step) == 60


def test_frozen_leaves_stay_and_have_no_optimizer_state(model: Pangu, batch: Batch) -> None:
    frozen = lambda name: name.startswith("blocks") and "norm" not in name
    first, state, losses = run(model, batch, frozen, 3)
    assert state.frozen
    for name, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, first.frozen[name])
    assert all(
        (np.asarray(leaf) != np.asarray(first.trainable[name])).any()
        for name, leaf in state.trainable.items()
    )
    sizes = sum(leaf.size for leaf in state.trainable.values())
    held = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert held == 2 * sizes  # AdamW's two moments
    assert losses[-1] < losses[0]


def test_a_step_compiles_once(model: Pangu, batch: Batch) -> None:
    optimizer = optax.adamw(1e-3)
    step = jax.jit(steps.make(model, optimizer))
    state = steps.start(model, optimizer, lambda name: False)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1


def test_a_step_is_a_function(model: Pangu, batch: Batch) -> None:
    """The same bits from the same arguments, which it leaves as they were."""
    before = [np.array(leaf) for leaf in jax.tree.leaves(model)]
    _, one, losses = run(model, batch, lambda name: False, 2)
    _, two, again = run(model, batch, lambda name: False, 2)
    assert losses == again
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_norm_is_that_of_all_gradients(model: Pangu, batch: Batch) -> None:
    """Against central differences along the gradient: d loss / d t = |g| for a step t g / |g|."""
    optimizer = optax.sgd(1.0)
    state = steps.start(model, optimizer, lambda name: False)
    step = jax.jit(steps.make(model, optimizer))
    after, metrics = step(state, batch)
    gradient = {n: state.trainable[n] - after.trainable[n] for n in state.trainable}
    size = float(metrics.grad_norm)
    moved = []
    for t in (-1e-2, 1e-2):
        shifted = {n: x + t / size * gradient[n] for n, x in state.trainable.items()}
        moved.append(float(step(dataclasses.replace(state, trainable=shifted), batch)[1].loss))
    assert (moved[1] - moved[0]) / 2e-2 == pytest.approx(size, rel=0.02)
