"""The schedule, AdamW and what it is applied to, against NumPy in float64."""

import dataclasses
import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pangu_jax
from pangu_jax import build
from pangu_jax.errors import ConfigError
from train import optimizer
from train import step as steps
from train.config import MOST_STEPS, OptimizerSection
from train.packing import Example, pack

DENSE = [
    "blocks.0.attention.out",
    "blocks.0.attention.out_bias",
    "blocks.0.attention.qkv",
    "blocks.0.attention.qkv_bias",
    "blocks.0.attention_norm.weight",
    "blocks.0.mlp.down",
    "blocks.0.mlp.gate_up",
    "blocks.0.mlp_norm.weight",
    "embed",
    "norm.weight",
]
MOGE = [
    *DENSE,
    "blocks.0.mlp.router",
    "blocks.0.mlp.router_scale",
    "blocks.0.mlp.shared.down",
    "blocks.0.mlp.shared.gate_up",
    "head",
]
# As patterns name them: stacked layers are frozen alike.
SPELT = [name.replace("blocks.0.", "blocks.*.") for name in MOGE]
# The last words of the names of matrices, one of them or a stack.
MATRICES = {"out", "qkv", "down", "gate_up", "router", "embed", "head"}

Arrays = dict[str, np.ndarray]


def names(preset: str) -> list[str]:
    config = dataclasses.replace(pangu_jax.preset(preset), num_layers=2)
    return [name for name, _ in build.named_leaves(build.abstract(config, form="stacked"))]


def rate_at(step: int, section: OptimizerSection, count: int) -> float:
    """Up a line to the highest at the last of the warm-up, then half a turn of a cosine down to its
    part at the last of all.
    """
    warm, high = section.warmup_steps, section.learning_rate
    if step < warm:
        return high * (step + 1) / warm
    done = min(1.0, (step + 1 - warm) / max(1, count - warm))
    low = high * section.final_fraction
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def adamw(
    weights: Arrays, grads: list[Arrays], section: OptimizerSection, count: int
) -> tuple[Arrays, list[float]]:
    """The weights after the steps of `grads`, and the norms of these."""
    weights = {name: leaf.astype(np.float64) for name, leaf in weights.items()}
    mean = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    square = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    norms = []
    for step, raw in enumerate(grads):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in raw.values()))
        norms.append(norm)
        for name, leaf in weights.items():
            g = raw[name].astype(np.float64) * min(1.0, section.clip_norm / norm)
            mean[name] = section.beta1 * mean[name] + (1 - section.beta1) * g
            square[name] = section.beta2 * square[name] + (1 - section.beta2) * g**2
            m = mean[name] / (1 - section.beta1 ** (step + 1))
            v = square[name] / (1 - section.beta2 ** (step + 1))
            change = m / (np.sqrt(v) + 1e-8)
            if name.split(".")[-1] in MATRICES:
                change = change + section.weight_decay * leaf
            weights[name] = leaf - rate_at(step, section, count) * change
    return weights, norms


def run(weights: Arrays, grads: list[Arrays], section: OptimizerSection, count: int) -> Arrays:
    """The weights after these gradients, which are used as train.step.make uses them."""
    transform = optimizer.make(section, count)
    now: Any = {name: jnp.asarray(leaf) for name, leaf in weights.items()}
    state = transform.init(now)

    @jax.jit
    def update(raw: Any, state: Any, now: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            changes, state = transform.update(raw, state, now)
        return optax.apply_updates(now, changes), state

    for each in grads:
        now, state = update({n: jnp.asarray(g) for n, g in each.items()}, state, now)
    return {name: np.asarray(leaf) for name, leaf in now.items()}


def draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], scale: float) -> Arrays:
    return {n: (rng.normal(size=s) * scale).astype(np.float32) for n, s in shapes.items()}


# --- the schedule


