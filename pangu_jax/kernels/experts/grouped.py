"""The grouped product on a Hopper's tensor cores: each block of rows times its expert's matrix.

The matrix is the left factor, out^T = matrix @ rows^T: however few tokens an expert has, the 64
rows of a tensor core are full. So it is the product of matrix and vector too: a block of 8 rows
reads each weight once, 64 outputs at a time on as many processors as there are. Both factors lie as
the tensor core wants them, [out, in] and [token, in]; int8 takes no other order.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pangu_jax.kernels import mosaic


def grouped(
    rows: Shaped[Array, "n s K"],
    stack: Shaped[Array, "E F K"],
    experts: Int[Array, " n"],
    used: Int[Array, ""],
    tile: int,
    loads: int,
) -> Float[Array, "n s F"]:
    """rows[i] @ stack[experts[i]]^T for i < used; what follows is unspecified. Sums are float32.

    bf16 times bf16 gives bf16; int8 times int8 (summed in int32) and bf16 times an int8 stack give
    float32. A multiple of 8 rows, of 64 outputs (or of 128, in tiles of 128), of 32 bytes of K.

    tile: outputs of one program
    loads: steps of K that are under way at once
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    n, s, K = rows.shape
    F = stack.shape[1]
    tile = tile if F % tile == 0 else 64
    step = min(mosaic.swizzled(K, rows.dtype), mosaic.swizzled(K, stack.dtype))
    mixed, integers = stack.dtype != rows.dtype, rows.dtype == jnp.int8
    dtype = jnp.float32 if mixed or integers else rows.dtype
    # The left factor of a product can come from registers; an interpreter has it in memory.
    in_memory = mixed and mosaic.is_interpreted()
    scratch = {"floats": gpu.SMEM((tile, step), rows.dtype)} if in_memory else {}

    def block(experts: Any, used: Any, rows: Any, stack: Any, out: Any, floats: Any = None) -> None:
        i, f = lax.axis_index("block"), lax.axis_index("tile")

        def multiply(_: Any, weights: Any, rows: Any, *, total: Any) -> None:
            if mixed:
                weights = weights[...].astype(rows.dtype)
            if floats is not None:
                floats[...] = weights
                gpu.commit_smem()
                weights = floats
            gpu.wgmma(total, weights, rows.transpose((1, 0)))
            if mixed:
                gpu.wgmma_wait(0)

        def products(total: Any) -> Array:
            spec = functools.partial(gpu.BlockSpec, delay_release=0 if mixed else 1)
            gpu.emit_pipeline(
                functools.partial(multiply, total=total),
                grid=(K // step,),
                in_specs=[spec((tile, step), lambda k: (f, k)), spec((s, step), lambda k: (0, k))],
                max_concurrent_steps=max(2, min(loads, K // step)),
            )(stack.at[experts[i]], rows.at[i])
            return total[...]

        def store(turned: Any, *, total: Array) -> None:
            wide = gpu.layout_cast(total.astype(jnp.float32), gpu.Layout.WGMMA_TRANSPOSED)
            turned.transpose((1, 0))[...] = wide.astype(dtype)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(turned, out.at[i, :, pl.ds(f * tile, tile)])
            gpu.wait_smem_to_gmem(0)

        @pl.when(i < used[0])
        def _() -> None:
            sums = gpu.WGMMAAccumulatorRef((tile, s), jnp.int32 if integers else jnp.float32)
            total = pl.run_scoped(products, sums)
            pl.run_scoped(functools.partial(store, total=total), gpu.SMEM((s, tile), dtype))

    arguments = experts.astype(jnp.int32), used.astype(jnp.int32).reshape(1), rows, stack
    grid = {"block": n, "tile": F // tile}
    return mosaic.call(block, [((n, s, F), dtype)], arguments, grid, scratch)[0]
