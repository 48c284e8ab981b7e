"""One step: pure, frozen leaves frozen, in parts or whole, in bfloat16 or not; and it learns."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.typing import DTypeLike

import pangu_jax
from pangu_jax import build
from pangu_jax.model import Pangu
from tests import layouts
from tests.train import batches
from train import optimizer as optimizers
from train import step as steps
from train.config import (
    Config,
    DataSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    Stage,
    StepSection,
)
from train.data.examples import Example
from train.objectives import Batch, Objective
from train.recipe import Recipe
from train.step import Metrics, State, Step

WEIGHTED = Objective(z_loss=0.1, balance=20.0)

# Its state is the gradients it was given, and the weights stay.
SPY = optax.GradientTransformation(
    lambda leaves: jax.tree.map(jnp.zeros_like, leaves),
    lambda grads, state, leaves: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@pytest.fixture(scope="module")
def model() -> Pangu:
    small = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}
    config = dataclasses.replace(pangu_jax.preset("nano"), **small)
    return pangu_jax.init(config, jax.random.key(0), form="stacked")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batches.packed(batches.examples([20] * 6), 40)


@pytest.fixture(scope="module")
def step(model: Pangu) -> Step:
    """Of AdamW, compiled."""
    return jax.jit(steps.make(model, optax.adamw(1e-2)))


def nothing(name: str) -> bool:
    return False


def run(
    step: Step, model: Pangu, batch: Batch, frozen: Callable[[str], bool], count: int
) -> tuple[State, State, list[float]]:
    first = state = steps.start(model, optax.adamw(1e-2), frozen)
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
    _, frozen = steps.split(quantised, nothing)
    assert set(frozen) == {"embed"}


def test_a_memorisable_batch_is_memorised(step: Step, model: Pangu, batch: Batch) -> None:
    _, state, losses = run(step, model, batch, nothing, 60)
    assert losses[0] == pytest.approx(np.log(1024), rel=0.2)
    assert losses[-1] < 0.5
    assert int(state.step) == 60
    assert int(state.skipped) == 0


def test_frozen_leaves_stay_and_have_no_optimizer_state(
    step: Step, model: Pangu, batch: Batch
) -> None:
    frozen = lambda name: name.startswith("blocks") and "norm" not in name
    first, state, losses = run(step, model, batch, frozen, 3)
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
    state = steps.start(model, optimizer, nothing)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1


def test_a_step_is_a_function(step: Step, model: Pangu, batch: Batch) -> None:
    """The same bits from the same arguments, which it leaves as they were."""
    before = [np.array(leaf) for leaf in jax.tree.leaves(model)]
    _, one, losses = run(step, model, batch, nothing, 2)
    _, two, again = run(step, model, batch, nothing, 2)
    assert losses == again
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_norm_is_that_of_all_gradients(model: Pangu, batch: Batch) -> None:
    """Against central differences along the gradient: d loss / d t = |g| for a step t g / |g|."""
    optimizer = optax.sgd(1.0)
    state = steps.start(model, optimizer, nothing)
    step = jax.jit(steps.make(model, optimizer))
    after, metrics = step(state, batch)
    gradient = {n: state.trainable[n] - after.trainable[n] for n in state.trainable}
    size = float(metrics.grad_norm)
    moved = []
    for t in (-1e-2, 1e-2):
        shifted = {n: x + t / size * gradient[n] for n, x in state.trainable.items()}
        moved.append(float(step(dataclasses.replace(state, trainable=shifted), batch)[1].loss))
    assert (moved[1] - moved[0]) / 2e-2 == pytest.approx(size, rel=0.02)
    squares = sum((np.asarray(x, np.float64) ** 2).sum() for x in after.trainable.values())
    assert float(metrics.weight_norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_the_running_mean_is_numpys(step: Step, model: Pangu, batch: Batch) -> None:
    """It begins with the weights, and is no part of what is learnt."""
    optimizer = optax.adamw(1e-2)
    state = steps.start(model, optimizer, nothing, ema=True)
    assert set(state.ema) == set(state.trainable)
    mean = {name: np.asarray(leaf, np.float64) for name, leaf in state.trainable.items()}
    averaging = jax.jit(steps.make(model, optimizer, ema=0.7))
    for _ in range(4):
        state, _ = averaging(state, batch)
        mean = {n: 0.7 * x + 0.3 * np.asarray(state.trainable[n]) for n, x in mean.items()}
    for name, leaf in mean.items():
        assert state.ema[name].dtype == jnp.float32
        np.testing.assert_allclose(state.ema[name], leaf, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(leaf - np.asarray(state.trainable[name])).max() > 1e-3
    _, without, _ = run(step, model, batch, nothing, 4)
    assert without.ema == {}
    for name, leaf in without.trainable.items():
        np.testing.assert_array_equal(leaf, state.trainable[name])


# --- parts of a batch

# No multiple of 2 or 3, and none as long as the others.
SEVERAL = (9, 4, 12, 2, 7)


@functools.cache
def moge() -> Pangu:
    like = layouts.abstract(layouts.MOGE)
    own = layouts.lively(layouts.init(layouts.MOGE))
    return build.with_weights(like, jax.device_put(own, build.places(like)))


def several() -> list[Example]:
    return batches.examples(SEVERAL, vocab=97, learnt=0.7)


@functools.cache
def in_parts(parts: int, dtype: DTypeLike = "float32") -> tuple[dict[str, Any], Metrics]:
    """Gradients and metrics of a step whose rows are an example each."""
    step = jax.jit(steps.make(moge(), SPY, WEIGHTED, dtype, parts))
    state, metrics = step(steps.start(moge(), SPY, nothing), batches.alone(several(), 12))
    return state.optimizer, metrics


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_parts_have_the_loss_of_the_whole(parts: int) -> None:
    """Cross-entropy and z-loss are means of all targets, not of the parts' means."""
    _, whole = in_parts(1)
    _, metrics = in_parts(parts)
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.z, whole.z, rtol=1e-5)
    np.testing.assert_array_equal(metrics.router.load, whole.router.load)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_balance_is_the_mean_of_the_parts(parts: int) -> None:
    """In float64 NumPy, of rows 0, n, 2n, ..., of 1, n + 1, ..."""
    rows = batches.alone(several(), 12)
    seen = pangu_jax.trace(moge(), rows.tokens)
    routed = (np.asarray(seen.router_logits), np.asarray(seen.experts))
    found = []
    for part in range(parts):
        cut = lambda x, part=part: x[part::parts]
        one = jax.tree.map(cut, rows)
        found.append(batches.of_router(*(x[:, part::parts] for x in routed), one))
    _, metrics = in_parts(parts)
    balances = [balance for balance, _, _ in found]
    np.testing.assert_allclose(metrics.balance, np.mean(balances), rtol=1e-5)
    assert max(balances) == min(balances) or parts > 1
    np.testing.assert_array_equal(metrics.router.load, sum(load for _, load, _ in found))


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_gradients_of_parts_are_those_of_a_naive_formula(parts: int) -> None:
    """Each leaf to 1e-5 of its largest number; and the norm is that of all."""
    rows = batches.alone(several(), 12)
    own, like = build.weights(moge()), layouts.abstract(layouts.MOGE)

    def naive(own: dict[str, Any]) -> Any:
        model = build.with_weights(like, own)
        return batches.naive(model, rows, WEIGHTED.z_loss, WEIGHTED.balance, parts)

    exact = jax.jit(jax.grad(naive))(own)
    grads, metrics = in_parts(parts)
    layouts.close_leaves(grads, exact)
    squares = sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in exact.values())
    assert float(metrics.grad_norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_more_parts_than_rows() -> None:
    """The others are nothing but padding. Of the last leaves no gradient is the balance's."""
    exact, whole = in_parts(1)
    grads, metrics = in_parts(len(SEVERAL) + 2)
    np.testing.assert_allclose([metrics.loss, metrics.z], [whole.loss, whole.z], rtol=1e-5)
    np.testing.assert_array_equal(metrics.router.load, whole.router.load)
    for name in ("head", "norm.weight"):
        layouts.close(grads[name], exact[name])


def test_entropy_of_parts_is_the_mean_of_all_tokens() -> None:
    _, whole = in_parts(1)
    _, metrics = in_parts(3)
    np.testing.assert_allclose(metrics.router.entropy, whole.router.entropy, rtol=1e-5)


# --- bfloat16


def test_products_are_of_bfloat16_and_masters_are_not() -> None:
    """All products of a step, forward and backward; sums of them and the state stay float32."""
    optimizer = optax.adamw(1e-3)
    state = steps.start(moge(), optimizer, nothing, ema=True)
    step = steps.make(moge(), optimizer, WEIGHTED, "bfloat16", 2, 0.9)
    program = jax.make_jaxpr(step, return_shape=True)
    jaxpr, (after, metrics) = program(state, batches.alone(several(), 12))
    kinds = [
        {str(operand.aval.dtype) for operand in equation.invars}
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert len(kinds) > 10
    assert all("bfloat16" in kind for kind in kinds), kinds
    for held in (after.trainable, after.ema, after.optimizer, metrics):
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(held)}
        assert kinds <= {"float32", "int32"}


def test_bfloat16_has_about_the_loss_and_the_gradients() -> None:
    exact, whole = in_parts(1)
    grads, metrics = in_parts(1, "bfloat16")
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=0.01)
    np.testing.assert_allclose(metrics.z, whole.z, rtol=0.01)
    assert float(metrics.loss) != float(whole.loss)
    flat = lambda leaves: np.concatenate([np.asarray(leaves[n]).ravel() for n in sorted(exact)])
    one, other = flat(exact), flat(grads)
    assert other.dtype == np.float32
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.98


