"""What training minimises: cross-entropy of the next token, without a [tokens, vocabulary] array.

Everything here is global: `loss` opens the one shard_map of a step and gradients are taken outside
of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pangu_jax import model as pangu
from pangu_jax.cache import Meta
from pangu_jax.model import Pangu
from pangu_jax.pytree import pytree

# Tokens whose float32 logits are held at once; the backward pass computes them again. At the
# published vocabulary of 153,376 this is 0.6 GB instead of 2.5 GB per 4096 tokens (own choice).
CHUNK = 1024


@pytree
class Batch:
    """Packed rows: several examples side by side, each a segment of its own.

    tokens, targets: the token at each place, and the one that follows it in its example
    segments: 1, 2, ... for the examples of a row, 0 for padding
    positions: of each token in its example
    weights: how much each target counts; 0 for prompts, padding and the end of an example
    """

    tokens: Int[Any, "B T"]
    targets: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    weights: Float[Any, "B T"]


def loss(model: Pangu, batch: Batch) -> Float[Array, ""]:
    """Cross-entropy in nats, averaged over the weights of the batch (0 where they are all 0)."""

    def local(model: Pangu, batch: Batch) -> Array:
        meta = Meta(batch.positions, batch.segments > 0, batch.segments)
        hidden, _ = pangu.forward(model, batch.tokens.reshape(-1), meta)
        total = cross_entropy(model, hidden, batch.targets.reshape(-1), batch.weights.reshape(-1))
        return total / jnp.maximum(batch.weights.sum(), jnp.finfo(jnp.float32).tiny)

    return pangu.on_mesh(model, local)(model, batch)


def cross_entropy(
    model: Pangu,
    hidden: Float[Array, "N D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """sum_n weights[n] * (logsumexp(z_n) - z_n[targets[n]]) with z the logits of `hidden`, in
    chunks of CHUNK tokens.
    """
    N = hidden.shape[0]
    chunks = -(-N // CHUNK)
    size = -(-N // chunks)
    cut = lambda x: jnp.pad(x, [(0, chunks * size - N), *[(0, 0)] * (x.ndim - 1)]).reshape(
        chunks, size, *x.shape[1:]
    )

    @jax.checkpoint
    def chunk(model: Pangu, hidden: Array, targets: Array, weights: Array) -> Array:
        logits = pangu.logits(model, hidden)
        own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - own))

    if chunks == 1:
        return chunk(model, hidden, targets, weights)
    parts = (cut(hidden), cut(targets), cut(weights))
    add = lambda total, part: (total + chunk(model, *part), None)
    return lax.scan(add, jnp.float32(0), parts)[0]
