"""Routed experts on a Hopper against a loop over pairs in NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_jax.kernels.experts import mix_experts, mosaic
from pangu_jax.kernels.experts.grouped import grouped, summed
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.quant import weight
from pangu_jax.quant.scheme import Scheme
from tests.pangu_jax.kernels import hopper, oracle

pytestmark = hopper.needs_one

KINDS = ("bfloat16", "weight-only bfloat16", "dynamic bfloat16")
every_kind = pytest.mark.parametrize("kind", KINDS)


def mix(
    x: Any,
    chosen: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    implementation: Any = "mosaic",
    among: int | None = None,
    layer: Any = None,
) -> Any:
    held = Experts(gate_up, down, layer)
    return mix_experts(x, chosen, weights, held, among, implementation)


def run(*arguments: Any, **options: Any) -> Any:
    with hopper.here():
        return jax.jit(lambda *given: mix(*given, **options))(*arguments)


def check(arguments: Any, got: Any) -> None:
    wanted, size = oracle.mix_experts(*arguments)
    oracle.close(got, wanted, 0.03, size=size)
    assert np.abs(oracle.wide(got) - wanted).max() <= 0.03 * max(np.abs(wanted).max(), 1e-30)


@settings(max_examples=4)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 999),
    # Tokens, choices, experts, inner width and width: widths whose bytes 128, 64 and 32 divide.
    st.sampled_from([(1, 3, 8, 64, 128), (5, 2, 3, 96, 64), (70, 3, 4, 160, 192)]),
    st.sampled_from(["spread", "one", "some elsewhere", "all elsewhere"]),
)
def test_shapes(kind: str, seed: int, shape: tuple, pattern: str) -> None:
    arguments = oracle.experts(kind, seed, *shape, pattern)
    got = run(*arguments, among=2 * shape[2])
    assert got.dtype == jnp.bfloat16
    check(arguments, got)


@pytest.mark.parametrize("tokens", [8, 33, 200])
def test_every_size_of_block(tokens: int) -> None:
    """Of 16, 64 and 128 rows; the smallest is above."""
    arguments = oracle.experts("bfloat16", 0, tokens, 1, 1, 64, 64)
    sizes = {8: 8, 33: 64, 200: 128}
    assert mosaic._tile(arguments[1], 1)[0] == sizes[tokens]
    check(arguments, run(*arguments))


@every_kind
def test_a_layer_of_a_stack(kind: str) -> None:
    x, chosen, weights, *_ = oracle.experts(kind, 0, 5, 2, 4, 64, 64)
    held = oracle.stack(kind, 0, 3, 4, 64, 64)
    own = jax.tree.map(lambda leaf: np.asarray(leaf)[2], held)
    got = run(x, chosen, weights, *held, layer=jnp.int32(2))
    check((x, chosen, weights, *own), got)


def test_what_is_no_number_stays_in_its_row() -> None:
    x, *rest = oracle.experts("bfloat16", 0, 9, 2, 3, 64, 64)
    bad = np.isnan(oracle.wide(run(x.at[4, 40].set(jnp.nan), *rest)))
    np.testing.assert_array_equal(bad, np.broadcast_to(np.arange(9)[:, None] == 4, bad.shape))


def test_experts_that_nobody_chose_have_no_influence() -> None:
    x, chosen, weights, gate_up, down = oracle.experts("bfloat16", 0, 9, 2, 6, 64, 64)
    chosen = chosen // 2 * 2  # 0, 2 and 4
    wanted, _ = oracle.mix_experts(x, chosen, weights, gate_up, down)
    spoilt = [stack.at[1::2].set(jnp.nan) for stack in (gate_up, down)]
    oracle.close(run(x, chosen, weights, *spoilt), wanted, 0.03)


@pytest.mark.parametrize(
    "shape",
    [
        (9, 2, 4, 64, 128),
        pytest.param((140, 2, 3, 128, 64), marks=pytest.mark.slow),  # more than one block each
        pytest.param((9, 2, 3, 96, 64), marks=pytest.mark.slow),  # of plain XLA: an odd width
    ],
)
def test_gradients(shape: tuple) -> None:
    """Of rows, routing weights and matrices, against plain XLA's of float32."""
    x, chosen, weights, *held = oracle.experts("bfloat16", 0, *shape, "some elsewhere")
    pull = oracle.activations("float32", 2, x.shape[0], x.shape[1])

    def gradients(implementation: str, *given: Any) -> Any:
        def loss(x: Any, weights: Any, *held: Any) -> Any:
            y = mix(x, chosen, weights, *held, implementation=implementation, among=2 * shape[2])
            return (y.astype(jnp.float32) * pull).sum()

        with hopper.here():
            return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)

    floats = [leaf.astype(jnp.float32) for leaf in (x, weights, *held)]
    found = gradients("mosaic", x, weights, *held)
    for got, wanted in zip(found, gradients("blocks", *floats), strict=True):
        assert np.asarray(wanted).any()
        oracle.close(got, oracle.wide(wanted), 0.03)


