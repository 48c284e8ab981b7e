"""Products of rows with matrices of every kind against NumPy in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.kernels import native
from pangu_jax.kernels.matmul import matmul, scaled_matmul
from pangu_jax.precision import same_bits
from pangu_jax.quant import product, rows
from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight
from tests.pangu_jax.kernels import oracle
from tests.pangu_jax.kernels.oracle import FP8, KINDS, WIDTHS, some_kinds

FLOAT_KINDS, INTEGER_KINDS = KINDS[:2], KINDS[4:]
every_kind = pytest.mark.parametrize("kind", [*KINDS, *FP8])


def multiply(x: Any, held: Any, implementation: Any = None) -> Any:
    """The product by one implementation, or by that which is taken without being named."""
    if not isinstance(held, Weight):
        return matmul(x, held, None, implementation)
    if implementation == "native":
        assert native.available()  # which registers them
        return scaled_matmul(x, held, x.dtype)
    if implementation == "xla":
        with native.without():
            return product.linear(x, held)
    return product.linear(x, held)


run = jax.jit(multiply, static_argnames="implementation")

# Around the numbers of rows from which they are taken side by side, and of vectors of them.
ROWS = (1, 2, 3, 5, 12, 13, 15, 16, 17, 24, 25, 32, 33, 48, 49, 65, 100)

IMPLEMENTATIONS = ("native", "xla", None)
unnamed_or_plain = pytest.mark.parametrize("implementation", [None, "xla"])


@jax.jit
def of_single_rows(x: Any, held: Any) -> Any:
    return lax.map(lambda row: multiply(row[None], held, "native")[0], x)


def check(kind: str, seed: int, N: int, E: int, D: int) -> None:
    """Every implementation: sums in float32 are off by a few units of the sum of all sizes."""
    x, held = oracle.activations(kind, seed, N, D), oracle.matrix(kind, seed + 1, E, D)
    wanted, size = oracle.matmul(x, held), np.abs(oracle.wide(x)) @ np.abs(oracle.worth(held)).T
    for implementation in ("native", "xla"):
        got = run(x, held, implementation)
        assert got.dtype == x.dtype
        rounding = 2e-6 * size + (2**-8 if got.dtype == jnp.bfloat16 else 0) * np.abs(wanted)
        if kind.startswith("int4") and got.dtype == jnp.bfloat16:
            rounding += 2**-8 * size  # of numbers times their scale
        assert got.shape == wanted.shape
        assert (np.abs(oracle.wide(got) - wanted) <= rounding).all(), (implementation, N, E, D)


@settings(max_examples=30)
@given(
    st.sampled_from([*KINDS, *FP8]),
    st.integers(0, 999),
    st.sampled_from(ROWS),
    st.sampled_from(WIDTHS),
    st.sampled_from(WIDTHS),
)
def test_odd_shapes(kind: str, seed: int, N: int, E: int, D: int) -> None:
    check(kind, seed, N, E, D)


@settings(max_examples=25)
@given(
    st.sampled_from(oracle.INT4),
    st.integers(0, 999),
    st.sampled_from(ROWS),
    st.sampled_from(WIDTHS),
    st.integers(1, 3),
)
def test_groups(kind: str, seed: int, N: int, E: int, groups: int) -> None:
    check(kind, seed, N, E, groups * int(kind.split()[0].removeprefix("int4-")))


@some_kinds
@pytest.mark.parametrize(
    "shape", [(3, 1025, 515), (8, 9, 8195), (70, 66, 1031), (200, 1025, 65)], ids=str
)
def test_many_pieces_and_panels(kind: str, shape: tuple[int, int, int]) -> None:
    """A matrix in pieces for several threads; rows in more panels than one."""
    check(kind, 0, *shape)


@every_kind
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    """To the last bit; the width ends in vectors and single numbers."""
    x, held = oracle.activations(kind, 0, 70, 155), oracle.matrix(kind, 1, 45, 155)
    alone = of_single_rows(x, held)
    counts = [*range(1, 18), *range(23, 28), *range(62, 71)]
    with same_bits():
        together = jax.jit(lambda x: [multiply(x[:n], held, "native") for n in counts])(x)
        turned = run(np.asarray(x)[::-1], held, "native")
    for n, first in zip(counts, together, strict=True):
        oracle.same(first, np.asarray(alone)[:n], n)
    oracle.same(np.asarray(turned)[::-1], alone)


@every_kind
def test_many_rows_do_not_depend_on_their_order(kind: str) -> None:
    """Nor on what is next to them, where bits may depend on how many there are."""
    x, held = oracle.activations(kind, 0, 70, 155), oracle.matrix(kind, 1, 45, 155)
    together, turned = (np.asarray(run(rows, held, "native")) for rows in (x, np.asarray(x)[::-1]))
    oracle.same(turned[::-1], together)


@pytest.mark.parametrize("kind", oracle.INT4)
def test_a_row_of_groups_does_not_depend_on_the_others(kind: str) -> None:
    x, held = oracle.activations(kind, 0, 30, 384), oracle.matrix(kind, 1, 45, 384)
    alone = of_single_rows(x, held)
    with same_bits():
        for n in (1, 2, 3, 5, 24, 25, 30):
            oracle.same(run(x[:n], held, "native"), np.asarray(alone)[:n], n)


@some_kinds
def test_a_long_row_does_not_depend_on_the_others(kind: str) -> None:
    """Few such rows are a panel."""
    x, held = oracle.activations(kind, 0, 9, 8195), oracle.matrix(kind, 1, 6, 8195)
    with same_bits():
        oracle.same(run(x, held, "native"), of_single_rows(x, held))


@some_kinds
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_number_stays_in_its_row(kind: str, implementation: Any) -> None:
    held, most = oracle.matrix(kind, 1, 9, 130), 70
    if implementation == "xla" and oracle.is_dynamic(held):
        most = 13  # JAX 0.10's maximum of many rows passes over NaN on CPU
    for N, place in ((1, 129), (13, 64), (most, 129)):
        x = oracle.activations(kind, 0, N, 130).at[N - 1, place].set(jnp.nan)
        bad = np.isnan(oracle.wide(run(x, held, implementation)))
        np.testing.assert_array_equal(bad.all(1), np.arange(N) == N - 1)
        np.testing.assert_array_equal(bad.any(1), np.arange(N) == N - 1)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_of_fp8(dtype: str, rows: int) -> None:
    """Also those below the smallest normal one, and those that are none."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    held = Weight(
        scheme=Scheme("fp8"),
        numbers=oracle.array(np.repeat(numbers[:, None], 64, 1), "float8_e4m3fn"),
        scale=jnp.ones((256, 1)),
    )
    x = oracle.array(np.eye(rows, 64), dtype)
    got = scaled_matmul(x, held, jnp.float32)
    known = ~np.isnan(numbers.astype(np.float32))
    assert known.sum() == 254
    np.testing.assert_array_equal(
        got[:, known], np.tile(numbers[known].astype(np.float32), (rows, 1))
    )
    assert np.isnan(got[:, ~known]).all()


