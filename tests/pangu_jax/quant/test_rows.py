"""Rounding against NumPy.

XLA may divide by a constant with its reciprocal, which moves a scale by its last bit: where scales
are wanted exactly, rows' largest are 127 times a power of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_jax.quant import rows

FP8 = ml_dtypes.float8_e4m3fn
LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
SHAPE = (6, 8)

quantize = jax.jit(rows.quantize, static_argnames="kind")
to_numbers = jax.jit(rows.to_numbers, static_argnames="kind")
dequantize = jax.jit(rows.dequantize, static_argnames="dtype")

# Beside a largest above 2^-118 scales are normal floats; CPUs are told to flush the others.
sizes = st.floats(2.0**-100, 2.0**120, width=32)
usual = st.one_of(st.just(0.0), sizes, sizes.map(lambda x: -x))
near = st.floats(-1, 1, width=32).map(lambda x: 0.0 if abs(x) < 2.0**-100 else x)
a_row = st.one_of(
    st.lists(usual, min_size=8, max_size=8),
    st.lists(near, min_size=8, max_size=8),
    st.lists(st.sampled_from([0.5, 1.0, -1.0, 1.5, -2.5, 127.0]), min_size=8, max_size=8),
)
some_rows = st.lists(a_row, min_size=6, max_size=6).map(lambda x: np.array(x, np.float32))
kinds = st.sampled_from(["int8", "int4", "float8_e4m3fn"])


def rounded(x: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    ratio = x / np.where(scale > 0, scale, np.float32(1))
    if kind == "float8_e4m3fn":
        return np.clip(ratio, -448, 448).astype(FP8)
    return np.clip(np.round(ratio), -LARGEST[kind], LARGEST[kind]).astype(np.int8)


def with_round_scales(seed: int, *shape: int) -> np.ndarray:
    """Rows whose largest is 127 times a power of two."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, shape)
    x[..., 0] = rng.choice([-1, 1], shape[:-1])
    return (x * 127 * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))).astype(np.float32)


def same(got: Any, wanted: np.ndarray) -> None:
    """Equal bit by bit."""
    got = np.asarray(got)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


@settings(max_examples=100)
@given(some_rows, kinds)
def test_numbers_and_scales_are_numpys(x: np.ndarray, kind: str) -> None:
    numbers, scale = map(np.asarray, quantize(x, kind))
    exact = np.abs(x).max(-1, keepdims=True).astype(np.float64) / LARGEST[kind]
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, exact, rtol=2.0**-22)
    same(numbers, rounded(x, scale, kind))


@settings(max_examples=100)
@given(some_rows, kinds)
def test_errors_are_as_small_as_promised(x: np.ndarray, kind: str) -> None:
    numbers, scale = quantize(x, kind)
    left = np.asarray(dequantize(numbers, scale, jnp.float32), np.float64) - x
    bound = np.asarray(scale, np.float64) / 2
    if kind == "float8_e4m3fn":
        bound = np.maximum(np.abs(x) * 2.0**-4, np.asarray(scale) * 2.0**-10)
    assert (np.abs(left) <= bound * (1 + 1e-4)).all()


def test_bit_for_bit() -> None:
    x = with_round_scales(0, 300, 64)
    numbers, scale = quantize(x)
    wanted = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    same(scale, wanted)
    same(numbers, rounded(x, wanted, "int8"))
    assert np.asarray(numbers).min() == -127  # never -128


def test_halves_go_to_the_even_number() -> None:
    halves = np.arange(-127, 127) + 0.5
    x = np.array([[*halves, 127]], np.float32)
    numbers, scale = quantize(x)
    assert scale == 1
    np.testing.assert_array_equal(numbers[0, :-1], np.round(halves))
    assert not (np.asarray(numbers)[0, :-1] % 2).any()
    np.testing.assert_array_equal(
        quantize(np.float32([[0.5, 1.5, 2.5, -7]]), "int4")[0][0, :3], [0, 2, 2]
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_floats_are_rounded_as_float32(dtype: Any) -> None:
    x = with_round_scales(1, *SHAPE) / 2.0**20
    x = x.astype(dtype)
    for got, wanted in zip(quantize(x), quantize(x.astype(np.float32)), strict=True):
        same(got, np.asarray(wanted))


@pytest.mark.parametrize("kind", LARGEST)
def test_rows_of_zeros(kind: str) -> None:
    x = np.zeros(SHAPE, np.float32)
    x[0, 0], x[1] = 3, -0.0
    numbers, scale = (np.asarray(part, np.float32) for part in quantize(x, kind))
    assert not numbers[1:].any()
    assert not scale[1:].any()
    assert numbers[0, 0] == LARGEST[kind]


@pytest.mark.parametrize("kind", LARGEST)
def test_rows_are_on_their_own_whatever_the_axes_before(kind: str) -> None:
    x = with_round_scales(2, *SHAPE)
    flat = quantize(x, kind)
    numbers, scale = quantize(x.reshape(2, 3, 8), kind)
    same(numbers, np.asarray(flat[0]).reshape(2, 3, 8))
    same(scale, np.asarray(flat[1]).reshape(2, 3, 1))


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("largest", [1e-30, 1e-37, 1e-40, 1e-45, 1e30, 3.4e38])
def test_huge_and_tiny_rows_stay_finite(kind: str, largest: float) -> None:
    """Scales that are no normal floats may be flushed to zero, and the row with them."""
    x = np.zeros(SHAPE, np.float32)
    x[:] = np.float64(largest) * np.linspace(-1, 1, 8)
    left = np.asarray(dequantize(*quantize(x, kind), jnp.float32), np.float64)
    step = 2.0**-4 if kind == "float8_e4m3fn" else 0.51 / LARGEST[kind]
    assert np.abs(left - x).max() <= max(largest * step, LARGEST[kind] * 2.0**-126)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damage_shows_and_stays_in_its_row(bad: float) -> None:
    x = with_round_scales(3, *SHAPE)
    x[2, 3] = bad
    left = np.asarray(dequantize(*quantize(x), jnp.float32))
    assert not np.isfinite(left[2]).any()
    assert np.isfinite(np.delete(left, 2, 0)).all()


def every_bf16() -> np.ndarray:
    """All finite ones, and their float32 neighbours: fp8 numbers, halves between them, and a bit
    beside.
    """
    patterns = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array([0, 1, 0xFFFF])
    x = patterns.astype(np.uint32).view(np.float32).ravel()
    return x[np.isfinite(x)]


def test_fp8_is_that_of_ml_dtypes() -> None:
    x = every_bf16()
    same(to_numbers(x, "float8_e4m3fn"), np.clip(x, -448, 448).astype(FP8))


def test_what_is_out_of_range_is_cut() -> None:
    x = np.float32([-np.inf, -3e38, -128, 127.5, 449, 1e10, np.inf])
    np.testing.assert_array_equal(to_numbers(x, "int8"), [-127, -127, -127, 127, 127, 127, 127])
    np.testing.assert_array_equal(to_numbers(x, "int4"), [-7, -7, -7, 7, 7, 7, 7])
    got = np.asarray(to_numbers(x, "float8_e4m3fn"), np.float32)
    np.testing.assert_array_equal(got, [-448, -448, -128, 128, 448, 448, 448])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_numbers_are_worth(dtype: Any) -> None:
    numbers = np.arange(-64, 64, dtype=np.int8).reshape(4, 32)
    scale = np.float32([[1], [0.3], [0], [1e30]])
    got = dequantize(numbers, scale, jnp.dtype(dtype))
    same(got, (numbers.astype(np.float32) * scale).astype(dtype))
