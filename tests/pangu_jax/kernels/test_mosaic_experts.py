"""Routed experts on a Hopper against a loop over pairs in NumPy float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.kernels import mosaic as mosaic_kernels
from pangu_jax.kernels.experts import mix_experts, mosaic
from pangu_jax.kernels.experts.gradients import columns, grouped_back, summed
from pangu_jax.kernels.experts.grouped import grouped
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.precision import same_bits
from pangu_jax.quant import weight
from pangu_jax.quant.scheme import Scheme
from tests.pangu_jax.kernels import hopper, oracle

pytestmark = hopper.needs_one

KINDS = ("bfloat16", "weight-only bfloat16", "dynamic bfloat16")
SLOW = pytest.mark.slow
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
    """Of 8, 64 and 128 rows; others are below."""
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
        pytest.param((9, 2, 3, 96, 64), marks=pytest.mark.slow),  # no multiple of 64
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


BLOCKS = [(9, 16, KINDS[1]), (20, 32, KINDS[0]), (140, 128, KINDS[2])]
MORE_BLOCKS = [(n, size, kind) for n, size, own in BLOCKS for kind in KINDS if kind != own]


@pytest.mark.parametrize(
    ("tokens", "size", "kind"), [*BLOCKS, *(pytest.param(*b, marks=SLOW) for b in MORE_BLOCKS)]
)
def test_kinds_and_blocks(tokens: int, size: int, kind: str) -> None:
    """Several blocks of each expert but one, several tiles of outputs, several steps of K."""
    arguments = oracle.experts(kind, 1, tokens, 2, 2, 128, 256)
    assert mosaic._tile(arguments[1], 2)[0] == size
    check(arguments, run(*arguments))


@oracle.kinds(KINDS[2:], KINDS[1:2])
def test_numbers_that_are_none_of_int8(kind: str) -> None:
    """Of a row they stay there; of scales of experts that nobody chose they are not seen."""
    x, chosen, weights, *held = oracle.experts(kind, 0, 9, 2, 6, 64, 64)
    chosen = chosen // 2 * 2  # 0, 2 and 4
    wanted, size = oracle.mix_experts(x, chosen, weights, *held)
    spoilt = [
        dataclasses.replace(matrix, scale=matrix.scale.at[1::2].set(jnp.nan)) for matrix in held
    ]
    got = oracle.wide(run(x.at[4, 40].set(jnp.nan), chosen, weights, *spoilt))
    bad = np.isnan(got)
    np.testing.assert_array_equal(bad, np.broadcast_to(np.arange(9)[:, None] == 4, bad.shape))
    others = np.arange(9) != 4
    oracle.close(got[others], wanted[others], 0.03, size=size[others])


def test_a_token_of_nobody_here_gets_zeros() -> None:
    x, chosen, weights, *held = oracle.experts("bfloat16", 0, 9, 2, 3, 64, 64)
    got = oracle.wide(run(x, chosen.at[2].set(3), weights, *held, among=6))
    np.testing.assert_array_equal(got[2], 0)
    assert np.delete(got, 2, 0).all()


@oracle.kinds(KINDS[2:], KINDS[:2])
def test_the_same_bits_alone(kind: str) -> None:
    """A token's, where that is asked for, with two tokens or twenty."""
    x, chosen, weights, *held = oracle.experts(kind, 0, 20, 2, 2, 64, 64)
    assert mosaic._tile(chosen, 2)[0] == 32
    with same_bits():
        assert mosaic._tile(chosen, 2)[0] == mosaic._tile(chosen[-2:], 2)[0] == 8
        whole = np.asarray(run(x, chosen, weights, *held))
        few = np.asarray(run(x[-2:], chosen[-2:], weights[-2:], *held))
    oracle.same(few, whole[-2:])


def test_in_a_loop_over_layers() -> None:
    x, chosen, weights, *_ = oracle.experts("bfloat16", 0, 5, 2, 4, 64, 64)
    held = oracle.stack("bfloat16", 0, 3, 4, 64, 64)
    step = lambda x, layer: (mix(x, chosen, weights, *held, layer=layer), x)
    with hopper.here():
        last, before = jax.jit(lambda x: lax.scan(step, x, jnp.arange(3)))(x)
    for layer, made in enumerate([*before[1:], last]):
        own = (np.asarray(leaf)[layer] for leaf in held)
        check((before[layer], chosen, weights, *own), made)


