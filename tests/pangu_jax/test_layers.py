"""Norm, RoPE and attention against loops written here."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_jax import attention, rope
from pangu_jax.kernels.attention import full
from pangu_jax.norm import RMSNorm


def norm_with(weight: np.ndarray, eps: float) -> RMSNorm:
    return RMSNorm(len(weight), eps, lambda *shape: nnx.Param(jnp.asarray(weight)))


def test_rms_norm_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * w
    np.testing.assert_allclose(norm_with(w, 1e-2)(jnp.asarray(x)), expected, atol=1e-6)


def test_rms_norm_rounds_before_the_weight() -> None:
    """In bf16 the order is visible: round(x / rms) * w, not round(x / rms * w)."""
    rng = np.random.default_rng(1)
    bf16 = ml_dtypes.bfloat16
    x = rng.normal(size=(64, 32)).astype(bf16)
    w = rng.normal(size=32).astype(bf16)
    wide = x.astype(np.float32)
    scaled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-5))
    rounded_first = (scaled.astype(bf16).astype(np.float32) * w.astype(np.float32)).astype(bf16)
    rounded_last = (scaled * w.astype(np.float32)).astype(bf16)
    got = np.asarray(norm_with(w, 1e-5)(jnp.asarray(x)))
    assert (got == rounded_first).mean() > 0.999
    assert (got == rounded_last).mean() < 0.9


def test_inverse_frequencies_are_the_reference_order_of_rounding() -> None:
    theta, H = 16_000_000.0, 128
    exact = theta ** (-np.arange(0, H, 2) / H)
    got = rope.inverse_frequencies(theta, H)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, rtol=2e-7)
    assert got[0] == 1.0


@pytest.mark.parametrize("H", [2, 8, 10])
def test_rope_turns_pairs_by_their_angle(H: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 4, H)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 300, 5]])
    got = rope.rotate(jnp.asarray(x), rope.table(jnp.asarray(positions), 1e4, H, jnp.float32))
    for b, t, h, j in np.ndindex(2, 3, 4, H // 2):
        angle = positions[b, t] * 1e4 ** (-2 * j / H)
        low, high = x[b, t, h, j].astype(float), x[b, t, h, j + H // 2].astype(float)
        turned = low * np.cos(angle) - high * np.sin(angle)
        other = high * np.cos(angle) + low * np.sin(angle)
        np.testing.assert_allclose(got[b, t, h, j], turned, atol=2e-5)
        np.testing.assert_allclose(got[b, t, h, j + H // 2], other, atol=2e-5)


def naive_attention(q, k, v, at, key_at):
    """Loops over everything; q [B,T,K,g,H], k and v [B,K,S,H]."""
    out = np.zeros(q.shape)
    for b, t, kv, g in np.ndindex(*q.shape[:4]):
        seen = [s for s in range(k.shape[2]) if key_at[b, s] <= at[b, t]]
        scores = np.array([q[b, t, kv, g] @ k[b, kv, s] for s in seen]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, kv, g] = sum(w * v[b, kv, s] for w, s in zip(weights, seen, strict=True))
    return out


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([(1, 1, 1, 1), (2, 5, 1, 3), (2, 3, 3, 1), (1, 4, 2, 2)]), st.integers(0, 99)
)
def test_attend_equals_loops(shape: tuple[int, int, int, int], seed: int) -> None:
    B, T, K, g = shape
    rng = np.random.default_rng(seed)
    H, S = 4, 6
    q = rng.normal(size=(B, T, K, g, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    at = rng.integers(0, S, (B, T)).astype(np.int32)
    key_at = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    got = full.attend(*map(jnp.asarray, (q, k, v, at, key_at)))
    np.testing.assert_allclose(got, naive_attention(q, k, v, at, key_at), atol=1e-5)


@pytest.mark.parametrize("T", [129, 300])
def test_blocks_of_queries_change_nothing(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the blocked path equal one block over everything."""
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.normal(size=(2, T, 2, 2, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 2, T, 8)), jnp.float32)
    at = jnp.broadcast_to(jnp.arange(T), (2, T))

    def run(q, k, v):
        out = full.attend(q, k, v, at, at)
        return (out * jnp.cos(jnp.arange(8.0))[None, None, None, None, :]).sum(), out

    blocked = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setattr(full, "QUERY_BLOCK", 512)
    whole = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    for a, b in zip(jax.tree.leaves(blocked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def test_a_query_that_sees_nothing_is_finite() -> None:
    ones = jnp.ones((1, 1, 3, 4), jnp.float32)
    never = jnp.full((1, 3), attention.NEVER)
    out = full.attend(jnp.ones((1, 2, 1, 1, 4)), ones, ones, jnp.zeros((1, 2), int), never)
    np.testing.assert_allclose(out, 1.0)
