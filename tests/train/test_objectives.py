"""The objective of packed rows against unpacked examples, NumPy and naive formulas; what the
program holds, and what it computes again.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr

import pangu_jax
from pangu_jax import build
from pangu_jax.model import Form, Pangu, Remat
from tests import layouts
from tests.train import batches
from train import objectives
from train.data.examples import Example
from train.objectives import Objective

SLOW = pytest.mark.slow
LENGTHS = (5, 17, 1, 30, 9, 24, 2, 31)
WIDTH = 32
SMALL = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}

# As large as the cross-entropy, so that nothing can hide behind it.
WEIGHTED = Objective(z_loss=0.5, balance=20.0)
REMATS = get_args(Remat)


def make_model(name: str, form: Form = "stacked") -> Pangu:
    config = dataclasses.replace(pangu_jax.preset(name), **SMALL)
    return pangu_jax.init(config, jax.random.key(3), form=form)


@functools.cache
def lively(name: str) -> Pangu:
    """One of `layouts.MODELS`, with two layers, whose routers prefer some experts."""
    config = dataclasses.replace(layouts.MODELS[name], num_layers=2)
    like = layouts.abstract(config)
    own = layouts.lively(layouts.init(config))
    return build.with_weights(like, jax.device_put(own, build.places(like)))


@functools.cache
def compiled(name: str) -> Any:
    """The objective of a `lively` model, as a function of a batch."""
    return jax.jit(lambda batch: objectives.objective(lively(name), batch, WEIGHTED))


def some() -> list[Example]:
    return batches.examples((5, 12, 1, 9, 16, 2), vocab=97, learnt=0.6)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return batches.examples(LENGTHS, learnt=0.6)


# --- the cross-entropy


@pytest.mark.parametrize("form", ["stacked", pytest.param("separate", marks=SLOW)])
def test_a_packed_batch_is_its_examples(form: Form, examples: list[Example]) -> None:
    """Loss and gradients, to 1e-5 of the largest number of each leaf."""
    model = make_model("nano", form)
    rows = batches.packed(examples, 64)
    assert (rows.segments.max(axis=1) > 1).any()
    of = jax.jit(jax.value_and_grad(objectives.loss))
    packed, grads = of(model, rows)
    unpacked, expected = of(model, batches.alone(examples, WIDTH))
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_the_loss_is_numpys_cross_entropy(name: str, examples: list[Example]) -> None:
    model = make_model(name)
    rows = batches.alone(examples, WIDTH)
    logits = np.asarray(model(rows.tokens))  # causal: padding follows
    loss = jax.jit(objectives.loss)(model, batches.packed(examples, 64))
    np.testing.assert_allclose(loss, batches.of_targets(logits, rows)[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the sum of nats nor that of squares, nor their gradients."""
    model = make_model("nano")
    hidden = jax.random.normal(jax.random.key(0), (40, model.config.hidden_size))
    targets = jnp.arange(40, dtype=jnp.int32) * 7
    weights = jnp.asarray(np.random.default_rng(0).random(40), jnp.float32)

    def of(model: Pangu, hidden: jax.Array) -> Any:
        nats, squares = objectives.cross_entropy(model, hidden, targets, weights)
        return nats + 0.1 * squares, (nats, squares)

    run = lambda: jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))(model, hidden)
    monkeypatch.setattr(objectives, "CHUNK", 40)
    expected = run()
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(expected), strict=True):
        layouts.close(a, b)


