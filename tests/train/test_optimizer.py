"""The schedule of phases, AdamW, Muon and what they are applied to, against NumPy in float64."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable
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
from tests import layouts
from tests.train import batches
from train import optimizer
from train import step as steps
from train.config import (
    MOST_STEPS,
    Config,
    DataSection,
    ModelSection,
    OptimizerSection,
    Phase,
    RunSection,
    Stage,
)
from train.data.examples import Example

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

# Those that Muon has: matrices [out, in] in the last two axes, one for each place of the others.
MUON = {"out", "qkv", "down", "gate_up", "router"}

Arrays = dict[str, np.ndarray]
# Steps, first and last learning rate of every phase.
Phases = list[tuple[int, float, float]]


def names(preset: str) -> list[str]:
    config = dataclasses.replace(pangu_jax.preset(preset), num_layers=2)
    return [name for name, _ in build.named_leaves(build.abstract(config, form="stacked"))]


def one_phase(section: OptimizerSection, count: int) -> list[Stage]:
    return [Stage.whole(section, count)]


def staged(phases: Phases) -> list[Stage]:
    """The phases as a run has them."""
    found, begin = [], 0
    for count, first, last in phases:
        found.append(Stage(begin, begin + count, first, last, 128, 8, {}))
        begin += count
    return found


def rate_at(step: int, warm: int, phases: Phases) -> float:
    """Up a line to the first rate at the last step of the warm-up, which is in the first phase; in
    each phase half a turn of a cosine, down to the last rate at its last step.
    """
    number, own = 0, step + 1
    while own > phases[number][0] and number < len(phases) - 1:
        own -= phases[number][0]
        number += 1
    count, first, last = phases[number]
    warm = warm if number == 0 else 0
    if own <= warm:
        return first * own / warm
    done = min(1.0, (own - warm) / max(1, count - warm))
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def rate_of(step: int, section: OptimizerSection, count: int) -> float:
    high = section.learning_rate
    return rate_at(step, section.warmup_steps, [(count, high, high * section.final_fraction)])


def numpys(
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
            if section.name == "muon" and name.split(".")[-1] in MUON:
                mean[name] = 0.95 * mean[name] + 0.05 * g
                ahead = mean[name] / (1 - 0.95 ** (step + 2))  # Nesterov: a step further
                change = orthogonal(0.95 * ahead + 0.05 * g / (1 - 0.95 ** (step + 1)))
                change *= 0.2 * math.sqrt(max(leaf.shape[-2:]))
            else:
                mean[name] = section.beta1 * mean[name] + (1 - section.beta1) * g
                square[name] = section.beta2 * square[name] + (1 - section.beta2) * g**2
                m = mean[name] / (1 - section.beta1 ** (step + 1))
                v = square[name] / (1 - section.beta2 ** (step + 1))
                change = m / (np.sqrt(v) + 1e-8)
            if name.split(".")[-1] in MATRICES:
                change = change + section.weight_decay * leaf
            weights[name] = leaf - rate_of(step, section, count) * change
    return weights, norms


def orthogonal(stack: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz iterations of every matrix by itself."""
    found = np.zeros_like(stack)
    for place in np.ndindex(stack.shape[:-2]):
        x = stack[place] / (np.sqrt((stack[place] ** 2).sum()) + 1e-8)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        found[place] = x
    return found


def run(weights: Arrays, grads: list[Arrays], section: OptimizerSection, count: int) -> Arrays:
    """The weights after these gradients, which are used as train.step.make uses them."""
    transform = optimizer.make(section, one_phase(section, count))
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
    rates = optimizer.schedule(section, one_phase(section, count))(jnp.array(steps, jnp.int32))
    assert rates.dtype == jnp.float32
    expected = [rate_of(step, section, count) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=2e-5 * high)


