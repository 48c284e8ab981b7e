"""The loss of packed rows against unpacked examples and a NumPy cross-entropy; what it holds."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import pangu_jax
from pangu_jax.model import Form, Pangu
from tests import layouts
from train import objectives
from train.objectives import Batch
from train.packing import Example, pack

LENGTHS = (5, 17, 1, 30, 9, 24, 2, 31)
WIDTH = 32
KINDS = [("nano", "stacked"), ("nano", "separate"), ("nano-moge", "stacked")]
SMALL = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def make_model(name: str, form: Form) -> Pangu:
    config = dataclasses.replace(pangu_jax.preset(name), **SMALL)
    return pangu_jax.init(config, jax.random.key(3), form=form)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(5)
    return [
        Example(rng.integers(3, 1000, n).astype(np.int32), rng.random(n) < 0.6) for n in LENGTHS
    ]


def alone(examples: list[Example], width: int = WIDTH) -> Batch:
    """Every example in a row of its own, without anything of train.packing."""

    def rows(values: Callable[[Example], Sequence], dtype: type) -> np.ndarray:
        cells = [[*values(e), *[0] * (width - e.ids.size)] for e in examples]
        return np.array(cells, dtype)

    return Batch(
        tokens=rows(lambda e: e.ids, np.int32),
        targets=rows(lambda e: [*e.ids[1:], 0], np.int32),
        segments=rows(lambda e: [1] * e.ids.size, np.int32),
        positions=rows(lambda e: range(e.ids.size), np.int32),
        weights=rows(lambda e: [*e.learn[1:], False], np.float32),
    )


@pytest.mark.parametrize(("name", "form"), KINDS)
def test_a_packed_batch_is_its_examples(name: str, form: Form, examples: list[Example]) -> None:
    """Loss and gradients, to 1e-5 of the largest number of each leaf."""
    model = make_model(name, form)
    rows = pack(examples, 64)
    assert (rows.segments.max(axis=1) > 1).any()
    of = jax.jit(jax.value_and_grad(objectives.loss))
    packed, grads = of(model, rows.batch(np.arange(len(rows))))
    unpacked, expected = of(model, alone(examples))
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_the_loss_is_numpys_cross_entropy(name: str, examples: list[Example]) -> None:
    model = make_model(name, "stacked")
    nats, count = 0.0, 0
    logits = np.asarray(model(alone(examples).tokens), np.float64)  # causal: padding follows
    for example, z in zip(examples, logits, strict=True):
        for t in range(example.ids.size - 1):
            if example.learn[t + 1]:
                p = np.exp(z[t] - z[t].max())
                nats -= np.log(p[example.ids[t + 1]] / p.sum())
                count += 1
    rows = pack(examples, 64)
    loss = jax.jit(objectives.loss)(model, rows.batch(np.arange(len(rows))))
    np.testing.assert_allclose(loss, nats / count, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_nothing(
    chunk: int, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("nano", "stacked")
    hidden = jax.random.normal(jax.random.key(0), (40, model.config.hidden_size))
    targets = jnp.arange(40, dtype=jnp.int32) * 7
    weights = jnp.asarray(np.random.default_rng(0).random(40), jnp.float32)
    of = lambda *args: jax.jit(jax.value_and_grad(objectives.cross_entropy, argnums=(0, 1)))(*args)
    monkeypatch.setattr(objectives, "CHUNK", 40)
    expected = of(model, hidden, targets, weights)
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    found = of(model, hidden, targets, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        layouts.close(a, b)


def shapes(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """Of everything computed in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            yield getattr(out.aval, "shape", ())
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from shapes(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from shapes(inner)


def test_no_logits_of_the_whole_batch_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward: nothing has more than CHUNK rows of the vocabulary's width."""
    monkeypatch.setattr(objectives, "CHUNK", 32)
    config = dataclasses.replace(pangu_jax.preset("nano"), **SMALL, intermediate_size=96)
    model = pangu_jax.init(config, jax.random.key(3), form="stacked")
    batch = alone([Example(np.arange(3, 63, dtype=np.int32), np.ones(60, bool))] * 4, 60)
    program = jax.make_jaxpr(jax.value_and_grad(objectives.loss))(model, batch)
    wide = [shape for shape in shapes(program.jaxpr) if 1024 in shape[-1:] and len(shape) > 1]
    assert wide
    width = model.config.hidden_size  # the head's gradient, transposed, is as wide
    rows = {int(np.prod(shape[:-1])) for shape in wide} - {width}
    assert rows <= {30, 32}  # of 240 tokens; as columns they are padded
    assert 30 in rows


def test_nothing_to_learn_is_zero_and_has_zero_gradients() -> None:
    model = make_model("nano", "stacked")
    batch = dataclasses.replace(
        alone([Example(np.arange(3, 13, dtype=np.int32), np.ones(10, bool))]),
        weights=np.zeros((1, WIDTH), np.float32),
    )
    value, grads = jax.jit(jax.value_and_grad(objectives.loss))(model, batch)
    assert value == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_long_rows_go_through_attention_in_blocks() -> None:
    """A row longer than a block of queries, several examples in it, one across the border."""
    model = make_model("nano", "stacked")
    rng = np.random.default_rng(1)
    several = [
        Example(rng.integers(3, 1000, n).astype(np.int32), np.ones(n, bool))
        for n in (70, 100, 60, 40)
    ]
    rows = pack(several, 300)
    assert len(rows) == 1
    packed = jax.jit(objectives.loss)(model, rows.batch(np.array([0])))
    unpacked = jax.jit(objectives.loss)(model, alone(several, 100))
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
