"""(token, expert) pairs in blocks that each belong to one expert."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pangu_jax.pytree import pytree


@pytree
class Arranged:
    """Pairs sorted by expert and cut into n blocks of s rows. n is static, because an expert wastes
    less than one block; from `used` on blocks are empty, and rows without a pair repeat a token:
    they are never read back.

    tokens: whose row it is
    experts: whose block it is
    rows: the row of each pair, n * s where its expert is not among these
    """

    tokens: Int[Array, "n s"]
    experts: Int[Array, " n"]
    used: Int[Array, ""]
    rows: Int[Array, "N k"]


def arrange(experts: Int[Array, "N k"], count: int, size: int) -> Arranged:
    """The pairs of `count` experts in blocks of `size` rows."""
    N, k = experts.shape
    num_blocks = min(N * k, (N * k + count * (size - 1)) // size)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # sorted rank -> pair
    counts = jnp.bincount(flat, length=count + 1)
    blocks_of = ((counts + size - 1) // size).at[count].set(0)
    block_ends = jnp.cumsum(blocks_of)
    sorted_experts = flat[order]
    rank_in_expert = jnp.arange(N * k) - (jnp.cumsum(counts) - counts)[sorted_experts]
    row = (block_ends - blocks_of)[sorted_experts] * size + rank_in_expert
    row = jnp.where(sorted_experts < count, row, num_blocks * size)  # sorted rank -> row

    tokens = jnp.zeros(num_blocks * size, jnp.int32).at[row].set(order // k, mode="drop")
    block_expert = jnp.searchsorted(block_ends, jnp.arange(num_blocks), "right")
    row_of_pair = jnp.zeros(N * k, row.dtype).at[order].set(row)
    return Arranged(
        tokens=tokens.reshape(num_blocks, size),
        experts=jnp.minimum(block_expert, count - 1),
        used=block_ends[-1],
        rows=row_of_pair.reshape(N, k),
    )


def rows_of_pairs(rows: Float[Array, "n s D"], own: Arranged) -> Float[Array, "N k D"]:
    """Each pair's row; zeros where its expert is not among these."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.at[own.rows].get(mode="fill", fill_value=0)


def combine(
    chosen: Float[Array, "N k D"], weights: Float[Array, "N k"], dtype: DTypeLike
) -> Float[Array, "N D"]:
    """Each token's rows, weighted and summed in float32."""
    mixed = jnp.einsum("nkd,nk->nd", chosen, weights, preferred_element_type=jnp.float32)
    return mixed.astype(dtype)
