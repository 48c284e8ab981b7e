"""Products with quantised matrices against NumPy.

Integer results are wanted bit by bit. Rows' largest are then 127 times a power of two: their scales
are the same however 127 is divided by.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, PartitionSpec

from pangu_jax.linear import linear
from pangu_jax.precision import exact_if_float32
from pangu_jax.quant import product, weight
from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight
from tests import layouts
from tests.pangu_jax.quant.integers import STATIC, fixed, of_rows, rounded, same, static

W8A8, W8, FP8 = Scheme("int8", "dynamic"), Scheme("int8"), Scheme("fp8", "dynamic")
W4 = Scheme("int4", group=16)
WEIGHT_ONLY = {"int8": W8, "int4": W4, "fp8": Scheme("fp8")}
OUT, D = (2, 3), 64
BF16 = ml_dtypes.bfloat16

# Of few rows some are special on CPU: one alone, and up to twelve of float activations.
COUNTS = [1, 2, 3, 20]
every_count = pytest.mark.parametrize("N", COUNTS)

run = jax.jit(product.linear, static_argnames="dtype")
quantize = jax.jit(weight.quantize, static_argnames="scheme")
unrounded = jax.jit(lambda held: held.floats(jnp.float32))


def matrix(seed: int, *shape: int) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def rows_of(seed: int, N: int, width: int = D) -> np.ndarray:
    """Activations whose largest is 127 times a power of two in each row."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (N, width))
    x[np.arange(N), rng.integers(0, width, N)] = rng.choice([-1, 1], N)
    return (x * 127 * 2.0 ** rng.integers(-9, 3, (N, 1))).astype(np.float32)


def floats(held: Weight) -> np.ndarray:
    return np.asarray(unrounded(held), np.float64).reshape(-1, held.shape[-1])


def dynamic(x: np.ndarray, held: Weight) -> np.ndarray:
    (numbers, scale), (of_weight, of_out) = rounded(x), of_rows(held)
    sums = (numbers.astype(np.int64) @ of_weight.T).astype(np.float32)
    return (sums * scale * of_out).reshape(len(x), *held.shape[:-1])


# --- integers times integers


@every_count
def test_dynamic_is_exact_integers_scaled_once(N: int) -> None:
    held = quantize(matrix(0, *OUT, D), W8A8)
    for seed in range(5):
        x = rows_of(seed, N)
        same(run(x, held), dynamic(x, held))


@every_count
def test_sums_beyond_24_bits_are_exact(N: int) -> None:
    """Float32 sums of such numbers would be rounded on the way."""
    signs = np.random.default_rng(0).choice([-1, 1], (6, 4096))
    numbers = np.where(signs > 0, 127, -127 + np.arange(6)[:, None]).astype(np.int8)
    held = Weight(scheme=W8A8, numbers=jnp.asarray(numbers), scale=jnp.ones((6, 1)))
    x = np.roll(signs[np.arange(N) % 6], 1, axis=1) * np.float32(127)
    x[0] = 127 * signs[0]
    assert abs(rounded(x)[0].astype(np.int64) @ of_rows(held)[0].T).max() > 2**25
    same(run(x.astype(np.float32), held), dynamic(x, held))


def test_a_rows_result_does_not_depend_on_the_others() -> None:
    held, x = quantize(matrix(0, *OUT, D), W8A8), np.float32(matrix(1, 20, D))
    whole = np.asarray(run(x, held))
    for N in COUNTS:
        same(run(x[:N], held), whole[:N])


@every_count
def test_static_is_the_published_formula(N: int) -> None:
    rng = np.random.default_rng(N)
    for seed in range(5):
        held = static(seed, *OUT)
        x = rng.normal(size=(N, D)).astype(np.float32)
        x[0, :4] = 1e30, -1e30, 127.5, 0  # most are within range, these are cut at both ends
        numbers = np.asarray(product.static_numbers(jnp.asarray(x), held.flat()))
        assert (numbers.min(), numbers.max()) == (-128, 127)
        same(run(x, held), fixed(x, held))


def test_static_numbers_are_rounded_before_they_are_offset() -> None:
    """And halves go to the even number: rounded after an odd offset they would not."""
    held = static(0, *OUT)
    parts = dict(input_scale=jnp.float32(0.5), offset=jnp.int8(-3), bias=held.bias)
    held = Weight(scheme=STATIC, numbers=held.numbers, scale=held.scale, **parts)
    x = np.resize(np.arange(-70, 70) / 4, (3, D)).astype(np.float32)
    wanted = np.clip(np.round(x * 2) - 3, -128, 127)
    np.testing.assert_array_equal(product.static_numbers(jnp.asarray(x), held), wanted)
    same(run(x, held), fixed(x, held))