@given(
    count=st.integers(1, 3000) | st.integers(1, MOST_STEPS),
    data=st.data(),
    high=st.floats(1e-6, 10.0),
    part=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_the_rate_of_every_step(count: int, data: st.DataObject, high: float, part: float) -> None:
    warm = data.draw(st.sampled_from([0, 1, count]) | st.integers(0, count))
    section = OptimizerSection(learning_rate=high, final_fraction=part, warmup_steps=warm)
    some = st.lists(st.integers(0, count - 1), min_size=2, max_size=2)
    steps = [0, warm, max(0, warm - 1), count - 1, *data.draw(some)]
    rates = optimizer.schedule(section, count)(jnp.array(steps, jnp.int32))
    assert rates.dtype == jnp.float32
    expected = [rate_at(step, section, count) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=2e-5 * high)


def test_the_rate_rises_and_falls() -> None:
    section = OptimizerSection(learning_rate=2e-3, final_fraction=0.25, warmup_steps=5)
    rates = optimizer.schedule(section, 40)(jnp.arange(50)).tolist()
    np.testing.assert_allclose(rates[:5], [0.4e-3, 0.8e-3, 1.2e-3, 1.6e-3, 2e-3], rtol=1e-6)
    assert rates.count(max(rates)) == 1
    assert rates[4:40] == sorted(set(rates[4:]), reverse=True)
    # Half way down at half of the time.
    assert rates[4 + 35 // 2] > 1.25e-3 > rates[5 + 35 // 2]
    np.testing.assert_allclose(rates[39:], 0.5e-3, rtol=1e-6)


@pytest.mark.parametrize("part", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warm", "count"), [(0, 10), (2, 10), (9, 10), (0, 1), (5, MOST_STEPS)])
def test_the_last_step_has_the_last_rate(warm: int, count: int, part: float) -> None:
    rate = optimizer.schedule(OptimizerSection(warmup_steps=warm, final_fraction=part), count)
    assert float(rate(count - 1)) == pytest.approx(1e-3 * part, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 100, MOST_STEPS])
def test_a_run_that_only_warms_up_ends_with_the_highest(count: int) -> None:
    rate = optimizer.schedule(OptimizerSection(warmup_steps=count), count)
    assert float(rate(count - 1)) == pytest.approx(1e-3, rel=1e-6)
    assert float(rate(0)) == pytest.approx(1e-3 / count, rel=0, abs=1e-9)


def test_a_step_may_be_any_whole_number() -> None:
    """Under strict promotion, as a run has it outside of its step, and inside of a jit."""
    rate = optimizer.schedule(OptimizerSection(warmup_steps=10), 100)
    for step in (6, np.int32(6), np.int64(6), jnp.int32(6), jnp.array(6)):
        assert rate(step).dtype == jnp.float32
        assert float(rate(step)) == pytest.approx(0.7e-3, rel=1e-6)
    assert float(jax.jit(rate)(jnp.int32(6))) == pytest.approx(0.7e-3, rel=1e-6)


# --- AdamW


def test_the_names_are_those_of_the_models() -> None:
    assert names("nano") == DENSE
    assert sorted(names("nano-moge")) == sorted(MOGE)


@pytest.mark.parametrize(("count", "warm", "scale"), [(1, 0, 1.0), (3, 0, 1e-4), (3, 2, 1.0)])
def test_adamw_on_a_model(count: int, warm: int, scale: float) -> None:
    config = dataclasses.replace(pangu_jax.preset("nano"), num_layers=2, hidden_size=64)
    model = build.abstract(config, form="stacked")
    shapes = {name: leaf.shape for name, leaf in build.named_leaves(model)}
    assert list(shapes) == DENSE
    rng = np.random.default_rng(count)
    weights = draw(rng, shapes, 1.0)
    grads = [draw(rng, shapes, scale) for _ in range(count)]
    section = OptimizerSection(learning_rate=0.1, warmup_steps=warm, weight_decay=0.3)
    expected, norms = adamw(weights, grads, section, 7)
    # Both sides of the clipping.
    assert all(norm > 1 for norm in norms) == (scale == 1.0)
    got = run(weights, grads, section, 7)
    for name in DENSE:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(got[name] - weights[name]).max() > 0.05


def test_steps_of_a_model() -> None:
    """Through train.step: every step has its own rate, and its own gradients."""
    small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = dataclasses.replace(pangu_jax.preset("nano"), intermediate_size=24, **small)
    model = pangu_jax.init(config, jax.random.key(0), dtype="float32", form="stacked")
    ids = np.random.default_rng(0).integers(3, 900, 16).astype(np.int32)
    batch = pack([Example(ids, np.ones(16, bool))], 16).batch(np.arange(1))
    section = OptimizerSection(learning_rate=0.1, warmup_steps=2, weight_decay=0.3)
    # Its state is the gradients it was given.
    spy = optax.GradientTransformation(
        lambda leaves: jax.tree.map(jnp.zeros_like, leaves), lambda raw, state, leaves: (raw, raw)
    )
    transform = optax.chain(spy, optimizer.make(section, 5))
    state = steps.start(model, transform, lambda name: False)
    step = jax.jit(steps.make(model, transform))
    before = {name: np.asarray(leaf) for name, leaf in state.trainable.items()}
    grads, norms = [], []
    for _ in range(4):
        state, metrics = step(state, batch)
        grads.append({name: np.asarray(leaf) for name, leaf in state.optimizer[0].items()})
        norms.append(float(metrics.grad_norm))
    expected, expected_norms = adamw(before, grads, section, 5)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    for name, leaf in state.trainable.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("beta1", "beta2", "decay", "clip", "scale"),
    [
        (0.0, 0.0, 0.0, 1.0, 1.0),
        (0.5, 0.9, 0.5, 1e-3, 0.2),
        (0.9, 0.999, 0.01, 1e6, 1e3),
        (0.99, 0.95, 0.0, 5.0, 1e-3),
        (0.9, 0.95, 0.1, 5.0, 1.0),
    ],
)
def test_adamw_with_other_settings(
    beta1: float, beta2: float, decay: float, clip: float, scale: float
) -> None:
    rng = np.random.default_rng(0)
    shapes = {name: (2, 3) for name in MOGE}
    weights, grads = draw(rng, shapes, 1.0), [draw(rng, shapes, scale) for _ in range(3)]
    section = OptimizerSection(
        learning_rate=0.03,
        warmup_steps=1,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        clip_norm=clip,
    )
    expected, _ = adamw(weights, grads, section, 4)
    got = run(weights, grads, section, 4)
    for name in MOGE:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_only_matrices_decay() -> None:
    weights = {name: np.ones((2, 3), np.float32) for name in MOGE}
    still = [{name: np.zeros((2, 3), np.float32) for name in MOGE}]
    section = OptimizerSection(learning_rate=0.5, warmup_steps=1, weight_decay=0.25)
    got = run(weights, still, section, 10)
    decayed = {name for name, leaf in got.items() if (leaf != 1).any()}
    assert decayed == {
        "blocks.0.attention.out",
        "blocks.0.attention.qkv",
        "blocks.0.mlp.down",
        "blocks.0.mlp.gate_up",
        "blocks.0.mlp.router",
        "blocks.0.mlp.shared.down",
        "blocks.0.mlp.shared.gate_up",
        "embed",
        "head",
    }
    for name in decayed:
        np.testing.assert_allclose(got[name], 1 - 0.5 * 0.25, rtol=1e-6)


def test_clipping_is_of_all_leaves_together() -> None:
    """Adam's first step knows only signs; after a second one, sizes matter."""
    weights = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    grads = [
        {"a": np.array([3.0, 0.0], np.float32), "b": np.array([0.0, 4.0], np.float32)},
        {"a": np.array([0.1, 0.0], np.float32), "b": np.array([0.0, 0.1], np.float32)},
    ]
    section = OptimizerSection(learning_rate=0.1, warmup_steps=0, clip_norm=1.0)
    scaled = [{"a": grads[0]["a"] / 5, "b": grads[0]["b"] / 5}, grads[1]]
    wide = dataclasses.replace(section, clip_norm=1e9)
    a, b = run(weights, grads, section, 10), run(weights, scaled, wide, 10)
    for name in weights:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6)