def test_masters_move_by_less_than_bfloat16_shows() -> None:
    """Steps of 1e-5 add up: after 4 of them most weights are still the same bfloat16. What is
    frozen is multiplied in bfloat16, too: the loss is that of the model with all of it rounded.
    """
    optimizer, rows = optax.adam(1e-5), batches.alone(several(), 12)
    step = jax.jit(steps.make(moge(), optimizer, dtype="bfloat16"))
    first = state = steps.start(moge(), optimizer, lambda name: "mlp" in name)
    losses = []
    for _ in range(4):
        state, metrics = step(state, rows)
        losses.append(float(metrics.loss))
    for name in ("blocks.0.attention.out", "head", "norm.weight"):
        old, new = np.asarray(first.trainable[name]), np.asarray(state.trainable[name])
        assert new.dtype == np.float32
        assert np.median(np.abs(new - old)) == pytest.approx(4e-5, rel=0.1)
        assert np.mean(old.astype(jnp.bfloat16) == new.astype(jnp.bfloat16)) > 0.9
    for name, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, first.frozen[name])
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), moge())
    nats, _ = batches.of_targets(np.asarray(low(rows.tokens)), rows)
    assert losses[0] == pytest.approx(nats, rel=1e-3)


def test_a_recipe_is_what_a_configuration_says() -> None:
    """Program for program: the state and the step that its fields ask for."""
    section = OptimizerSection(name="muon", warmup_steps=2, ema=0.97, freeze=("*norm*",))
    wanted = StepSection(compute="bfloat16", remat="dots", accumulate=2, z_loss=0.3, balance=0.7)
    config = Config(
        ModelSection(path="model"),
        DataSection(path="data.jsonl"),
        RunSection(output="run", steps=9),
        wanted,
        section,
    )
    recipe, rows = Recipe(config, moge()), batches.alone(several(), 12)
    optimizer = optimizers.make(section, [Stage.whole(section, 9)])
    objective = Objective(z_loss=0.3, balance=0.7, remat="dots")
    step = steps.make(moge(), optimizer, objective, "bfloat16", 2, 0.97)
    state = jax.eval_shape(recipe.begin, moge())
    plain = jax.eval_shape(
        lambda model: steps.begin(model, optimizer, lambda name: "norm" in name, True), moge()
    )
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    programs = [jax.make_jaxpr(each)(state, rows) for each in (recipe.step(), step)]
    one, other = (re.sub(r" at 0x[0-9a-f]+", "", str(program)) for program in programs)
    assert one == other


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_a_run_ends_with(ema: float | None) -> None:
    """The running mean, where there is one, and what was frozen."""
    config = Config(
        ModelSection(path="model"),
        DataSection(path="data.jsonl"),
        RunSection(output="run", steps=1),
        optimizer=OptimizerSection(warmup_steps=0, ema=ema, freeze=("head",)),
    )
    recipe = Recipe(config, moge())
    state = recipe.start(moge())
    assert set(state.frozen) == {"head"}
    state = dataclasses.replace(state, ema={n: x + 1 for n, x in state.ema.items()})
    found, before = build.weights(recipe.model(state)), build.weights(moge())
    for name, leaf in before.items():
        more = 0 if ema is None or name == "head" else 1
        np.testing.assert_array_equal(found[name], leaf + more)


def equations(jaxpr: Any) -> Any:
    """Of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