# --- float activations


def bound_in_digits(x: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """2^-23 of a row's largest for every input, and float32 sums."""
    x, wide = (np.abs(part).astype(np.float64) for part in (x, wide))
    return x.max(-1, keepdims=True) * 2.0**-23 * wide.sum(-1) + 1e-6 * (x @ wide.T)


@pytest.mark.parametrize("N", [1, product.DIGIT_ROWS, product.DIGIT_ROWS + 1])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_weight_only_is_the_float_product(scheme: Scheme, N: int) -> None:
    held = quantize(matrix(2, *OUT, D), scheme)
    for seed in range(3):
        x, wide = matrix(seed, N, D), floats(held)
        error = np.asarray(run(x, held)).reshape(N, -1) - x.astype(np.float64) @ wide.T
        assert (np.abs(error) <= 1e-6 * (np.abs(x) @ np.abs(wide).T)).all()


@pytest.mark.parametrize("N", [1, 12])
@pytest.mark.parametrize("largest", [1e2, 1e4, 1e6])
def test_few_rows_beside_an_outlier(N: int, largest: float) -> None:
    held, x = quantize(matrix(2, *OUT, D), W8), matrix(3, N, D)
    x[:, 5] = 0.05 * largest
    error = np.asarray(run(x, held)).reshape(N, -1) - x.astype(np.float64) @ floats(held).T
    assert (np.abs(error) <= bound_in_digits(x, floats(held))).all()


@pytest.mark.parametrize("N", [1, 3, 20])
@pytest.mark.parametrize("scheme", [W8, Scheme("fp8")], ids=["int8", "fp8"])
def test_bf16_activations_meet_unrounded_weights(scheme: Scheme, N: int) -> None:
    """Numbers fit bf16, and are scaled after the product."""
    held, x = quantize(matrix(4, *OUT, D), scheme), matrix(5, N, D).astype(BF16)
    error = np.asarray(run(x, held, jnp.float32)).reshape(N, -1) - np.float64(x) @ floats(held).T
    assert (np.abs(error) <= 1e-6 * (np.abs(np.float64(x)) @ np.abs(floats(held)).T)).all()


@pytest.mark.parametrize("scheme", [W8A8, W8, W4, FP8, STATIC], ids=lambda s: s.numbers)
def test_dtypes(scheme: Scheme) -> None:
    """The result is rounded once, to x's dtype or the one asked for."""
    held = static(0, *OUT) if scheme is STATIC else quantize(matrix(4, *OUT, D), scheme)
    x = rows_of(5, 3).astype(BF16)
    narrow, wide = run(x, held), run(x, held, jnp.float32)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    assert narrow.shape == wide.shape == (3, *OUT)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    if scheme.activations != "float":  # which rounds x's dtype to itself
        same(wide, np.asarray(run(x.astype(np.float32), held)))
    same(
        run(x.astype(np.float32), held, jnp.bfloat16),
        np.asarray(run(x.astype(np.float32), held)).astype(BF16),
    )


def test_linear_takes_either_kind() -> None:
    held, x = quantize(matrix(0, *OUT, D), W8A8), rows_of(0, 3)
    same(jax.jit(linear)(x, held), dynamic(x, held))
    assert jax.jit(linear)(x, floats(held).astype(np.float32).reshape(*OUT, D)).shape == (3, *OUT)


# --- what rounding costs


def half_steps(x: np.ndarray, numbers: str, group: int | None = None) -> np.ndarray:
    """How far rounding may move each element."""
    x = np.abs(x.astype(np.float64))
    grouped = x.reshape(len(x), -1, group or x.shape[-1])
    step = np.repeat(grouped.max(-1), grouped.shape[-1], -1)
    if numbers == "fp8":
        return np.maximum(x * 2.0**-4, step / 448 * 2.0**-10)
    return step / {"int8": 127, "int4": 7}[numbers] / 2


@pytest.mark.parametrize(
    "scheme", [W8A8, W8, W4, FP8, Scheme("fp8")], ids=lambda s: f"{s.numbers}-{s.activations}"
)
def test_errors_are_within_half_steps(scheme: Scheme) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        w = matrix(seed, *OUT, D) * rng.choice([1, 1, 1, 30], (*OUT, D)).astype(np.float32)
        x = matrix(seed + 1, 3, D) * rng.choice([1, 1, 1, 300], (3, D)).astype(np.float32)
        flat = w.reshape(-1, D)
        of_w = half_steps(flat, scheme.numbers, scheme.group)
        of_x = half_steps(x, scheme.numbers) if scheme.activations == "dynamic" else 0 * x
        wanted = np.float64(x) @ np.float64(flat).T
        bound = np.abs(x) @ of_w.T + of_x @ (np.abs(flat) + of_w).T
        bound += 1e-6 * np.abs(x).max(-1, keepdims=True) * np.abs(flat).sum(-1)
        assert (
            np.abs(np.asarray(run(x, quantize(w, scheme))).reshape(3, -1) - wanted) <= bound
        ).all()


def extremes() -> np.ndarray:
    """Six rows: zeros, tiny, huge, subnormal, all of these together, usual."""
    rng, x = np.random.default_rng(0), np.zeros((6, D))
    for i, size in enumerate((0, 1e-30, 1e30, 1e-40)):
        x[i] = size * rng.uniform(-1, 1, D)
    x[4] = np.resize(x[:4, 0], D)
    x[5] = rng.uniform(-1, 1, D)
    return x.astype(np.float32)


@pytest.mark.parametrize("N", [6, 18])
@pytest.mark.parametrize("scheme", [W8A8, W8, W4, FP8, Scheme("fp8")], ids=str)
def test_extreme_rows(scheme: Scheme, N: int) -> None:
    held, x = quantize(matrix(6, *OUT, D), scheme), np.resize(extremes(), (N, D))
    y = np.asarray(run(x, held)).reshape(N, -1)
    assert np.isfinite(y).all()
    assert not y[0].any()
    assert np.abs(y[3]).max() < 1e-36
    close = 0.05 if scheme.activations == "dynamic" else 1e-6
    wide = floats(held)
    for i in (1, 2, 4, 5):
        error = y[i] - np.float64(x[i]) @ wide.T
        assert (np.abs(error) <= close * (np.abs(np.float64(x[i])) @ np.abs(wide).T)).all()


def test_extreme_rows_with_static_activations() -> None:
    held, x = static(0, *OUT), extremes()
    same(run(x, held), fixed(x, held))


@pytest.mark.parametrize("N", [6, 18])
def test_rows_and_matrices_of_zeros(N: int) -> None:
    w = matrix(0, *OUT, D)
    w[0, 1] = 0
    for scheme in (W8A8, W8, W4, FP8):
        y = np.asarray(run(np.ones((N, D), np.float32), quantize(w, scheme)))
        assert np.isfinite(y).all()
        assert not y[:, 0, 1].any()
        assert y[:, 1].all()


# --- gradients, loops


class Layer(nnx.Module):
    def __init__(self, held: Any):
        self.held = nnx.Param(held)


GRADIENTS = {"w8a8": W8A8, "w8a16": W8, "w4a16": W4, "fp8": FP8, "static": STATIC}


@pytest.mark.parametrize("scheme", GRADIENTS.values(), ids=GRADIENTS)
def test_the_gradient_is_the_float_matrixs(scheme: Scheme) -> None:
    held = static(0, *OUT) if scheme is STATIC else quantize(matrix(7, *OUT, D), scheme)
    x, pull = matrix(8, 3, D), matrix(9, 3, *OUT)
    loss = lambda x, held: (product.linear(x, held) * pull).sum()
    to_x, to_held = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, held)
    layouts.close(to_x, pull.reshape(3, -1) @ floats(held))
    assert jax.tree.structure(to_held) == jax.tree.structure(held)
    for leaf in jax.tree.leaves(to_held):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=str)