# --- what is frozen


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["embed"], {"embed"}),
        (["blocks.*.router"], {"blocks.0.mlp.router"}),
        (["blocks.*.router*"], {"blocks.0.mlp.router", "blocks.0.mlp.router_scale"}),
        (["*bias"], {"blocks.0.attention.out_bias", "blocks.0.attention.qkv_bias"}),
        (["norm.weight", "head"], {"norm.weight", "head"}),
        (["*norm.weight"], {n for n in MOGE if n.endswith("norm.weight")}),
        (["blocks.*"], {n for n in MOGE if n.startswith("blocks.")}),
        (["blocks.?.mlp.shared.[dg]*", "embed"], {*MOGE[-3:-1], "embed"}),
        (["embed", "embed", "em*"], {"embed"}),
    ],
)
def test_patterns(patterns: list[str], expected: set[str]) -> None:
    is_frozen = optimizer.frozen(iter(patterns), iter(MOGE))
    assert {name for name in MOGE if is_frozen(name)} == expected


@pytest.mark.parametrize(
    ("patterns", "complaint"),
    [
        (["embde"], "'embde'; did you mean embed?"),
        (["blocks.0.mlp.router_scales"], "did you mean blocks.*.mlp.router_scale?"),
        (["embed", "blocks.1.*"], "'blocks.1.*'"),
        (["blocks.*.Router"], "'blocks.*.Router'"),
        (["weight"], "'weight'"),
        ([""], "''"),
        (["a\nb"], "'a\\x0ab'"),
        (["x" * 500], "xxx...'"),
    ],
)
def test_a_pattern_that_matches_nothing(patterns: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer.frozen(patterns, MOGE)
    message = str(caught.value)
    assert message.startswith("optimizer.freeze: no leaf matches ")
    assert complaint in message
    assert "blocks.*.mlp.router_scale" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("patterns", [["*"], SPELT, ["blocks.*", "*norm*", "embed", "head"]])
def test_something_is_left_to_train(patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.freeze: nothing is left to train$"):
        optimizer.frozen(patterns, MOGE)


def test_one_leaf_is_something() -> None:
    is_frozen = optimizer.frozen(SPELT[1:], MOGE)
    assert [name for name in MOGE if not is_frozen(name)] == MOGE[:1]


def test_what_is_frozen_has_no_state() -> None:
    config = dataclasses.replace(
        pangu_jax.preset("nano"), num_layers=2, hidden_size=16, intermediate_size=24
    )
    empty = build.abstract(config, form="stacked")
    model = build.fill(empty, lambda name, leaf: jnp.zeros(leaf.shape, leaf.dtype))
    is_frozen = optimizer.frozen(["blocks.*.qkv*", "embed"], DENSE)
    trainable, frozen = steps.split(model, is_frozen)
    assert set(frozen) == {"blocks.0.attention.qkv", "blocks.0.attention.qkv_bias", "embed"}
    assert set(frozen) == {n for n in DENSE if fnmatch.fnmatch(n, "*.qkv*") or n == "embed"}
    transform = optimizer.make(OptimizerSection(warmup_steps=0), 10)
    state = jax.eval_shape(transform.init, trainable)
    sizes = sum(leaf.size for leaf in trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * sizes
