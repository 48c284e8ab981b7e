"""Mixtures of quantised experts against loops over them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangu_jax import moge
from pangu_jax.moge import Experts
from pangu_jax.quant import weight
from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight
from tests.pangu_jax.quant.integers import fixed, rounded, static

W8A8, W8, W4 = Scheme("int8", "dynamic"), Scheme("int8"), Scheme("int4", group=16)

quantize = jax.jit(weight.quantize, static_argnames="scheme")
floats = jax.jit(lambda held: held.floats(jnp.float32))


@functools.partial(jax.jit, static_argnames="among")
def mix(x: Any, experts: Any, weights: Any, gate_up: Any, down: Any, among=None, layer=None) -> Any:
    return moge.mix_experts(x, experts, weights, Experts(gate_up, down, layer), among)


E, F, WIDTH = 6, 16, 32


def case(seed: int, N: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, WIDTH)).astype(np.float32)
    chosen = np.stack([rng.permutation(E)[:3] for _ in range(N)]).astype(np.int32)
    return x, chosen, rng.uniform(0.2, 1, (N, 3)).astype(np.float32)


def expert_matrices(seed: int, *lead: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    return make(*lead, E, 2, F, WIDTH), make(*lead, E, WIDTH, F)


def loop(x: np.ndarray, chosen: np.ndarray, weights: np.ndarray, multiply: Callable) -> np.ndarray:
    """multiply(which matrix, expert, row)"""
    out = np.zeros(x.shape)
    for n, k in np.ndindex(*chosen.shape):
        e = chosen[n, k]
        gate, up = multiply(0, e, x[n])
        out[n] += weights[n, k] * multiply(1, e, gate / (1 + np.exp(-gate)) * up)
    return out


def float_loop(arrays: tuple, held: list[Any]) -> np.ndarray:
    wide = [np.asarray(floats(h), np.float64) for h in held]
    return loop(*arrays, lambda i, e, row: wide[i][e] @ row)


@pytest.mark.parametrize(
    ("scheme", "N"), [(W8, 1), (W8, 40), (W4, 9)], ids=lambda x: getattr(x, "numbers", x)
)
def test_experts_of_float_activations(scheme: Scheme, N: int) -> None:
    held = [quantize(w, scheme) for w in expert_matrices(0)]
    arrays = case(N, N)
    np.testing.assert_allclose(mix(*arrays, *held), float_loop(arrays, held), atol=2e-5)


@pytest.mark.parametrize("N", [1, 40])
def test_experts_of_rounded_activations(N: int) -> None:
    """Against integers in NumPy; a rounding that falls the other way moves little."""
    held = [quantize(w, W8A8) for w in expert_matrices(1)]
    parts = [[np.asarray(part) for part in (h.numbers, h.scale)] for h in held]

    def multiply(which: int, expert: int, row: np.ndarray) -> np.ndarray:
        numbers, scale = rounded(row[None])
        of_expert, of_out = (part[expert] for part in parts[which])
        return of_expert.astype(np.int64) @ numbers[0] * scale[0] * of_out[..., 0]

    arrays = case(N, N)
    np.testing.assert_allclose(mix(*arrays, *held), loop(*arrays, multiply), atol=0.01)
    np.testing.assert_allclose(mix(*arrays, *held), float_loop(arrays, held), atol=0.15)


def test_static_activations_have_scales_for_each_layer_and_expert() -> None:
    each = (2, E)
    held = [
        static(0, *each, 2, F, each=each, width=WIDTH),
        static(1, *each, WIDTH, each=each, width=F),
    ]

    def multiply(which: int, expert: int, row: np.ndarray) -> np.ndarray:
        return fixed(row[None], jax.tree.map(lambda part: part[1, expert], held[which]))[0]

    arrays = case(2, 9)
    wanted = loop(*arrays, multiply)
    got = mix(*arrays, *held, layer=np.int32(1))
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("scheme", [W8A8, W4], ids=lambda s: s.numbers)
def test_a_stack_of_quantised_layers_is_read_in_place(scheme: Scheme) -> None:
    stacked = [quantize(w, scheme) for w in expert_matrices(3, 3)]
    arrays = case(4, 9)
    for layer in range(3):
        own = [jax.tree.map(lambda part, layer=layer: part[layer], h) for h in stacked]
        got = mix(*arrays, *stacked, layer=np.int32(layer))
        np.testing.assert_allclose(got, mix(*arrays, *own), rtol=1e-6, atol=1e-6)


def test_quantised_experts_of_another_rank_add_nothing() -> None:
    held = [quantize(w, W8) for w in expert_matrices(5)]
    x, chosen, weights = case(6, 9)
    here = np.where(chosen < 3, chosen, E)
    some = float_loop((x, chosen, np.where(chosen < 3, weights, 0)), held)
    np.testing.assert_allclose(mix(x, here, weights, *held, among=2 * E), some, atol=2e-5)


def dense_mix(x: Any, chosen: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """Every expert for every token."""
    combine = (jax.nn.one_hot(chosen, E) * weights[:, :, None]).sum(1)
    y = jnp.einsum("nd,epfd->nepf", x, gate_up)
    return jnp.einsum("nef,edf,ne->nd", jax.nn.silu(y[:, :, 0]) * y[:, :, 1], down, combine)


@functools.partial(jax.jit, static_argnames="mix")
@functools.partial(jax.grad, argnums=(0, 1, 2, 3), allow_int=True)
def gradients(x: Any, weights: Any, gate_up: Any, down: Any, chosen: Any, mix: Callable) -> Any:
    """Of everything but the choice of experts."""
    pull = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return (mix(x, chosen, weights, gate_up, down) * pull).sum()


KINDS = {"down": (None, W8), "gate_up": (W4, None), "dynamic": (W8A8, W8A8)}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_gradients_through_quantised_experts(kinds: tuple[Scheme | None, Scheme | None]) -> None:
    """Those of x, of the routing weights and of matrices that are floats equal those of float
    matrices of the same worth; but for rounded activations, which move what lies between.
    """
    matrices = expert_matrices(7)
    held = [w if s is None else quantize(w, s) for w, s in zip(matrices, kinds, strict=True)]
    wide = [floats(h) if isinstance(h, Weight) else h for h in held]
    x, chosen, weights = case(8, 9)
    got = gradients(x, weights, *held, chosen, mix=mix)
    wanted = gradients(x, weights, *wide, chosen, mix=dense_mix)
    tolerance = 0.03 if W8A8 in kinds else 1e-5
    for one, two, leaf in zip(got, wanted, (x, weights, *held), strict=True):
        if isinstance(leaf, Weight):
            for part in jax.tree.leaves(one):
                assert part.dtype == jax.dtypes.float0 or not np.asarray(part).any()
        else:
            size = np.abs(np.asarray(two)).max()
            np.testing.assert_allclose(one, two, atol=tolerance * size, rtol=0)


def test_there_is_no_gradient_through_a_quantised_stack() -> None:
    held = [quantize(w, W8) for w in expert_matrices(9, 1)]
    x, chosen, weights = case(8, 9)
    loss = lambda x: mix(x, chosen, weights, *held, layer=np.int32(0)).sum()
    with pytest.raises(NotImplementedError, match="of a layer's own experts"):
        jax.eval_shape(jax.grad(loss), x)