def test_the_gradient_of_bf16_rows_is_bf16(dtype: Any) -> None:
    held, x = quantize(matrix(7, *OUT, D), W8), matrix(8, 3, D).astype(BF16)
    loss = lambda x: product.linear(x, held, dtype).astype(jnp.float32).sum()
    got = jax.jit(jax.grad(loss))(x)
    assert got.dtype == jnp.bfloat16
    wanted = np.tile(floats(held).sum(0), (3, 1))
    np.testing.assert_allclose(np.float32(got), wanted, atol=2.0**-8 * np.abs(floats(held)).sum())


@pytest.mark.parametrize("N", [1, 3])
def test_a_scan_of_checkpointed_layers(N: int) -> None:
    """Of a module with a stacked leaf: values and gradient are those of a loop in NumPy."""
    stack, x = quantize(matrix(10, 3, D, D), W8), matrix(11, N, D)
    wide = np.asarray(unrounded(stack), np.float64)

    @jax.checkpoint
    def layer(x: Any, layer: Layer) -> Any:
        return x + linear(x, layer.held[...])

    def loss(x: Any, layers: Layer) -> Any:
        y, _ = lax.scan(lambda x, own: (layer(x, own), None), x, layers)
        return y.sum(), y

    (_, y), to_x = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, Layer(stack))
    wanted, pull = np.float64(x), np.ones((N, D))
    for w in wide:
        wanted = wanted + wanted @ w.T
    for w in wide[::-1]:
        pull = pull + pull @ w
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    np.testing.assert_allclose(to_x, pull, atol=1e-5)