def test_the_rate_rises_and_falls() -> None:
    section = OptimizerSection(learning_rate=2e-3, final_fraction=0.25, warmup_steps=5)
    rates = optimizer.schedule(section, one_phase(section, 40))(jnp.arange(50)).tolist()
    np.testing.assert_allclose(rates[:5], [0.4e-3, 0.8e-3, 1.2e-3, 1.6e-3, 2e-3], rtol=1e-6)
    assert rates.count(max(rates)) == 1
    assert rates[4:40] == sorted(set(rates[4:]), reverse=True)
    # Half way down at half of the time.
    assert rates[4 + 35 // 2] > 1.25e-3 > rates[5 + 35 // 2]
    np.testing.assert_allclose(rates[39:], 0.5e-3, rtol=1e-6)


@pytest.mark.parametrize("part", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warm", "count"), [(0, 10), (2, 10), (9, 10), (0, 1), (5, MOST_STEPS)])
def test_the_last_step_has_the_last_rate(warm: int, count: int, part: float) -> None:
    section = OptimizerSection(warmup_steps=warm, final_fraction=part)
    rate = optimizer.schedule(section, one_phase(section, count))
    assert float(rate(count - 1)) == pytest.approx(1e-3 * part, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 100, MOST_STEPS])
def test_a_run_that_only_warms_up_ends_with_the_highest(count: int) -> None:
    section = OptimizerSection(warmup_steps=count)
    rate = optimizer.schedule(section, one_phase(section, count))
    assert float(rate(count - 1)) == pytest.approx(1e-3, rel=1e-6)
    assert float(rate(0)) == pytest.approx(1e-3 / count, rel=0, abs=1e-9)


def test_a_step_may_be_any_whole_number() -> None:
    """Under strict promotion, as a run has it outside of its step, and inside of a jit."""
    section = OptimizerSection(warmup_steps=10)
    rate = optimizer.schedule(section, one_phase(section, 100))
    for step in (6, np.int32(6), np.int64(6), jnp.int32(6), jnp.array(6)):
        assert rate(step).dtype == jnp.float32
        assert float(rate(step)) == pytest.approx(0.7e-3, rel=1e-6)
    assert float(jax.jit(rate)(jnp.int32(6))) == pytest.approx(0.7e-3, rel=1e-6)


# --- the schedule of phases

RATES = st.floats(1e-7, 1.0)


@given(
    phases=st.lists(st.tuples(st.integers(1, 200), RATES, RATES), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_the_rate_of_every_step_of_phases(phases: Phases, data: st.DataObject) -> None:
    """They may jump, and rise; after the last step the rate stays. Only the first warms up."""
    warm = data.draw(st.integers(0, phases[0][0]))
    begins = np.cumsum([0, *(count for count, _, _ in phases)]).tolist()
    some = data.draw(st.lists(st.integers(0, begins[-1] + 3), min_size=12, max_size=12))
    at = np.array([*begins, *(max(begin - 1, 0) for begin in begins), *some][:16])
    rates = optimizer.schedule(OptimizerSection(warmup_steps=warm), staged(phases))(at)
    wanted = [rate_at(step, warm, phases) for step in at.tolist()]
    highest = max(max(first, last) for _, first, last in phases)
    np.testing.assert_allclose(rates, wanted, rtol=0, atol=1e-5 * highest)


PUBLISHED: Phases = [(9_600, 3e-4, 3e-5), (3_000, 3e-5, 1e-5), (400, 1e-5, 1e-7)]


def test_the_published_phases_fall_without_a_jump() -> None:
    """From 3e-4 to 3e-5, on to 1e-5, on to 1e-7 (arXiv 2505.21411, section 3.1): between phases the
    rate falls by no more than it does within them.
    """
    section = OptimizerSection(learning_rate=3e-4, warmup_steps=100)
    of = optimizer.schedule(section, staged(PUBLISHED))
    rates = np.asarray(of(np.arange(13_000)), np.float64)
    assert rates.argmax() == 99
    falls = -np.diff(rates[99:])
    assert (falls > -1e-11).all()
    begins = np.cumsum([steps for steps, _, _ in PUBLISHED])[:-1]
    for begin in begins:
        assert falls[begin - 100] < falls.max()
        assert falls[begin - 100] < 1e-3 * rates[begin]


@pytest.mark.parametrize("phases", [PUBLISHED, [(1, 1e-3, 1e-5), (7, 0.3, 2e-3), (2, 1e-4, 1e-4)]])
def test_the_last_step_of_a_phase_has_its_last_rate(phases: Phases) -> None:
    rate = optimizer.schedule(OptimizerSection(warmup_steps=0), staged(phases))
    end = 0
    for count, _, last in phases:
        end += count
        assert float(rate(end - 1)) == pytest.approx(last, rel=1e-6)


def test_phases_are_a_runs_stages() -> None:
    """What a phase leaves out is the optimizer's."""
    phases = (
        Phase(steps=4, last_learning_rate=1e-4),
        Phase(steps=3, learning_rate=5e-4),
        Phase(steps=1, learning_rate=1e-5, last_learning_rate=1e-6),
    )
    section = OptimizerSection(learning_rate=1e-3, final_fraction=0.5, warmup_steps=2)
    whole = Config(
        ModelSection(path="model"),
        DataSection(path="data.jsonl"),
        RunSection(output="run", steps=8),
        optimizer=section,
        phase=phases,
    )
    rates = optimizer.schedule(section, whole.stages)(np.arange(8))
    wanted = [(4, 1e-3, 1e-4), (3, 5e-4, 2.5e-4), (1, 1e-5, 1e-6)]
    np.testing.assert_allclose(rates, [rate_at(i, 2, wanted) for i in range(8)], rtol=1e-5)


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
    wanted, norms = numpys(weights, grads, section, 7)
    # Both sides of the clipping.
    assert all(norm > 1 for norm in norms) == (scale == 1.0)
    got = run(weights, grads, section, 7)
    for name in DENSE:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(got[name] - weights[name]).max() > 0.05


def test_steps_of_a_model() -> None:
    """Through train.step: every step has its own rate, and its own gradients."""
    small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = dataclasses.replace(pangu_jax.preset("nano"), intermediate_size=24, **small)
    model = pangu_jax.init(config, jax.random.key(0), dtype="float32", form="stacked")
    ids = np.random.default_rng(0).integers(3, 900, 16).astype(np.int32)
    batch = batches.alone([Example(ids, np.ones(16, bool))], 16)
    section = OptimizerSection(learning_rate=0.1, warmup_steps=2, weight_decay=0.3)
    # Its state is the gradients it was given.
    spy = optax.GradientTransformation(
        lambda leaves: jax.tree.map(jnp.zeros_like, leaves), lambda raw, state, leaves: (raw, raw)
    )
    transform = optax.chain(spy, optimizer.make(section, one_phase(section, 5)))
    state = steps.start(model, transform, lambda name: False)
    step = jax.jit(steps.make(model, transform))
    before = {name: np.asarray(leaf) for name, leaf in state.trainable.items()}
    grads, norms = [], []
    for _ in range(4):
        state, metrics = step(state, batch)
        grads.append({name: np.asarray(leaf) for name, leaf in state.optimizer[0].items()})
        norms.append(float(metrics.grad_norm))
    wanted, wanted_norms = numpys(before, grads, section, 5)
    np.testing.assert_allclose(norms, wanted_norms, rtol=1e-5)
    for name, leaf in state.trainable.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=0, atol=1e-5, err_msg=name)


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
    wanted, _ = numpys(weights, grads, section, 4)
    got = run(weights, grads, section, 4)
    for name in MOGE:
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)


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


# --- Muon

WITH_MUON = OptimizerSection(name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.3)


def shapes_of(name: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Of the leaves of one of `layouts.MODELS`."""
    config = dataclasses.replace(layouts.MODELS[name], num_layers=layers)
    return {name: leaf.shape for name, leaf in build.named_leaves(layouts.abstract(config))}


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("dense", 1.0),
        ("moge", 1.0),
        pytest.param("moge", 1e-5, marks=pytest.mark.slow),
        pytest.param("tied", 1.0, marks=pytest.mark.slow),
    ],
)
def test_muon_on_a_model(name: str, scale: float) -> None:
    """Three steps of matrices and of the rest, clipped and not, against NumPy."""
    shapes, rng = shapes_of(name), np.random.default_rng(0)
    weights, grads = draw(rng, shapes, 1.0), [draw(rng, shapes, scale) for _ in range(3)]
    section = dataclasses.replace(WITH_MUON, warmup_steps=2)
    wanted, norms = numpys(weights, grads, section, 7)
    assert all(norm > 1 for norm in norms) == (scale == 1.0)
    got = run(weights, grads, section, 7)
    for name in shapes:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def first_step() -> Callable[[Arrays], Arrays]:
    """What Muon adds to the weights of a MoGE at its first step, without decay and clipping."""
    section = dataclasses.replace(WITH_MUON, learning_rate=1.0, weight_decay=0.0, clip_norm=1e30)
    transform = optimizer.make(section, one_phase(section, 10**6))
    still = {name: jnp.zeros(shape) for name, shape in shapes_of("moge").items()}

    @jax.jit
    def of(grads: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(grads, transform.init(still), still)[0]

    return lambda grads: {name: np.asarray(leaf) for name, leaf in of(grads).items()}


def test_every_matrix_is_made_orthogonal_by_itself(
    first_step: Callable[[Arrays], Arrays],
) -> None:
    """Each head, gate and up apart, each expert: another gradient of one changes no other."""
    shapes, rng = shapes_of("moge"), np.random.default_rng(3)
    moge = layouts.MOGE.moge
    assert shapes["blocks.0.attention.qkv"] == (2, 2, 4 + 2, 4, 32)
    assert shapes["blocks.0.mlp.gate_up"] == (2, moge.num_experts, 2, moge.expert_width, 32)
    grads = draw(rng, shapes, 1.0)
    before, others = first_step(grads), draw(rng, shapes, 1.0)
    for name in shapes:
        if name.split(".")[-1] not in MUON:
            continue
        place = tuple(int(rng.integers(size)) for size in shapes[name][:-2])
        changed = {**grads, name: grads[name].copy()}
        changed[name][place] = others[name][place]
        after = first_step(changed)
        for other in shapes:
            moved = np.abs(after[other] - before[other]) > 1e-4
            places = {tuple(found[: len(place)]) for found in np.argwhere(moved).tolist()}
            assert places == ({place} if other == name else set())


@given(st.integers(-12, 12), st.integers(0, 1000))
@settings(max_examples=8)
def test_muons_updates_are_as_large_as_adams(
    first_step: Callable[[Arrays], Arrays], exponent: int, seed: int
) -> None:
    """A root mean square of 0.2, however large the gradients are: singular values are about 1."""
    shapes = shapes_of("moge")
    grads = draw(np.random.default_rng(seed), shapes, 1.0)
    updates = first_step(grads)
    again = first_step({name: grad * np.float32(2.0**exponent) for name, grad in grads.items()})
    for name in shapes:
        if name.split(".")[-1] in MUON:
            mean = np.sqrt((updates[name].astype(np.float64) ** 2).mean((-2, -1)))
            assert ((mean > 0.13) & (mean < 0.25)).all()
            np.testing.assert_allclose(again[name], updates[name], rtol=0, atol=1e-4)


def test_no_gradient_moves_no_matrix(first_step: Callable[[Arrays], Arrays]) -> None:
    """An expert that no token chose has a gradient of zeros, and no direction."""
    grads = {name: np.zeros(shape, np.float32) for name, shape in shapes_of("moge").items()}
    for leaf in first_step(grads).values():
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_layer_among_others_is_updated_as_alone(name: str) -> None:
    shapes, rng = shapes_of("moge", layers=3), np.random.default_rng(1)
    section = dataclasses.replace(WITH_MUON, name=name, clip_norm=1e9)
    weights, grads = draw(rng, shapes, 1.0), [draw(rng, shapes, 1.0) for _ in range(2)]
    together = run(weights, grads, section, 9)
    cut = lambda leaves: {n: x[1:2] for n, x in leaves.items() if n.startswith("blocks.")}
    alone = run(cut(weights), [cut(each) for each in grads], section, 9)
    for leaf, value in alone.items():
        np.testing.assert_allclose(together[leaf][1:2], value, rtol=0, atol=1e-6, err_msg=leaf)


def test_muon_has_one_moment_of_matrices_and_two_of_the_rest() -> None:
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in MIXED.items()}
    state = jax.eval_shape(optimizer.make(WITH_MUON, one_phase(WITH_MUON, 10)).init, shapes)
    held = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.size > 3)
    assert held == [(2, 3, 5), *[(2, 5)] * 2, *[(7, 5)] * 2]


MIXED = {
    "blocks.0.attention.out": (2, 3, 5),
    "blocks.0.attention.out_bias": (2, 5),
    "embed": (7, 5),
}


@pytest.mark.parametrize("kept", [["blocks.0.attention.out"], ["embed"]])
def test_muon_may_have_all_of_the_leaves_or_none(kept: list[str]) -> None:
    """The others are frozen."""
    rng = np.random.default_rng(0)
    shapes = {name: MIXED[name] for name in kept}
    weights, grads = draw(rng, shapes, 1.0), [draw(rng, shapes, 1.0) for _ in range(2)]
    got, (wanted, _) = run(weights, grads, WITH_MUON, 5), numpys(weights, grads, WITH_MUON, 5)
    for name in kept:
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5)


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
    section = OptimizerSection(warmup_steps=0)
    transform = optimizer.make(section, one_phase(section, 10))
    state = jax.eval_shape(transform.init, trainable)
    sizes = sum(leaf.size for leaf in trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * sizes