@pytest.mark.parametrize("kind", FP8[2:])
def test_a_row_of_fp8_that_is_no_number(kind: str) -> None:
    held = oracle.matrix(kind, 1, 9, 130)
    for N in (1, 40):
        x = oracle.activations(kind, 0, N, 130).at[N - 1, 77].set(jnp.nan)
        bad = np.isnan(oracle.wide(run(x, held, "native")))
        np.testing.assert_array_equal(
            bad, np.broadcast_to(np.arange(N)[:, None] == N - 1, bad.shape)
        )


def scaled_sums(numbers: Any, scale: Any, held: Weight) -> np.ndarray:
    sums = np.asarray(numbers, np.int64) @ np.asarray(held.numbers, np.int64).T
    return sums.astype(np.float32) * np.asarray(scale) * np.asarray(held.scale)[:, 0]


@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integers_are_scaled_by_the_row_then_by_the_output(kind: str, implementation: Any) -> None:
    """Bit by bit: sums are exact, of rows of zeros and of the largest numbers too."""
    for N, E, D in ((1, 5, 7), (3, 66, 130), (70, 9, 8195)):
        x, held = oracle.activations(kind, N, N, D), oracle.matrix(kind, 1, E, D)
        x = x.at[0].set(x[0] * 0 if N == 3 else jnp.where(held.numbers[0] < 0, -127, 127))
        wanted = scaled_sums(*oracle.rounded(x), held)
        oracle.same(run(x, held, implementation), wanted.astype(x.dtype), (N, E, D))


