"""Routing, votes, balance and the expert products against loops written here."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from pangu_jax import moge
from pangu_jax.kernels.experts import blocks
from pangu_jax.moge import Experts
from tests import layouts

# N tokens, G groups, experts per group: few shapes, because each one compiles; many seeds.
SHAPES = [(1, 1, 1), (1, 4, 2), (5, 3, 4), (9, 5, 1), (8, 2, 3)]
cases = st.tuples(st.sampled_from(SHAPES), st.integers(0, 999)).map(lambda c: (*c[0], c[1]))


route = jax.jit(moge.route, static_argnames=("num_groups", "per_group"))
route_topk = jax.jit(moge.route_topk, static_argnames="count")
vote = jax.jit(moge.vote, static_argnames=("num_groups", "per_group", "voted"))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(cases)
def test_one_expert_of_every_group(case: tuple[int, int, int, int]) -> None:
    N, G, size, seed = case
    logits = np.random.default_rng(seed).normal(0, 3, (N, G * size)).astype(np.float32)
    routing = route(logits, G)
    experts, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    assert (experts // size == np.arange(G)).all()  # one per group, ascending
    p = softmax(logits)
    for n, g in np.ndindex(N, G):
        group = p[n, g * size : (g + 1) * size]
        assert experts[n, g] == g * size + int(np.argmax(group))
        np.testing.assert_allclose(weights[n, g], group.max(), rtol=1e-5)
    assert (weights.sum(-1) <= 1 + 1e-5).all()  # a share of all experts, not renormalised


def test_of_equal_experts_the_first_is_taken() -> None:
    routing = route(jnp.zeros((6, 12)), 4)
    np.testing.assert_array_equal(routing.experts, np.tile([0, 3, 6, 9], (6, 1)))


def test_permuting_tokens_permutes_the_routing() -> None:
    logits = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    order = np.random.default_rng(1).permutation(10)
    whole, moved = route(logits, 4), route(logits[order], 4)
    np.testing.assert_array_equal(whole.experts[order], moved.experts)
    np.testing.assert_allclose(whole.weights[order], moved.weights, rtol=1e-6)


def test_bf16_logits_go_through_a_float32_softmax() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 64)), jnp.bfloat16)
    weights = route(logits, 8).weights
    assert weights.dtype == jnp.float32
    best = softmax(np.asarray(logits, np.float32)).reshape(4, 8, 8).max(-1)
    np.testing.assert_allclose(weights, best, rtol=1e-5)


# --- several experts of a group, the conventional router, votes


def best_first(scores: np.ndarray, count: int) -> list[int]:
    """The places of the largest scores, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def uneven_logits(seed: int, *shape: int) -> np.ndarray:
    """Half the draws are whole numbers, many of them equal."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        return rng.integers(-3, 4, shape).astype(np.float32)
    return rng.normal(0, 3, shape).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999))
def test_two_experts_of_every_group(seed: int) -> None:
    logits = uneven_logits(seed, 6, 12)
    routing, p = route(logits, 3, per_group=2), softmax(logits)
    for n in range(6):
        wanted = [4 * g + e for g in range(3) for e in best_first(logits[n, 4 * g : 4 * g + 4], 2)]
        np.testing.assert_array_equal(routing.experts[n], wanted)
        np.testing.assert_allclose(routing.weights[n], p[n, wanted], rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1, 3]))
def test_the_conventional_routers_softmax_comes_after_its_choice(seed: int, count: int) -> None:
    logits = uneven_logits(seed, 6, 10)
    routing = route_topk(logits, count)
    for n in range(6):
        wanted = best_first(logits[n], count)
        np.testing.assert_array_equal(routing.experts[n], wanted)
        np.testing.assert_allclose(routing.weights[n], softmax(logits[n, wanted]), rtol=1e-5)


def loop_vote(logits, valid, num_groups: int, per_group: int, voted: int) -> np.ndarray:
    size = logits.shape[1] // num_groups
    kept = np.zeros((num_groups, size), bool)
    for g in range(num_groups):
        votes = np.zeros(size, int)
        for n in np.flatnonzero(valid):
            votes[best_first(logits[n, g * size : (g + 1) * size], per_group)] += 1
        kept[g, best_first(votes, voted)] = True
    return kept


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 999), st.sampled_from([1, 2]), st.lists(st.booleans(), min_size=7, max_size=7)
)
def test_votes_of_real_tokens_are_counted(seed: int, per_group: int, valid: list[bool]) -> None:
    logits = uneven_logits(seed, 7, 12)
    kept = vote(logits, np.array(valid), 3, per_group, voted=2)
    np.testing.assert_array_equal(kept, loop_vote(logits, valid, 3, per_group, 2))


def test_padding_could_have_turned_the_vote() -> None:
    logits = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    kept = lambda *valid: vote(logits, np.array(valid), num_groups=1, per_group=1, voted=1)
    np.testing.assert_array_equal(kept(True, True, True), [[False, True]])
    np.testing.assert_array_equal(kept(True, False, False), [[True, False]])


@pytest.mark.parametrize("per_group", [1, 2])
def test_a_vote_for_whole_groups_is_exact_routing(per_group: int) -> None:
    logits = uneven_logits(0, 6, 12)
    kept = vote(logits, np.ones(6, bool), 3, per_group, voted=4)
    exact, other = (route(logits, 3, per_group, each) for each in (None, kept))
    np.testing.assert_array_equal(exact.experts, other.experts)
    np.testing.assert_array_equal(exact.weights, other.weights)


def test_after_a_vote_a_token_depends_on_the_others() -> None:
    """Alone it has its own expert; among others theirs, with that expert's own weight."""
    mine, theirs = [0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0]

    def first_of(*batch: list[float]) -> moge.Routing:
        logits = np.array(batch, np.float32)
        kept = vote(logits, np.ones(len(batch), bool), 2, 1, voted=1)
        return jax.tree.map(lambda part: np.asarray(part)[0], route(logits, 2, 1, kept))

    alone, among = first_of(mine), first_of(mine, theirs, theirs)
    p = softmax(np.array(mine))
    np.testing.assert_array_equal(alone.experts, [1, 2])
    np.testing.assert_array_equal(among.experts, [0, 2])
    np.testing.assert_allclose(alone.weights, p[[1, 2]], rtol=1e-5)
    np.testing.assert_allclose(among.weights, p[[0, 2]], rtol=1e-5)