def programs_products(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every product in a program and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from programs_products(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from programs_products(inner)


@pytest.mark.parametrize("scheme", GRADIENTS.values(), ids=GRADIENTS)
def test_a_float32_models_gradient_is_full_precision(scheme: Scheme) -> None:
    """Its backward pass is traced when the forward's request for precision is over."""
    held = static(0, *OUT) if scheme is STATIC else quantize(matrix(7, *OUT, D), scheme)

    def loss(x: Any, held: Any) -> Any:
        with exact_if_float32(x.dtype):
            return linear(x, held).sum()

    program = jax.make_jaxpr(jax.grad(loss))(jnp.ones((20, D)), held)
    of_floats = [
        e for e in programs_products(program.jaxpr) if e.invars[0].aval.dtype == jnp.float32
    ]
    assert of_floats
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert [e.params["precision"] for e in of_floats] == [highest] * len(of_floats)


def test_devices_that_share_the_inputs_add_their_parts() -> None:
    """Of static activations the first alone has the bias; a row's numbers are the same on all."""
    held, x = static(0, *OUT), matrix(8, 3, D) * 10
    bias = np.zeros((*OUT, 4), np.int32)
    bias[..., 0] = np.asarray(held.bias).sum(-1)
    held = dataclasses.replace(held, bias=jnp.asarray(bias))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    last, whole = PartitionSpec(None, None, "x"), PartitionSpec()
    places = jax.tree_util.tree_map_with_path(
        lambda path, _: last if path[0].name in ("numbers", "bias") else whole, held
    )
    part = lambda x, held: lax.psum(product.linear(x, held), "x")
    over = jax.shard_map(
        part, mesh=mesh, in_specs=(PartitionSpec(None, "x"), places), out_specs=whole
    )
    wanted = fixed(x, held)
    np.testing.assert_allclose(jax.jit(over)(x, held), wanted, atol=1e-6 * np.abs(wanted).max())


# --- programs


def program(scheme: Scheme, N: int, dtype: Any, rows: int = 512, width: int = 256) -> Any:
    w = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    held = jax.eval_shape(lambda w: weight.quantize(w, scheme), w)
    return jax.jit(product.linear).lower(jax.ShapeDtypeStruct((N, width), dtype), held)


@pytest.mark.parametrize(
    ("scheme", "N", "rows"),
    [(W8A8, 1, 2), (W8A8, 20, 20), (W8, 1, 3), (W8, 12, 36)],
    ids=["w8a8-1", "w8a8-20", "w8a16-1", "w8a16-12"],
)
def test_integers_are_multiplied_as_such_on_cpu(
    scheme: Scheme, N: int, rows: int, plain_xla: None
) -> None:
    """Few rows of float activations too; nothing makes a wider copy of the numbers."""
    lowered = program(scheme, N, jnp.bfloat16)
    wanted = rf"dot_general.*tensor<{rows}x256xi8>, tensor<512x256xi8>.*tensor<{rows}x512xi32>"
    assert re.search(wanted, lowered.as_text())
    compiled = lowered.compile()
    text = compiled.as_text()
    dots = re.findall(r"= (\w+)\[[\d,]*\]\S* dot\(", text)
    assert set(dots) == {"s32"}
    assert not re.search(r"= (f32|bf16|f16|s32|s16)\[(512,256|256,512)\]", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256


def test_on_other_platforms_one_row_stays_one() -> None:
    """And float activations are no digits."""
    rows = {}
    for scheme in (W8A8, W8):
        held = jax.eval_shape(lambda w, s=scheme: weight.quantize(w, s), jnp.zeros((6, D)))
        arguments = jax.ShapeDtypeStruct((1, D), jnp.float32), held
        text = (
            jax.jit(product.linear).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        )
        rows[scheme] = re.findall(r"dot_general.*: \((tensor<\w+>), tensor<\w+>\)", text)
    assert rows == {W8A8: [f"tensor<1x{D}xi8>"], W8: [f"tensor<1x{D}xf32>"]}


# --- whatever the numbers


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 3]), st.integers(-30, 30))
def test_a_power_of_two_goes_through(seed: int, N: int, power: int) -> None:
    """Scaling all of x scales the result, bit by bit; so does changing its sign."""
    held, x = quantize(matrix(0, *OUT, D), W8A8), matrix(seed, N, D)
    y = np.asarray(run(x, held))
    factor = np.float32(2.0**power)
    np.testing.assert_array_equal(run(x * factor, held), y * factor)
    np.testing.assert_array_equal(run(-x, held), -y)