def test_nothing_to_learn_is_zero_and_has_zero_gradients() -> None:
    model = lively("dense")
    batch = batches.alone(batches.examples([10], vocab=97, learnt=0), 10)
    of = jax.jit(lambda model: objectives.objective(model, batch, Objective(z_loss=1.0)))
    (value, measures), back = jax.vjp(of, model)
    assert value == measures.cross_entropy == measures.z == 0
    (grads,) = back((jnp.ones(()), jax.tree.map(jnp.zeros_like, measures)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_long_rows_go_through_attention_in_blocks() -> None:
    """A row longer than a block of queries, several examples in it, one across the border."""
    model = make_model("nano")
    several = batches.examples([70, 100, 60, 40])
    rows = batches.packed(several, 300)
    assert len(rows.tokens) == 1
    packed = jax.jit(objectives.loss)(model, rows)
    unpacked = jax.jit(objectives.loss)(model, batches.alone(several, 100))
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)


# --- the whole objective


@pytest.mark.parametrize(
    "name", ["dense", "moge", *(pytest.param(name, marks=SLOW) for name in ("pairs", "topk"))]
)
def test_the_parts_of_the_objective_are_numpys(name: str) -> None:
    """In float64, from the logits and the routing of single examples; prompts are routed, too, and
    padding counts for nothing.
    """
    model = lively(name)
    several = some()
    rows = batches.alone(several, 16)
    total, found = compiled(name)(batches.packed(several, 20))
    nats, squares = batches.of_targets(np.asarray(model(rows.tokens)), rows)
    np.testing.assert_allclose(found.cross_entropy, nats, rtol=1e-5)
    np.testing.assert_allclose(found.z, squares, rtol=1e-5)
    if name == "dense":
        assert found.balance is None
        assert found.router is None
        np.testing.assert_allclose(total, nats + 0.5 * squares, rtol=1e-5)
        return
    seen = pangu_jax.trace(model, rows.tokens)
    routed = (np.asarray(seen.router_logits), np.asarray(seen.experts))
    balance, load, entropy = batches.of_router(*routed, rows)
    np.testing.assert_array_equal(found.router.load, load)
    np.testing.assert_allclose(found.router.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(found.balance, balance, rtol=1e-5)
    np.testing.assert_allclose(total, nats + 0.5 * squares + 20 * balance, rtol=1e-5)
    assert (load.sum(1) == 45 * model.config.moge.experts_per_token).all()
    assert balance > 1.01  # the experts have not all as much to do
    assert entropy.max() < math.log(16) - 0.1


@given(st.lists(st.integers(1, 10), max_size=6), st.integers(0, 10))
@settings(max_examples=15)
def test_any_packing_has_the_objective_of_its_examples(sizes: list[int], learnt: int) -> None:
    """Also of rows that are nothing but padding, and of nothing at all."""
    model = lively("moge")
    several = batches.examples(sizes, vocab=97, learnt=learnt / 10)
    whole = [*several, *[Example(np.zeros(0, np.int32), np.zeros(0, bool))] * (6 - len(several))]
    rows = batches.alone(whole, 10)
    _, found = compiled("moge")(batches.packed(several, 20, 6))
    seen = pangu_jax.trace(model, rows.tokens)
    balance, load, entropy = batches.of_router(
        np.asarray(seen.router_logits), np.asarray(seen.experts), rows
    )
    np.testing.assert_array_equal(found.router.load, load)
    np.testing.assert_allclose(found.router.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(found.balance, balance, rtol=1e-5)
    nats, squares = batches.of_targets(np.asarray(model(rows.tokens)), rows)
    np.testing.assert_allclose([found.cross_entropy, found.z], [nats, squares], rtol=1e-5)


def test_balance_is_one_where_all_experts_have_as_much_to_do() -> None:
    """A router of zeros gives every expert as large a share; so it is whoever is chosen."""
    model = lively("moge")
    still = lambda name, leaf: jnp.zeros_like(leaf) if name.endswith("router") else leaf
    batch = batches.packed(some(), 20)
    flat = build.fill(model, still)
    _, found = jax.jit(lambda m: objectives.objective(m, batch, Objective()))(flat)
    np.testing.assert_allclose(found.balance, 1, rtol=1e-5)
    np.testing.assert_allclose(found.router.entropy, np.log(16), rtol=1e-5)
    assert set(np.asarray(found.router.load).ravel()) == {0, 45}  # the first of every group


@functools.cache
def with_gradients() -> Any:
    """Objective, parts and gradients of a MoGE as a function of its weights by name."""
    rows = batches.packed(some(), 20)
    like = layouts.abstract(lively("moge").config)
    of = lambda own: objectives.objective(build.with_weights(like, own), rows, WEIGHTED)
    return jax.jit(jax.value_and_grad(of, has_aux=True))


def test_gradients_are_those_of_a_naive_formula() -> None:
    """Of single examples with whole logits and whole probabilities, and JAX's own derivatives."""
    rows = batches.alone(some(), 16)
    own, like = build.weights(lively("moge")), layouts.abstract(lively("moge").config)
    (total, _), grads = with_gradients()(own)
    naive = lambda own: batches.naive(build.with_weights(like, own), rows, 0.5, 20.0)
    expected, exact = jax.jit(jax.value_and_grad(naive))(own)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    layouts.close_leaves(grads, exact)


@pytest.mark.parametrize("kind", ["router", "head", "embed", "norm", "attention", "down"])
def test_gradients_are_differences_of_the_objective(kind: str) -> None:
    """Central ones, along the gradient of some of the leaves: d / dt = |g| for a step t g / |g|."""
    run, own = with_gradients(), build.weights(lively("moge"))
    _, grads = run(own)
    moved = {name: grad for name, grad in grads.items() if kind in name}
    size = math.sqrt(sum(float((grad**2).sum()) for grad in moved.values()))
    at = {}
    for t in (-2e-4, 2e-4):
        shifted = {n: x + t / size * moved[n] if n in moved else x for n, x in own.items()}
        at[t] = float(run(shifted)[0][0])
    assert (at[2e-4] - at[-2e-4]) / 4e-4 == pytest.approx(size, rel=0.02)


def test_a_part_has_its_share_of_the_batch() -> None:
    """Parts that know the targets of all, and their share, add up to it."""
    rows = batches.packed(some(), 20)
    model, count = lively("moge"), jnp.asarray(rows.weights.sum())
    of = jax.jit(lambda part: objectives.objective(model, part, WEIGHTED, count, 0.5))
    _, whole = compiled("moge")(rows)
    parts = [of(jax.tree.map(lambda x, p=p: x[p : p + 1], rows)) for p in range(3)]
    for name in ("cross_entropy", "z"):
        added = sum(float(getattr(part, name)) for _, part in parts)
        np.testing.assert_allclose(added, getattr(whole, name), rtol=1e-5)
    np.testing.assert_array_equal(sum(part.router.load for _, part in parts), whole.router.load)
    for value, part in parts:
        wanted = part.cross_entropy + 0.5 * part.z + 20 * part.balance
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


# --- what a program holds, and what it computes again


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from equations(inner)


def test_no_logits_of_the_whole_batch_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward: nothing has more than CHUNK rows of the vocabulary's width."""
    monkeypatch.setattr(objectives, "CHUNK", 32)
    config = dataclasses.replace(pangu_jax.preset("nano"), **SMALL, intermediate_size=96)
    model = pangu_jax.init(config, jax.random.key(3), form="stacked")
    batch = batches.alone(batches.examples([60] * 4), 60)
    of = lambda model: objectives.objective(model, batch, Objective(z_loss=0.1))[0]
    program = jax.make_jaxpr(jax.value_and_grad(of))(model)
    made = [out.aval for equation in equations(program.jaxpr) for out in equation.outvars]
    shapes = [getattr(each, "shape", ()) for each in made]
    wide = [shape for shape in shapes if 1024 in shape[-1:] and len(shape) > 1]
    assert wide
    width = model.config.hidden_size  # the head's gradient, transposed, is as wide
    rows = {int(np.prod(shape[:-1])) for shape in wide} - {width}
    assert rows <= {30, 32}  # of 240 tokens; as columns they are padded
    assert 30 in rows


def of_remat(name: str, remat: Remat | None) -> Any:
    model, rows = lively(name), batches.packed(some(), 20)
    wanted = dataclasses.replace(WEIGHTED, remat=remat)
    return lambda own: objectives.objective(build.with_weights(model, own), rows, wanted)[0]


@pytest.mark.parametrize("name", ["dense", pytest.param("moge", marks=SLOW)])
def test_what_is_computed_again_changes_nothing(name: str) -> None:
    own = build.weights(lively(name))
    (loss, exact), (again, grads) = (
        jax.jit(jax.value_and_grad(of_remat(name, remat)))(own) for remat in REMATS
    )
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    layouts.close_leaves(grads, exact, 1e-6)


@pytest.mark.parametrize("name", ["dense", pytest.param("moge", marks=SLOW)])
def test_how_much_is_computed_again(name: str) -> None:
    """Products, in the order of `Remat`: attention's scores, all of a layer's. No choice is the
    first.
    """
    own, counts = build.weights(lively(name)), []
    for remat in (None, *REMATS):
        program = jax.make_jaxpr(jax.grad(of_remat(name, remat)))(own)
        found = [each.primitive.name for each in equations(program.jaxpr)]
        counts.append(found.count("dot_general"))
    assert counts[0] == counts[1] < counts[2]
