"""Where tokens cross devices.

Each replica of attention (`Layout.attention.batch`) has sequences of its own, N flat tokens. What
the residual stream of a device holds of them is the choice of a boundary:

    all_reduce    all N, the same on every rank of the heads' axes: the baseline
    flashcomm1    N / ranks of the heads' axes, padded: each does the token-wise work of its own

A module whose weights are split over some axes needs the tokens of all their ranks, and returns
partial sums of them:

    x = x + leave(module(enter(norm(x), axes)), axes)

    all_reduce    enter gathers over replicas only; leave sums on every rank, and keeps its own
    flashcomm1    enter is one all-gather, leave one reduce-scatter

(all-reduce = reduce-scatter + all-gather, the second one moved behind the next norm; facts of
FlashComm 1.) Over axes of size one nothing moves, and nothing is emitted. Everything here runs
under `shard_map`; N is the same on every device.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from pangu_jax.parallel.layout import Axes, Layout
from pangu_jax.quant import rows


def enter(
    x: Float[Array, "shard D"], axes: Axes, where: Layout, *, exact: bool = False
) -> Float[Array, "N D"]:
    """The tokens of all ranks along `axes`, in the order of the stream.

    exact: whatever `Boundary.gather` says
    """
    if where.boundary.gather == "int8" and not exact:
        return _gather_int8(x, _shared(axes, where)) if _shared(axes, where) else x
    return gather(x, axes, where)


def gather(x: Shaped[Array, "shard ..."], axes: Axes, where: Layout) -> Shaped[Array, "N ..."]:
    """Per-token values of the stream's shards, of all ranks along `axes`."""
    axes = _shared(axes, where)
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def leave(y: Float[Array, "N D"], axes: Axes, where: Layout) -> Float[Array, "shard D"]:
    """This device's tokens of the sum of all partial results along `axes`."""
    if not axes:
        return y
    if where.boundary.kind == "flashcomm1":
        return lax.psum_scatter(y, where.split(axes), scatter_dimension=0, tiled=True)
    return own(lax.psum(y, axes), axes, where)


def own(values: Shaped[Array, "N ..."], axes: Axes, where: Layout) -> Shaped[Array, "shard ..."]:
    """This device's part of what `enter(..., axes)` brought together."""
    axes = _shared(axes, where)
    if not axes:
        return values
    size = values.shape[0] // where.size(axes)
    return lax.dynamic_slice_in_dim(values, lax.axis_index(axes) * size, size)


def pad(values: Shaped[Array, "N ..."], where: Layout) -> Shaped[Array, "P ..."]:
    """A replica's tokens with zeros behind them, so that the stream has equal shards."""
    ranks = 1 if where.boundary.kind == "all_reduce" else where.size(where.of("heads"))
    over = -values.shape[0] % ranks
    return jnp.pad(values, [(0, over), *[(0, 0)] * (values.ndim - 1)]) if over else values


def spread(values: Shaped[Array, "N ..."], axes: Axes, where: Layout) -> Shaped[Array, "M ..."]:
    """What every rank of a replica knows of its tokens (ids, targets), for those tokens that
    `enter(..., axes)` brings together.
    """
    if where.boundary.kind == "flashcomm1":
        values = pad(values, where)
        heads = where.of("heads")
        values = values.reshape(*(where.size((h,)) for h in heads), -1, *values.shape[1:])
        for i, axis in enumerate(heads):
            if axis not in axes:
                values = lax.dynamic_slice_in_dim(values, lax.axis_index(axis), 1, axis=i)
        values = values.reshape(-1, *values.shape[len(heads) + 1 :])
    among = tuple(axis for axis in where.of("batch") if axis in axes)
    return lax.all_gather(values, among, axis=0, tiled=True, to="invarying") if among else values


def whole(x: Shaped[Array, "shard ..."], count: int, where: Layout) -> Shaped[Array, "N ..."]:
    """All `count` tokens of this replica, the same on every rank of the heads' axes."""
    axes = tuple(axis for axis in where.stream if axis in where.of("heads"))
    x = lax.all_gather(x, axes, axis=0, tiled=True, to="invarying") if axes else x
    return x[:count]


def _shared(axes: Axes, where: Layout) -> Axes:
    """The axes among `axes` over which the stream is spread."""
    return tuple(axis for axis in where.stream if axis in axes)


def unshard(weights: Any, specs: Any, where: Layout) -> Any:
    """Weights with the parts of all ranks of `Layout.params.fsdp`; the gradient is reduced and
    scattered to them.

    specs: PartitionSpecs in a tree like `weights`; they may have more axes in front
    """
    axes = where.of("fsdp")
    if not axes:
        return weights

    def one(leaf: Array, spec: PartitionSpec) -> Array:
        for i, names in enumerate(spec):
            if names in (axes, axes[0]):
                axis = leaf.ndim - len(spec) + i
                return lax.all_gather(leaf, axes, axis=axis, tiled=True)
        return leaf

    leaves, tree = jax.tree.flatten(weights)
    return tree.unflatten([one(*pair) for pair in zip(leaves, jax.tree.leaves(specs), strict=True)])


def look_up(
    table: Float[Array, "V part"], ids: Int[Array, " N"], where: Layout
) -> Float[Array, "N D"]:
    """Rows of a table whose columns lie in parts on the ranks of `Layout.params.fsdp`.

    Every rank looks its columns up for the tokens of all: states cross devices, not the table.
    """
    axes = where.of("fsdp")
    if axes:
        ids = lax.all_gather(ids, axes, axis=0, tiled=True)
    x = _rows(table, ids)
    return lax.all_to_all(x, axes, split_axis=0, concat_axis=1, tiled=True) if axes else x


@jax.custom_jvp
def _rows(table: Float[Array, "V part"], ids: Int[Array, " N"]) -> Float[Array, "N part"]:
    if table.dtype != jnp.bfloat16:
        return jnp.take(table, ids, axis=0, mode="clip")
    # As numbers without a meaning: XLA on CPU would take the whole table to float32 first. After
    # the ids: else it copies the table before a decode loop.
    table, ids = lax.optimization_barrier((table, ids))
    bits = lax.bitcast_convert_type(table, jnp.uint16)
    return lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), table.dtype)


@_rows.defjvp
def _rows_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (table, ids), (to_table, _) = primals, tangents
    return _rows(table, ids), jnp.take(to_table, ids, axis=0, mode="clip")


def varying(tree: Any, axes: Iterable[str] = ()) -> Any:
    """The same values, to be told apart along `axes` and along every axis that any leaf of the tree
    varies over: loops, and functions with a gradient of their own, want one kind of array.
    """
    leaves = jax.tree.leaves(tree)
    wanted = set(axes).union(*(_varies(leaf) for leaf in leaves))

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(wanted - _varies(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _varies(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_int8(x: Float[Array, "shard D"], axes: Axes) -> Float[Array, "N D"]:
    """An all-gather of int8 and scales. Its gradient is that of an exact one (straight through)."""
    sent = rows.quantize(x)
    numbers, scale = (lax.all_gather(part, axes, axis=0, tiled=True) for part in sent)
    return rows.dequantize(numbers, scale, x.dtype)


def _gather_int8_forward(x: Array, axes: Axes) -> tuple[Array, None]:
    return _gather_int8(x, axes), None


def _gather_int8_backward(axes: Axes, _: None, grad: Array) -> tuple[Array]:
    return (lax.psum_scatter(grad, axes, scatter_dimension=0, tiled=True),)


_gather_int8.defvjp(_gather_int8_forward, _gather_int8_backward)
