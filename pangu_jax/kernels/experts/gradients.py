"""Grouped products of the backward pass on a Hopper, bf16, of blocks of 64 rows or 128.

Rows are the left factor here: there are always enough of them to fill a tensor core, and what an
expert has as inputs may be any multiple of 16 then (half an expert of the 72B has 672).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax.kernels import mosaic

COLUMNS = (128, 64, 96, 32, 112, 80, 48, 16)


def grouped_back(
    rows: Float[Array, "n s F"],
    stack: Float[Array, "E F K"],
    experts: Int[Array, " n"],
    used: Int[Array, ""],
    loads: int,
) -> Float[Array, "n s K"]:
    """rows[i] @ stack[experts[i]] for i < used; what follows is unspecified. Sums are float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    n, s, F = rows.shape
    K = stack.shape[-1]
    step, tile = mosaic.swizzled(F, rows.dtype), columns(K)

    def block(experts: Any, used: Any, rows: Any, stack: Any, out: Any) -> None:
        i, k = lax.axis_index("block"), lax.axis_index("tile")
        left = gpu.BlockSpec((s, step), lambda f: (0, f), delay_release=1)
        right = gpu.BlockSpec((step, tile), lambda f: (f, k), delay_release=1)

        @pl.when(i < used[0])
        def _() -> None:
            multiply = _pipeline(
                lambda x: x, [left, right], F // step, max(2, min(loads, F // step))
            )
            factors = rows.at[i], stack.at[experts[i]]
            _write(multiply, factors, out.at[i, :, pl.ds(k * tile, tile)])

    arguments = experts.astype(jnp.int32), used.astype(jnp.int32).reshape(1), rows, stack
    grid = {"block": n, "tile": K // tile}
    return mosaic.call(block, [((n, s, K), rows.dtype)], arguments, grid, {})[0]


def summed(
    left: Float[Array, "n s F"],
    right: Float[Array, "n s K"],
    first: Int[Array, " E"],
    count: Int[Array, " E"],
    loads: int,
) -> Float[Array, "E F K"]:
    """sum_i left[i]^T @ right[i] over the blocks of each expert, `count` of them from `first` on:
    the gradient of a stack. F is a multiple of 64, K of 16.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    _, s, F = left.shape
    K = right.shape[-1]
    high, wide = (128 if F % 128 == 0 else 64), columns(K)

    def expert(first: Any, count: Any, left: Any, right: Any, out: Any) -> None:
        e, f, k = (lax.axis_index(name) for name in ("expert", "row", "column"))
        start = first[e]
        specs = [
            gpu.BlockSpec((None, s, size), lambda i, at=at: (start + i, 0, at), delay_release=1)
            for size, at in ((high, f), (wide, k))
        ]
        turn = lambda x: x.transpose((1, 0))
        multiply = _pipeline(turn, specs, count[e], max(2, loads * 64 // s))
        here = out.at[e, pl.ds(f * high, high), pl.ds(k * wide, wide)]
        _write(multiply, (left, right), here)

    grid = {"expert": first.shape[0], "row": F // high, "column": K // wide}
    arguments = first.astype(jnp.int32), count.astype(jnp.int32), left, right
    made = [((first.shape[0], F, K), left.dtype)]
    return mosaic.call(expert, made, arguments, grid, {})[0]


def _pipeline(turn: Any, specs: Any, steps: Any, loads: int) -> Any:
    """Adds turn(left) @ right of every step to the sums that it is called with."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    def multiply(total: Any, *factors: Any) -> None:
        add = lambda _, left, right: gpu.wgmma(total, turn(left), right)
        gpu.emit_pipeline(add, grid=(steps,), in_specs=specs, max_concurrent_steps=loads)(*factors)

    return multiply


def _write(multiply: Any, factors: Any, out: Any) -> None:
    """The sums of `multiply(sums, *factors)`, from 0 on, to memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    def sums(total: Any) -> Array:
        multiply(total, *factors)
        return total[...]

    made = pl.run_scoped(sums, gpu.WGMMAAccumulatorRef(out.shape, jnp.float32))

    def store(tile: Any) -> None:
        tile[...] = made.astype(out.dtype)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(tile, out)
        gpu.wait_smem_to_gmem(0)

    pl.run_scoped(store, gpu.SMEM(out.shape, out.dtype))


def columns(width: int) -> int:
    """Of a tile: what divides a width, rows of whole 128 bytes before those of 64 and 32."""
    return next(size for size in COLUMNS if width % size == 0)