@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_rounded_as_quantize_rounds_them(kind: str, implementation: Any) -> None:
    """Bit by bit, where a number lies in the middle between two: half of a row's largest does."""
    held, largest = oracle.matrix(kind, 1, 9, 64), jnp.linspace(4, 8, 40).astype(kind.split()[1])
    x = oracle.activations(kind, 0, 40, 64).at[:, 1].set(largest).at[:, 0].set(largest / 2)
    wanted = scaled_sums(*jax.jit(rows.quantize)(x), held)
    oracle.same(run(x, held, implementation), wanted.astype(x.dtype))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_dtype_of_the_result(kind: str, implementation: Any) -> None:
    """Sums of bf16 are not rounded on the way to a float32 result."""
    x, w = oracle.activations(kind, 0, 3, 130), oracle.matrix(kind, 1, 17, 130)
    got = jax.jit(lambda x, w: matmul(x, w, jnp.float32, implementation))(x, w)
    assert got.dtype == jnp.float32
    oracle.close(got, oracle.matmul(x, w), 1e-6)


@pytest.mark.parametrize("N", [1, 5, 70])
@pytest.mark.parametrize("kind", ["float32", "weight-only float32", "dynamic float32"])
def test_gradients_are_those_of_plain_xla(kind: str, N: int) -> None:
    x, held = oracle.activations(kind, 0, N, 17), oracle.matrix(kind, 1, 9, 17)
    pull = oracle.activations("float32", 2, N, 9)
    argnums = 0 if isinstance(held, Weight) else (0, 1)

    def gradients(implementation: Any) -> Any:
        loss = lambda x, held: (multiply(x, held, implementation) * pull).sum()
        return jax.jit(jax.grad(loss, argnums))(x, held)

    jax.tree.map(
        lambda got, wanted: oracle.close(got, oracle.wide(wanted), 1e-5),
        gradients(None),
        gradients("xla"),
    )


@pytest.mark.parametrize("kind", KINDS[::2])
@unnamed_or_plain
def test_under_vmap(kind: str, implementation: Any) -> None:
    """Over rows, and over rows with a matrix each."""
    x = oracle.activations(kind, 0, 3, 5, 17)
    held = [oracle.matrix(kind, i, 9, 17) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *held)
    one = lambda x, held: multiply(x, held, implementation)
    got = jax.jit(jax.vmap(one, (0, None)))(x, held[0])
    each = jax.jit(jax.vmap(one))(x, stack)
    for i in range(3):
        oracle.close(got[i], oracle.matmul(x[i], held[0]), 1e-5)
        oracle.close(each[i], oracle.matmul(x[i], held[i]), 1e-5)


SPLITS = {
    "rows": (P("x"), P(), P("x")),
    "outputs": (P(), P("x"), P(None, "x")),
    "inputs": (P(None, "x"), P(None, "x"), P()),
}


@pytest.mark.parametrize("split", SPLITS)
@unnamed_or_plain
def test_over_devices(split: str, implementation: Any) -> None:
    """Values and gradients, where either factor or both differ from device to device."""
    x, w = oracle.activations("float32", 0, 16, 136), oracle.matrix("float32", 1, 24, 136)
    of_x, of_w, of_y = SPLITS[split]

    def local(x: Any, w: Any) -> Any:
        y = multiply(x, w, implementation)
        return lax.psum(y, "x") if split == "inputs" else y

    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=(of_x, of_w), out_specs=of_y)
    oracle.close(jax.jit(over)(x, w), oracle.matmul(x, w), 1e-5)
    to_x, to_w = jax.jit(jax.grad(lambda x, w: over(x, w).sum(), (0, 1)))(x, w)
    oracle.close(to_x, np.broadcast_to(oracle.wide(w).sum(0), x.shape), 1e-5)
    oracle.close(to_w, np.broadcast_to(oracle.wide(x).sum(0), w.shape), 1e-5)