@SLOW
def test_under_vmap() -> None:
    cases = [oracle.experts("weight-only bfloat16", i, 5, 2, 3, 64, 64) for i in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    with hopper.here():
        got = jax.jit(jax.vmap(mix))(*batch)
    for row, own in zip(got, cases, strict=True):
        check(own, row)


@oracle.kinds(KINDS[1:2], KINDS[2:])
def test_gradients_of_others_are_those_of_plain_xla(kind: str) -> None:
    """Of rows and routing weights."""
    x, chosen, weights, *held = oracle.experts(kind, 0, 9, 2, 3, 64, 64, "some elsewhere")

    def gradients(implementation: str) -> Any:
        def loss(x: Any, weights: Any) -> Any:
            mixed = mix(x, chosen, weights, *held, implementation, 6)
            return jnp.sin(mixed.astype(jnp.float32)).sum()

        with hopper.here():
            return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    for got, wanted in zip(gradients("mosaic"), gradients("blocks"), strict=True):
        assert np.asarray(wanted).any()
        oracle.close(got, oracle.wide(wanted), 1e-5)


@hopper.several_devices
@pytest.mark.parametrize("split", ["experts", "tokens"])
def test_traced_over_devices(split: str) -> None:
    """Values and gradients vary over the devices they should: nothing interprets several."""
    arguments = oracle.experts("bfloat16", 0, 16, 2, 16, 64, 64)

    def local(x: Any, chosen: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        if split == "tokens":
            return mix(x, chosen, weights, gate_up, down)
        own = chosen - 2 * lax.axis_index("x")
        own = jnp.where((own >= 0) & (own < 2), own, 2)
        return lax.psum(mix(x, own, weights, gate_up, down, among=16), "x")

    rows, held = (P("x"), P()) if split == "tokens" else (P(), P("x"))
    specs = (rows, rows, rows, held, held)
    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=rows)
    loss = lambda *given: over(*given).astype(jnp.float32).sum()
    with mosaic_kernels.compiled():
        out = jax.eval_shape(over, *arguments)
        made = jax.eval_shape(jax.grad(loss, (0, 2, 3, 4)), *arguments)
    for grad, own in zip((out, *made), (*arguments[:1] * 2, *arguments[2:]), strict=True):
        assert (grad.shape, grad.dtype) == (own.shape, own.dtype)


PRODUCTS = {
    "32 bytes": ("bfloat16", "bfloat16", 8, 64, 48, 64),
    "no tiles of 128": ("bfloat16", "bfloat16", 16, 192, 96, 128),
    "int8 weights": ("bfloat16", "int8", 8, 128, 96, 128),
    "one step": ("bfloat16", "bfloat16", 24, 64, 64, 64),
    "tiles of 128": ("bfloat16", "bfloat16", 128, 256, 192, 128),
    "int8 weights, steps of 64": ("bfloat16", "int8", 64, 64, 320, 64),
}


@pytest.mark.parametrize(
    "name", [*list(PRODUCTS)[:3], *(pytest.param(name, marks=SLOW) for name in list(PRODUCTS)[3:])]
)
def test_grouped_products(name: str) -> None:
    """The last block is not used, and nothing of it or of its expert is a number."""
    dtype, held, size, F, K, tile = PRODUCTS[name]
    rows = oracle.activations(dtype, 0, 4, size, K).at[3].set(jnp.nan)
    stack = oracle.array(np.random.default_rng(1).integers(-127, 128, (3, F, K)), held)
    experts = np.array([1, 1, 0, 2])
    if held == "bfloat16":
        stack = stack.at[2].set(jnp.nan)
    with hopper.here():
        got = jax.jit(lambda r, s, e: grouped(r, s, e, jnp.int32(3), tile, 4))(
            rows, stack, jnp.asarray(experts)
        )
    assert got.dtype == (dtype if held == dtype else "float32")
    wanted = np.einsum("nsk,nfk->nsf", oracle.wide(rows)[:3], oracle.wide(stack)[experts[:3]])
    oracle.close(got[:3], wanted, 2**-8 if held == dtype else 1e-6)


@pytest.mark.parametrize(
    ("size", "K", "F"), [(64, 64, 112), pytest.param(128, 192, 64, marks=SLOW)]
)
def test_grouped_products_of_a_turned_stack(size: int, K: int, F: int) -> None:
    rows = oracle.activations("bfloat16", 0, 3, size, K)
    stack = oracle.matrix("bfloat16", 1, 2, K, F)
    experts = np.array([1, 0, 99])
    with hopper.here():
        got = jax.jit(lambda r, s, e: grouped_back(r, s, e, jnp.int32(2), 4))(
            rows, stack, jnp.asarray(experts)
        )
    wanted = np.einsum("nsk,nkf->nsf", oracle.wide(rows)[:2], oracle.wide(stack)[experts[:2]])
    oracle.close(got[:2], wanted, 2**-8)


def test_no_blocks_are_used() -> None:
    """Nothing is written then: the interpreter leaves NaN there, a card whatever was."""
    rows = oracle.activations("bfloat16", 0, 2, 8, 64)
    stack = oracle.matrix("bfloat16", 1, 1, 64, 64)
    with hopper.here():
        got = jax.jit(lambda r, s, e: grouped(r, s, e, jnp.int32(0), 64, 4))(
            rows, stack, jnp.zeros(2, jnp.int32)
        )
    assert got.shape == (2, 8, 64)
    assert hopper.ON_CARD or np.isnan(oracle.wide(got)).all()


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


@pytest.mark.parametrize("widths", [(128, 192), (192, 112)])
def test_sums_over_the_blocks_of_each_expert(widths: tuple[int, int]) -> None:
    """The second has none."""
    rng = np.random.default_rng(0)
    left, right = (oracle.array(rng.normal(size=(5, 64, n)), "bfloat16") for n in widths)
    first, count = jnp.asarray([0, 2, 2]), jnp.asarray([2, 0, 3])
    with hopper.here():
        got = jax.jit(lambda *given: summed(*given, 4))(left, right, first, count)
    each = np.einsum("nsf,nsk->nfk", oracle.wide(left), oracle.wide(right))
    oracle.close(got, np.stack([each[:2].sum(0), 0 * each[0], each[2:].sum(0)]), 2**-8)


def test_columns_of_a_tile() -> None:
    """Of the 72B, of half an expert of it, of mini-moge and nano-moge."""
    widths = {5120: 128, 1344: 64, 672: 96, 112: 112, 48: 48, 16: 16}
    assert {width: columns(width) for width in widths} == widths
