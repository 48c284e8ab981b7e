"""The quantised leaf: packing, rounding, and its life as a pytree in a module."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pangu_jax.errors import ConfigError
from pangu_jax.quant import leaves, weight
from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight
from tests import layouts

SCHEMES = {
    "int8": Scheme("int8"),
    "w8a8": Scheme("int8", "dynamic"),
    "int4": Scheme("int4", group=4),
    "int4 whole": Scheme("int4", group=16),
    "fp8": Scheme("fp8", "dynamic"),
}
STATIC = Scheme("int8", "static")
OUT, D = (2, 3), 16

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
quantize = jax.jit(weight.quantize, static_argnames="scheme")
floats = jax.jit(Weight.floats, static_argnames="dtype")
pack, unpack = jax.jit(weight.pack), jax.jit(weight.unpack)


def matrix(seed: int, *shape: int) -> np.ndarray:
    """Rows, and groups within them, of very different sizes; one row is zeros."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
    wide *= np.repeat(10.0 ** rng.integers(-3, 3, (*shape[:-1], shape[-1] // 4)), 4, axis=-1)
    wide[(0,) * (len(shape) - 1)] = 0
    return wide.astype(np.float32)


def static(seed: int, *out: int, each: tuple[int, ...] = ()) -> Weight:
    """A matrix with static activations and as many fixed scales as `each` says."""
    rng = np.random.default_rng(seed)
    pad = (1,) * (len(out) + 1 - len(each))
    return Weight(
        scheme=STATIC,
        numbers=jnp.asarray(rng.integers(-128, 128, (*out, D)), jnp.int8),
        scale=jnp.asarray(rng.uniform(0.001, 0.1, (*out, 1)), jnp.float32),
        input_scale=jnp.asarray(rng.uniform(0.01, 1, (*each, *pad)), jnp.float32),
        offset=jnp.asarray(rng.integers(-128, 128, (*each, *pad)), jnp.int8),
        bias=jnp.asarray(rng.integers(-9999, 9999, (*out, 2)), jnp.int32),
    )


# --- two numbers in a byte


def test_all_pairs_of_numbers() -> None:
    pairs = np.array([*itertools.product(range(-8, 8), repeat=2)], np.int8)
    packed = pack(pairs)
    wanted = [(first + 8) + 16 * (second + 8) for first, second in pairs.tolist()]
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed[:, 0], wanted)
    again = unpack(packed)
    assert again.dtype == jnp.int8
    np.testing.assert_array_equal(again, pairs)


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_neighbours_share_a_byte(seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(-8, 8, (2, 3, 10), np.int8)
    packed = np.asarray(pack(numbers))
    np.testing.assert_array_equal(packed & 15, numbers[..., ::2] + 8)
    np.testing.assert_array_equal(packed >> 4, numbers[..., 1::2] + 8)
    np.testing.assert_array_equal(unpack(packed), numbers)


# --- rounding


def steps(wide: np.ndarray, scheme: Scheme) -> np.ndarray:
    """What a number of each element's row or group is worth."""
    size, largest = scheme.group or D, {"int8": 127, "int4": 7, "fp8": 448}[scheme.numbers]
    grouped = np.abs(wide.astype(np.float64)).reshape(*wide.shape[:-1], -1, size)
    return np.repeat(grouped.max(-1) / largest, size, axis=-1)


@every_scheme
def test_errors_of_every_element(scheme: Scheme) -> None:
    for seed in range(10):
        wide = matrix(seed, *OUT, D)
        got = np.asarray(floats(quantize(wide, scheme), dtype=jnp.float32), np.float64)
        step = steps(wide, scheme)
        bound = step / 2
        if scheme.numbers == "fp8":
            bound = np.maximum(np.abs(wide) * 2.0**-4, step * 2.0**-10)
        assert (np.abs(got - wide) <= bound * (1 + 1e-4)).all()
        assert not got[0, 0].any()


@every_scheme
def test_parts_and_shapes(scheme: Scheme) -> None:
    held = quantize(matrix(0, *OUT, D), scheme)
    width = D // 2 if scheme.group else D
    kind = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}[scheme.numbers]
    assert (held.numbers.shape, held.numbers.dtype) == ((*OUT, width), kind)
    scales = D // (scheme.group or D)
    assert (held.scale.shape, held.scale.dtype) == ((*OUT, scales), jnp.float32)
    assert (held.shape, held.ndim, held.scheme) == ((*OUT, D), 3, scheme)
    assert weight.nbytes(held) == 6 * width + 4 * 6 * scales
    assert len(jax.tree.leaves(held)) == 2


@every_scheme
def test_eager_and_compiled_are_the_same(scheme: Scheme) -> None:
    wide = matrix(1, *OUT, D)
    eager = weight.quantize(jnp.asarray(wide), scheme)
    for one, two in zip(*map(jax.tree.leaves, (eager, quantize(wide, scheme))), strict=True):
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint8), np.asarray(two).view(np.uint8)
        )


