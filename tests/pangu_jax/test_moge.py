"""Grouped routing and the expert products against loops written here."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

import pangu_jax
from pangu_jax import moge

# N tokens, G groups, experts per group: few shapes, because each one compiles; many seeds.
SHAPES = [(1, 1, 1), (1, 4, 2), (5, 3, 4), (9, 5, 1), (8, 2, 3)]
cases = st.tuples(st.sampled_from(SHAPES), st.integers(0, 999)).map(lambda c: (*c[0], c[1]))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(cases)
def test_one_expert_of_every_group(case: tuple[int, int, int, int]) -> None:
    N, G, size, seed = case
    logits = np.random.default_rng(seed).normal(0, 3, (N, G * size)).astype(np.float32)
    routing = moge.route(jnp.asarray(logits), G)
    experts, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    assert (experts // size == np.arange(G)).all()  # one per group, ascending
    p = softmax(logits)
    for n, g in np.ndindex(N, G):
        group = p[n, g * size : (g + 1) * size]
        assert experts[n, g] == g * size + int(np.argmax(group))
        np.testing.assert_allclose(weights[n, g], group.max(), rtol=1e-5)
    assert (weights.sum(-1) <= 1 + 1e-5).all()  # a share of all experts, not renormalised


def test_of_equal_experts_the_first_is_taken() -> None:
    routing = moge.route(jnp.zeros((3, 12)), 4)
    np.testing.assert_array_equal(routing.experts, np.tile([0, 3, 6, 9], (3, 1)))


def test_permuting_tokens_permutes_the_routing() -> None:
    logits = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    order = np.random.default_rng(1).permutation(10)
    whole, moved = moge.route(jnp.asarray(logits), 4), moge.route(jnp.asarray(logits[order]), 4)
    np.testing.assert_array_equal(whole.experts[order], moved.experts)
    np.testing.assert_allclose(whole.weights[order], moved.weights, rtol=1e-6)


def test_bf16_logits_go_through_a_float32_softmax() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 64)), jnp.bfloat16)
    weights = moge.route(logits, 8).weights
    assert weights.dtype == jnp.float32
    best = softmax(np.asarray(logits, np.float32)).reshape(4, 8, 8).max(-1)
    np.testing.assert_allclose(weights, best, rtol=1e-5)


def naive_mix(x, experts, weights, gate_up, down):
    out = np.zeros(x.shape)
    for n, g in np.ndindex(*experts.shape):
        e = experts[n, g]
        gate, up = gate_up[e, 0] @ x[n], gate_up[e, 1] @ x[n]
        out[n] += weights[n, g] * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def random_case(N: int, G: int, size: int, seed: int, skew: bool):
    rng = np.random.default_rng(seed)
    D, F, E = 6, 5, G * size
    x = rng.normal(size=(N, D))
    inside = np.zeros((N, G), int) if skew else rng.integers(0, size, (N, G))
    experts = inside + np.arange(G) * size
    weights = rng.uniform(size=(N, G))
    gate_up, down = rng.normal(size=(E, 2, F, D)), rng.normal(size=(E, D, F))
    return x, experts, weights, gate_up, down


@settings(deadline=None, max_examples=25)
@given(cases, st.booleans())
def test_mix_equals_loops(case: tuple[int, int, int, int], skew: bool) -> None:
    arrays = random_case(*case, skew)
    on_device = [jnp.asarray(a, jnp.int32 if a.dtype == int else jnp.float32) for a in arrays]
    got = jax.jit(moge.mix_experts)(*on_device)
    np.testing.assert_allclose(got, naive_mix(*arrays), atol=2e-4)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("N", [1, 70, 700])
def test_every_block_size_up_to_all_tokens_on_one_expert(N: int, skew: bool) -> None:
    x, experts, weights, gate_up, down = random_case(N, 3, 4, 7, skew)
    got = moge.mix_experts(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(gate_up, jnp.float32),
        jnp.asarray(down, jnp.float32),
    )
    np.testing.assert_allclose(got, naive_mix(x, experts, weights, gate_up, down), atol=5e-4)


def products(jaxpr: Jaxpr) -> Iterator[Any]:
    """The precisions of all products in a program and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from products(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from products(inner)


def test_a_float32_models_gradient_is_full_precision_everywhere() -> None:
    """Its backward pass is traced when the forward's request for precision is over."""
    config = dataclasses.replace(pangu_jax.preset("nano-moge"), num_layers=1)
    model = pangu_jax.init(config, jax.random.key(0), form="stacked")
    tokens = np.ones((1, 8), np.int32)
    program = jax.make_jaxpr(jax.grad(lambda m: m(tokens).sum(), allow_int=True))(model)
    found = [*products(program.jaxpr)]
    assert len(found) > 10
    assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}


def test_gradients_equal_those_of_a_dense_product() -> None:
    x, experts, weights, gate_up, down = random_case(9, 2, 3, 5, False)
    args = [jnp.asarray(a, jnp.float32) for a in (x, weights, gate_up, down)]
    picks = jnp.asarray(experts, jnp.int32)

    def dense(x, weights, gate_up, down):
        combine = (jax.nn.one_hot(picks, 6) * weights[:, :, None]).sum(1)
        y = jnp.einsum("nd,epfd->nepf", x, gate_up)
        return jnp.einsum("nef,edf,ne->nd", jax.nn.silu(y[:, :, 0]) * y[:, :, 1], down, combine)

    chosen = lambda x, weights, gate_up, down: moge.mix_experts(x, picks, weights, gate_up, down)
    loss = lambda mix: lambda *a: jnp.sum(jnp.sin(mix(*a)))
    got = jax.grad(loss(chosen), (0, 1, 2, 3))(*args)
    expected = jax.grad(loss(dense), (0, 1, 2, 3))(*args)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("pairs", "experts"), [(8, 64), (64, 64), (65, 64), (4096, 64), (10**6, 64)]
)
def test_blocks_are_at_most_twice_as_many_as_experts_until_they_are_full(pairs, experts) -> None:
    size = moge._block_size(pairs, experts)
    blocks = (pairs + experts * (size - 1)) // size
    assert size == 256 or blocks <= 2 * experts