def test_where_it_is_taken() -> None:
    """Within, for what it can do; by name it says what it cannot."""
    arguments = oracle.experts("bfloat16", 0, 9, 2, 3, 64, 64)
    text = lambda *given: str(jax.make_jaxpr(lambda: mix(*given, implementation=None))())
    with hopper.here():
        assert "wgmma" in text(*arguments)
    assert "wgmma" not in text(*arguments)
    with pytest.raises(NotImplementedError):
        mix(*arguments)
    x, chosen, weights, *held = arguments
    rounded = lambda scheme: [weight.quantize(matrix, scheme) for matrix in held]
    cannot = [
        oracle.experts("float32", 0, 9, 2, 3, 64, 64),
        oracle.experts("bfloat16", 0, 9, 2, 3, 16, 64),
        oracle.experts("bfloat16", 0, 9, 2, 3, 64, 48),
        (x, chosen, weights, *rounded(Scheme("int4", group=32))),
        (x, chosen, weights, *rounded(Scheme("fp8"))),
    ]
    for given_ in cannot:
        with hopper.here():
            assert "wgmma" not in text(*given_)
            with pytest.raises(NotImplementedError, match="experts of these kinds"):
                mix(*given_)


def test_a_grouped_product_of_integers_is_exact() -> None:
    """Of blocks that are used: the last one's expert is not even there."""
    rng = np.random.default_rng(0)
    rows, stack = (rng.integers(-127, 128, shape) for shape in ((3, 8, 256), (4, 64, 256)))
    experts = np.array([2, 0, 99])
    with hopper.here():
        got = jax.jit(lambda r, s, e: grouped(r, s, e, jnp.int32(2), 64, 4))(
            oracle.array(rows, "int8"), oracle.array(stack, "int8"), jnp.asarray(experts)
        )
    wanted = np.einsum("nsk,nfk->nsf", rows[:2], stack[experts[:2]])
    np.testing.assert_array_equal(np.asarray(got)[:2], wanted)


@pytest.mark.parametrize("tile", [64, 128])
def test_sums_over_the_blocks_of_each_expert(tile: int) -> None:
    """The second has none."""
    rng = np.random.default_rng(0)
    left, right = (oracle.array(rng.normal(size=(5, 64, n)), "bfloat16") for n in (128, 192))
    first, count = jnp.asarray([0, 2, 2]), jnp.asarray([2, 0, 3])
    with hopper.here():
        got = jax.jit(lambda *given: summed(*given, tile, 4))(left, right, first, count)
    each = np.einsum("nsf,nsk->nfk", oracle.wide(left), oracle.wide(right))
    oracle.close(got, np.stack([each[:2].sum(0), 0 * each[0], each[2:].sum(0)]), 2**-8)