@pytest.mark.parametrize("kind", ["float32", "weight-only float32"])
@unnamed_or_plain
def test_in_loops(kind: str, implementation: Any) -> None:
    x, held = oracle.activations(kind, 0, 3, 17), oracle.matrix(kind, 1, 17, 17)
    step = lambda x, _: (multiply(x, held, implementation), None)
    scanned = jax.jit(lambda x: lax.scan(step, x, length=4)[0])(x)
    forward = lambda i_x: (i_x[0] + 1, multiply(i_x[1], held, implementation))
    looped = jax.jit(lambda x: lax.while_loop(lambda i_x: i_x[0] < 4, forward, (0, x))[1])(x)
    wanted = oracle.wide(x) @ np.linalg.matrix_power(oracle.worth(held).T, 4)
    oracle.close(scanned, wanted, 1e-5)
    oracle.close(looped, wanted, 1e-5)


def uses_kernel(x: Any, held: Any, platform: str = "cpu") -> bool:
    lowered = jax.jit(multiply).trace(x, held).lower(lowering_platforms=(platform,))
    return "pangu_matmul" in lowered.as_text()


@pytest.mark.parametrize("kind", [*KINDS, *oracle.INT4[4:6], *FP8])
def test_where_the_kernel_is_taken(kind: str) -> None:
    """On CPU, but for a single float32 row."""
    held, x = oracle.matrix(kind, 1, 9, 64), oracle.activations(kind, 0, 300, 64)
    assert uses_kernel(x, held)
    assert uses_kernel(x[:2], held)
    assert uses_kernel(x[:1], held) == (kind != "float32")
    assert not uses_kernel(x, held, "tpu")
    assert not uses_kernel(x, held, "cuda")
    with same_bits():
        assert uses_kernel(x[:1], held)


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("kind", [*FLOAT_KINDS, "weight-only float32"])
@unnamed_or_plain
def test_a_backward_pass_computes_no_product_again(
    kind: str, rows: int, implementation: Any
) -> None:
    """`model.Remat` "dots": it is XLA's products that are kept, so there are no others."""
    held, x = oracle.matrix(kind, 1, 17, 17), oracle.activations(kind, 0, rows, 17)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def loss(x: Any) -> Any:
        for _ in range(2):
            x = jnp.sin(multiply(x, held, implementation))
        return x.astype(jnp.float32).sum()

    text = jax.jit(jax.value_and_grad(loss)).lower(x).as_text()
    assert "pangu_matmul" not in text
    assert text.count("stablehlo.dot_general") == 4


@some_kinds
def test_without_kernels(kind: str, plain_xla: None) -> None:
    assert not uses_kernel(oracle.activations(kind, 0, 3, 17), oracle.matrix(kind, 1, 9, 17))
    for N in (1, 70):
        x, held = oracle.activations(kind, 0, N, 17), oracle.matrix(kind, 1, 9, 17)
        oracle.close(run(x, held), oracle.matmul(x, held), 1e-2 if "bf" in kind else 1e-5)


def test_by_name_what_it_cannot_do() -> None:
    f32, bf16, f16 = (jnp.ones((2, 3), dtype) for dtype in ("float32", "bfloat16", "float16"))
    for x, w in ((f16, f16), (bf16, f32), (f32, bf16), (f32[:0], f32), (f32, f32[:0])):
        with pytest.raises(NotImplementedError):
            matmul(x, w, implementation="native")
    with native.without(), pytest.raises(NotImplementedError):
        matmul(f32, f32, implementation="native")
    np.testing.assert_array_equal(matmul(f16, f16), 3)  # passed over
    assert matmul(f32[:0], f32).shape == (0, 2)
