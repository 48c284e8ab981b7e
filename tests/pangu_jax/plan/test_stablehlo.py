"""Collectives of lowered programs, counted by hand: two by four devices, none of them here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pangu_jax.plan import stablehlo
from pangu_jax.plan.hlo import Traffic

SIZES = {"x": 2, "y": 4}
MESH = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
BOTH = PartitionSpec(("x", "y"))


def count(local: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> dict[str, Traffic]:
    """Of a program whose arguments and results are split along their first axis by all devices."""
    run = jax.shard_map(local, mesh=MESH, in_specs=BOTH, out_specs=BOTH)
    return stablehlo.traffic(jax.jit(run).trace(*shapes).lower(lowering_platforms=("cpu",)), SIZES)


def grid(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An argument of which each of the eight devices has an eighth."""
    return jax.ShapeDtypeStruct((8 * shape[0], *shape[1:]), dtype)


def varying(x: jax.Array, *axes: str) -> jax.Array:
    return lax.pcast(x, axes, to="varying")


def test_a_program_without_collectives() -> None:
    assert count(lambda x: x * 2, grid(3, 5)) == {}


@pytest.mark.parametrize(
    ("axes", "received"),
    # Of 3 x 5 float32: a device gets every other rank's 60 bytes.
    [("x", 60), ("y", 3 * 60), (("x", "y"), 7 * 60)],
)
def test_all_gather(axes: Any, received: int) -> None:
    gather = lambda x: lax.all_gather(x, axes, axis=0, tiled=True)
    assert count(gather, grid(3, 5)) == {"all-gather": Traffic(1, received)}


@pytest.mark.parametrize(
    ("axes", "received"),
    # Of 8 x 5 float32: around the ring twice, all but one part of 160 bytes each time.
    [("x", 160), ("y", 240), (("x", "y"), 280)],
)
def test_all_reduce(axes: Any, received: int) -> None:
    names = (axes,) if isinstance(axes, str) else axes
    reduce = lambda x: varying(lax.psum(x, axes), *names)
    assert count(reduce, grid(8, 5)) == {"all-reduce": Traffic(1, received)}


@pytest.mark.parametrize(
    ("axes", "received"),
    # Of 8 x 5 float32: the other ranks' sums of this device's part.
    [("x", 80), ("y", 3 * 40), (("x", "y"), 7 * 20)],
)
def test_reduce_scatter(axes: Any, received: int) -> None:
    scatter = lambda x: lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)
    assert count(scatter, grid(8, 5)) == {"reduce-scatter": Traffic(1, received)}


def test_all_to_all() -> None:
    swap = lambda x: lax.all_to_all(x, "y", split_axis=0, concat_axis=1, tiled=True)
    assert count(swap, grid(8, 5)) == {"all-to-all": Traffic(1, 3 * 40)}


def test_a_permutation() -> None:
    around = lambda x: lax.ppermute(x, "y", [(i, (i + 1) % 4) for i in range(4)])
    assert count(around, grid(8, 5)) == {"collective-permute": Traffic(1, 160)}


def test_a_function_counts_as_often_as_it_is_called() -> None:
    add = jax.jit(lambda x: varying(lax.psum(x, "y"), "y"))
    assert count(lambda x: x + add(2 * add(x)), grid(8, 5)) == {"all-reduce": Traffic(2, 480)}


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bfloat16", 2), ("float16", 2), ("int8", 1), ("int32", 4), ("bool", 1), ("uint8", 1)],
)
def test_sizes_of_numbers(dtype: str, size: int) -> None:
    gather = lambda x: lax.all_gather(x, "y", axis=0, tiled=True)
    assert count(gather, grid(3, 5, dtype=dtype)) == {"all-gather": Traffic(1, 3 * 15 * size)}


def test_a_single_number() -> None:
    assert count(lambda x: x + lax.psum(x.sum(), ("x", "y")), grid(3)) == {
        "all-reduce": Traffic(1, 7)
    }


def test_several_kinds_add_up() -> None:
    def local(x: jax.Array) -> jax.Array:
        for axis in ("x", "y"):
            x = lax.all_gather(x, axis, axis=0, tiled=True)  # 4 x 4 bytes, then 3 x 8 x 4 bytes
        for axis in ("x", "y"):
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)  # 64, then 3 x 16 bytes
        return x

    assert count(local, grid(4)) == {
        "all-gather": Traffic(2, 16 + 96),
        "reduce-scatter": Traffic(2, 64 + 48),
    }


def test_a_loops_body_counts_once() -> None:
    def local(x: jax.Array) -> jax.Array:
        step = lambda x, _: (varying(lax.psum(x, "y"), "y"), None)
        return lax.scan(step, x, None, length=5)[0]

    assert count(local, grid(8, 5)) == {"all-reduce": Traffic(1, 240)}
