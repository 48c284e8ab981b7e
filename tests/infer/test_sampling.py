"""Choosing tokens, against exact enumeration on small vocabularies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import sampler
from infer.sampler import Controls
from infer.sampling import Sampling
from pangu_jax.errors import InputError

V = 7


def controls(temperature: float, top_k: int = 0, top_p: float = 1.0, rows: int = 1, seed: int = 0):
    return Controls(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        min_p=jnp.zeros(rows, jnp.float32),
        keys=jax.vmap(jax.random.key)(jnp.full(rows, seed)),
        shaping=None,
    )


def expected_distribution(logits, temperature, top_k, top_p) -> np.ndarray:
    """By enumeration: sort, cut at k, renormalise, cut where the mass before a token reaches p."""
    z = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-z, kind="stable")
    kept = order[: top_k if top_k > 0 else V]
    p = np.exp(z[kept] - z[kept].max())
    p /= p.sum()
    final, mass = [], 0.0
    for token, share in zip(kept, p, strict=True):
        if top_p < 1 and mass >= top_p:
            break
        final.append(token)
        mass += share
    out = np.zeros(V)
    out[final] = np.exp(z[final] - z.max())
    return out / out.sum()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.floats(0.2, 3.0),
    st.integers(-1, V + 2),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
)
def test_processed_distribution(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, V).astype(np.float32)
    got = sampler.process(jnp.asarray(logits)[None], controls(temperature, top_k, top_p))[0]
    expected = expected_distribution(logits, np.float32(temperature), top_k, top_p)
    np.testing.assert_allclose(jax.nn.softmax(got), expected, atol=1e-5)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 4000 positions; 22.5 is the 0.1% point of 6 degrees of freedom."""
    logits = np.random.default_rng(1).normal(0, 1, V).astype(np.float32)
    n = 4000
    many = jnp.broadcast_to(jnp.asarray(logits), (n, V))
    choice = sampler.choose(many, controls(0.8, rows=n), jnp.arange(n))
    tokens, logprobs = choice.token, choice.logprob
    p = expected_distribution(logits, 0.8, 0, 1.0)
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 22.5
    np.testing.assert_allclose(logprobs, np.log(p)[np.asarray(tokens)], atol=1e-4)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, V)), jnp.float32)
    at = jnp.array([3, 9, 4, 3, 8, 1])
    together = sampler.choose(logits, controls(1.0, rows=6), at).token
    for row in range(6):
        alone = sampler.choose(logits[row : row + 1], controls(1.0), at[row : row + 1]).token
        assert together[row] == alone[0]


def test_greedy_rows_are_exact_in_a_mixed_batch() -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, V)), jnp.float32)
    mixed = dataclasses.replace(
        controls(1.0, top_k=1, top_p=0.1, rows=2), temperature=jnp.array([0.0, 1.0])
    )
    choice = sampler.choose(logits, mixed, jnp.zeros(2, jnp.int32))
    tokens, logprobs = choice.token, choice.logprob
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    plain = jax.nn.log_softmax(logits[0])
    np.testing.assert_allclose(logprobs, [plain.max(), 0.0], atol=1e-5)  # top-1 of one is certain


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": 1e-50},
        {"top_k": 2**32 + 1},
        {"max_new_tokens": 2.5},
        {"seed": 1.5},
        {"stop_token_ids": 3},
        {"stop_token_ids": (2**40,)},
    ],
    ids=str,
)
def test_senseless_settings_are_refused(bad: dict) -> None:
    """Called past the run-time type checks, as a user without them would."""
    settings = object.__new__(Sampling)
    for field in dataclasses.fields(Sampling):
        default = {} if field.name == "logit_bias" else field.default
        object.__setattr__(settings, field.name, bad.get(field.name, default))
    with pytest.raises(InputError, match=next(iter(bad))):
        settings.__post_init__()