def test_bf16_matrices_are_rounded_as_float32() -> None:
    wide = jnp.asarray(matrix(2, *OUT, D), jnp.bfloat16)
    for scheme in SCHEMES.values():
        one, two = (quantize(x, scheme) for x in (wide, wide.astype(jnp.float32)))
        assert one.scale.dtype == jnp.float32
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), one, two
        )


@every_scheme
def test_floats_of_a_dtype_are_rounded_once(scheme: Scheme) -> None:
    held = quantize(matrix(3, *OUT, D), scheme)
    narrow, wide = (floats(held, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_a_group_has_a_scale_of_its_own() -> None:
    wide = np.float32([[7, -3.5, 0, 1, 0.7, -0.7, 0.04, 0, 0, 0, 0, 0, 700, -700, 49, 51]])
    held = quantize(wide, SCHEMES["int4"])
    np.testing.assert_allclose(held.scale, [[1, 0.1, 0, 100]], rtol=1e-6)
    first = unpack(held.numbers)[0]
    np.testing.assert_array_equal(first, [7, -4, 0, 1, 7, -7, 0, 0, 0, 0, 0, 0, 7, -7, 0, 1])


@pytest.mark.parametrize("group", [6, 32, 10])
def test_groups_that_do_not_divide_the_inputs_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {group} do not divide {D} inputs"):
        weight.quantize(jnp.zeros((2, D)), Scheme("int4", group=group))


def test_static_scales_come_from_calibration() -> None:
    with pytest.raises(ValueError, match="calibrated"):
        weight.quantize(jnp.zeros((2, D)), STATIC)


@pytest.mark.parametrize("each", [(), (2,)], ids=["for all", "for each expert"])
def test_floats_with_static_activations(each: tuple[int, ...]) -> None:
    """A unit of the integer result is an input's times a weight's."""
    held = static(0, *OUT, each=each)
    scale, of_input = (np.asarray(x, np.float64) for x in (held.scale, held.input_scale))
    wanted = np.asarray(held.numbers) * (scale / of_input)
    np.testing.assert_allclose(floats(held, dtype=jnp.float32), wanted, rtol=1e-6)


# --- in place of a float leaf


def test_flat_has_the_same_floats() -> None:
    for held in [quantize(matrix(0, *OUT, D), s) for s in SCHEMES.values()] + [static(1, *OUT)]:
        flat = held.flat()
        assert (flat.shape, flat.scheme) == ((6, D), held.scheme)
        wanted = np.asarray(floats(held, dtype=jnp.float32)).reshape(6, D)
        np.testing.assert_array_equal(floats(flat, dtype=jnp.float32), wanted)
    assert flat.bias is not None
    assert flat.bias.shape == (6, 2)
    assert flat.input_scale.shape == flat.offset.shape == ()


def test_only_the_whole_can_be_taken() -> None:
    held = static(0, *OUT)
    assert held[...] is held
    for index in (0, slice(None), (..., 0), None):
        with pytest.raises(TypeError, match=r"\[\.\.\.\]"):
            held[index]


def test_schemes_are_part_of_the_structure() -> None:
    held = [quantize(matrix(0, *OUT, D), SCHEMES[name]) for name in ("int8", "w8a8")]
    one, two = map(jax.tree.structure, held)
    assert one != two
    assert jax.tree.unflatten(two, jax.tree.leaves(held[0])).scheme == SCHEMES["w8a8"]


class Layer(nnx.Module):
    def __init__(self, held: Any):
        self.held = nnx.Param(held)


@every_scheme
def test_layers_scan_over_a_stacked_leaf(scheme: Scheme) -> None:
    wide = matrix(4, 5, *OUT, D)
    stacked = Layer(quantize(wide, scheme))
    assert stacked.held.shape == wide.shape

    @jax.jit
    def all_floats(layers: Layer) -> Any:
        def step(count: Any, layer: Layer) -> Any:
            held = layer.held[...]
            assert (held.shape, held.scheme) == ((*OUT, D), scheme)
            return count + 1, held.floats(jnp.float32)

        return lax.scan(step, 0, layers)

    count, found = all_floats(stacked)
    assert count == 5
    for layer in range(5):
        own = quantize(wide[layer], scheme)
        np.testing.assert_array_equal(found[layer], floats(own, dtype=jnp.float32))


def test_a_modules_leaves_have_the_names_of_parts() -> None:
    layer = Layer(static(0, *OUT))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(layer)[0]]
    last = [jax.tree_util.keystr(path[-1:], simple=True) for path in paths]
    assert sorted(last) == sorted(leaves.PARTS)
    assert jax.tree.map(lambda x: x, layer).held[...].scheme == STATIC


# --- the abstract leaf


def place(*spec: Any) -> NamedSharding:
    return NamedSharding(layouts.named("tp8").make_mesh(jax.devices()), PartitionSpec(*spec))


@every_scheme
def test_the_abstract_leaf_is_what_quantize_makes(scheme: Scheme) -> None:
    like = jax.ShapeDtypeStruct((*OUT, D), jnp.bfloat16, sharding=place())
    made = jax.eval_shape(lambda x: weight.quantize(x, scheme), like)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(leaves.abstract(like, scheme, 0, "mlp.down")) == shapes(made)


def test_places_of_a_leaf_split_over_its_inputs() -> None:
    axes = ("data", "x", "y")
    like = jax.ShapeDtypeStruct((4, 6, 64), jnp.float32, sharding=place(None, None, axes))
    parts = lambda scheme, each=0: leaves.abstract(like, scheme, each, "mlp.down")
    spec = lambda leaf: tuple(leaf.sharding.spec)
    int4, int8, fixed = parts(Scheme("int4", group=8)), parts(Scheme("int8")), parts(STATIC, 1)
    assert spec(int4.numbers) == spec(int4.scale) == (None, None, axes)
    assert int4.scale.shape == (4, 6, 8)
    assert spec(int8.numbers) == (None, None, axes)
    assert spec(int8.scale) == (None, None, None)
    assert (fixed.bias.shape, spec(fixed.bias)) == ((4, 6, 8), (None, None, axes))
    assert fixed.input_scale.shape == fixed.offset.shape == (4, 1, 1)
    with pytest.raises(ConfigError, match=r"mlp\.down: 64 inputs in groups of 16 cannot be split"):
        parts(Scheme("int4", group=16))


@pytest.mark.parametrize("part", leaves.PARTS)
def test_parts_of_leaf_names(part: str) -> None:
    for leaf in ("blocks.0.attention.qkv", "blocks.11.mlp.shared.gate_up", "blocks.2.mlp.down"):
        assert leaves.split(f"{leaf}.{part}") == (leaf, part)
        assert leaves.split(leaf) == (leaf, None)
    for leaf in ("blocks.0.attention.cache_scale", "blocks.0.mlp.router_scale", "norm.weight"):
        assert leaves.split(leaf) == (leaf, None)
