"""Attention of whole sequences by cuDNN, forward and backward, through `jax.nn`."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Numbers of a mask at most: cuDNN reads it as bf16, of every query and key (own choice: 1 GiB).
MASK = 2**29


def can(queries: Float[Array, "B T K g H"], keys: Float[Array, "B K S H"]) -> bool:
    """bf16 heads of up to 128 numbers, several queries, even lengths, a mask that is no burden."""
    (B, T, *_, H), S = queries.shape, keys.shape[2]
    known = queries.dtype == keys.dtype == jnp.bfloat16 and H % 8 == 0 and H <= 128
    return known and T > 1 and T % 2 == S % 2 == 0 and B * T * S <= MASK


def attend(
    queries: Float[Array, "B T K g H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
    library: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T K g H"]:
    """`full.attend`, with the gradient of the library."""
    B, T, K, g, H = queries.shape
    seen = key_positions[:, None, :] <= query_positions[:, :, None]
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    mixed = jax.nn.dot_product_attention(
        queries.reshape(B, T, K * g, H),
        *(held.swapaxes(1, 2) for held in (keys, values)),
        mask=seen[:, None],
        implementation=library,
    )
    return mixed.reshape(queries.shape)