# --- balance

RANKS = (1, 2, 3, 6)


@jax.jit
def scores_of(experts: jax.Array) -> list[jax.Array]:
    """24 experts, whole groups of four on any of these numbers of devices."""
    return [moge.imbalance(experts, 24, ranks) for ranks in RANKS]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_the_score_counts_pairs_of_each_device(seed: int) -> None:
    experts = np.random.default_rng(seed).integers(0, 24, (5, 6), np.int32)
    for ranks, score in zip(RANKS, scores_of(experts), strict=True):
        pairs = [0] * ranks
        for expert in experts.ravel():
            pairs[expert * ranks // 24] += 1
        assert float(score) == pytest.approx((max(pairs) - min(pairs)) / 5, rel=1e-6)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows_of_logits = st.one_of(
    st.lists(numbers, min_size=24, max_size=24),
    st.lists(st.sampled_from([0.0, -3e38, 3e38, 1e-40]), min_size=24, max_size=24),
    numbers.map(lambda number: [number] * 24),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(rows_of_logits, min_size=5, max_size=5), st.sampled_from([1, 2]))
def test_whole_groups_are_in_balance_whatever_the_logits(
    logits: list[list[float]], per_group: int
) -> None:
    routing = route(np.array(logits, np.float32), 6, per_group)
    assert scores_of(routing.experts) == [0.0] * len(RANKS)


def top_of_random_logits(rng: np.random.Generator, draws: int) -> np.ndarray:
    logits = rng.random((draws * 16, 64), np.float32)
    return np.asarray(route_topk(logits, 8).experts)


def with_repeats(rng: np.random.Generator, draws: int) -> np.ndarray:
    return rng.integers(0, 64, (draws * 16, 8), np.int32)


@pytest.mark.parametrize(
    ("draw", "mean", "percentiles"),
    [
        (top_of_random_logits, 0.668, [0.375, 0.625, 1.0]),
        (with_repeats, 0.708, [0.375, 0.6875, 1.0625]),
    ],
)
def test_the_conventional_router_is_out_of_balance(draw, mean: float, percentiles) -> None:
    """The simulation of arXiv 2505.21411: 16 tokens, 8 of 64 experts for each, 8 devices. With
    random logits the experts of a token differ; the paper's simplification lets them repeat.
    """
    experts = draw(np.random.default_rng(0), 8000).reshape(-1, 16, 8)
    scores = np.asarray(jax.jit(jax.vmap(lambda one: moge.imbalance(one, 64, 8)))(experts))
    assert abs(scores.mean() - mean) < 0.01
    np.testing.assert_array_equal(np.percentile(scores, [5, 50, 95]), percentiles)
    assert (scores > 0).mean() > 0.99


# --- the products of experts


def naive_mix(x, experts, weights, gate_up, down):
    out = np.zeros(x.shape)
    for n, g in np.ndindex(*experts.shape):
        e = experts[n, g]
        if e == len(down):  # of another rank
            continue
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


def narrow(*arrays: np.ndarray) -> list[Any]:
    return [np.asarray(a, np.int32 if a.dtype == int else np.float32) for a in arrays]


@functools.partial(jax.jit, static_argnames="among")
def mix(x, experts, weights, gate_up, down, among=None, layer=None):
    return moge.mix_experts(x, experts, weights, Experts(gate_up, down, layer), among)


@settings(deadline=None, max_examples=25)
@given(cases, st.booleans())
def test_mix_equals_loops(case: tuple[int, int, int, int], skew: bool) -> None:
    arrays = random_case(*case, skew)
    layouts.close(mix(*narrow(*arrays)), naive_mix(*arrays))


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("N", [1, 70, 700])
def test_every_block_size_up_to_all_tokens_on_one_expert(N: int, skew: bool) -> None:
    arrays = random_case(N, 3, 4, 7, skew)
    np.testing.assert_allclose(mix(*narrow(*arrays)), naive_mix(*arrays), atol=5e-4)


def test_a_stack_of_layers_is_read_in_place() -> None:
    x, experts, weights, *_ = arrays = random_case(9, 3, 4, 1, False)
    layered = [np.stack([a, 2 * a, -a]) for a in arrays[3:]]
    outputs = []
    for layer in range(3):
        own = [a[layer] for a in layered]
        got = mix(*narrow(x, experts, weights, *layered), layer=np.int32(layer))
        np.testing.assert_array_equal(got, mix(*narrow(x, experts, weights, *own)))
        np.testing.assert_allclose(got, naive_mix(x, experts, weights, *own), atol=2e-3)
        outputs.append(np.asarray(got))
    assert not np.allclose(outputs[0], outputs[1])


def test_there_is_no_gradient_of_a_stack() -> None:
    x, experts, weights, *held = narrow(*random_case(2, 1, 2, 1, False))
    stacked = [a[None] for a in held]
    loss = lambda stacked: mix(x, experts, weights, *stacked, layer=np.int32(0)).sum()
    with pytest.raises(NotImplementedError, match="of a layer's own experts"):
        jax.grad(loss)(stacked)


def partly_elsewhere(seed: int, here: float) -> tuple[np.ndarray, ...]:
    """3 of 12 experts are here; a pair's expert is one of them with a probability of `here`."""
    x, _, weights, gate_up, down = random_case(9, 4, 3, seed, False)
    rng = np.random.default_rng(seed)
    chosen = np.where(rng.random((9, 4)) < here, rng.integers(0, 3, (9, 4)), 3)
    return x, chosen, weights, gate_up[:3], down[:3]


@pytest.mark.parametrize("here", [0.0, 0.25, 1.0])
def test_pairs_of_another_rank_add_nothing(here: float) -> None:
    for seed in range(4):
        arrays = partly_elsewhere(seed, here)
        got = mix(*narrow(*arrays), among=12)
        layouts.close(got, naive_mix(*arrays))


def test_pairs_of_another_rank_when_all_blocks_are_in_use() -> None:
    """No row is left for them to read: the last one belongs to an expert, and is no pair's."""
    x, chosen, *rest = partly_elsewhere(0, here=1.0)
    chosen = np.array([0] * 33 + [1, 2, 3]).reshape(chosen.shape)
    size = blocks.block_size(chosen.size, 12)
    used = sum(-(-count // size) for count in (33, 1, 1))
    assert used == (chosen.size + 3 * (size - 1)) // size
    got = mix(*narrow(x, chosen, *rest), among=12)
    layouts.close(got, naive_mix(x, chosen, *rest))


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
    model = layouts.abstract(layouts.MOGE)
    tokens = np.ones((1, 8), np.int32)
    program = jax.make_jaxpr(jax.grad(lambda m: m(tokens).sum(), allow_int=True))(model)
    found = [*products(program.jaxpr)]
    assert len(found) > 10
    assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}


def dense_mix(x, experts, weights, gate_up, down):
    """Every expert for every token; those of another rank have no column."""
    E = len(down)
    combine = (jax.nn.one_hot(experts, E + 1)[..., :E] * weights[:, :, None]).sum(1)
    y = jnp.einsum("nd,epfd->nepf", x, gate_up)
    return jnp.einsum("nef,edf,ne->nd", jax.nn.silu(y[:, :, 0]) * y[:, :, 1], down, combine)


def gradients(mix: Callable) -> Callable:
    """Of everything but the choice of experts."""
    loss = lambda x, experts, rest: jnp.sum(jnp.sin(mix(x, experts, *rest)))
    run = jax.jit(jax.grad(loss, (0, 2)))
    return lambda x, experts, *rest: run(x, experts, rest)


@pytest.fixture(scope="module")
def dense_gradients() -> Callable:
    return gradients(dense_mix)


def each_close(got: Any, wanted: Any) -> None:
    """Sums that cancel are judged by the largest number of their array, not by themselves."""
    jax.tree.map(layouts.close, got, wanted)


def test_gradients_equal_those_of_a_dense_product(dense_gradients: Callable) -> None:
    arrays = narrow(*partly_elsewhere(5, here=1.0))
    each_close(gradients(mix)(*arrays), dense_gradients(*arrays))


def test_pairs_of_another_rank_have_no_gradient(dense_gradients: Callable) -> None:
    some = gradients(functools.partial(mix, among=12))
    for here in (0.0, 0.5, 1.0):
        arrays = narrow(*partly_elsewhere(3, here))
        got = some(*arrays)
        each_close(got, dense_gradients(*arrays))
        to_weights = np.asarray(got[1][0])
        assert not to_weights[np.asarray(arrays[1]) == 3].any()


@pytest.mark.parametrize(
    ("pairs", "experts"), [(8, 64), (64, 64), (65, 64), (4096, 64), (10**6, 64)]
)
def test_blocks_are_at_most_twice_as_many_as_experts_until_they_are_full(pairs, experts) -> None:
    size = blocks.block_size(pairs, experts)
    count = (pairs + experts * (size - 1)) // size
    assert size == 256 or count <= 2 * experts
