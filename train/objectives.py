"""What training minimises: cross-entropy of the next token, without a [tokens, vocabulary] array.

Everything here is global: `loss` opens the one shard_map of a step and gradients are taken outside
of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pangu_jax import model as pangu
from pangu_jax.cache import Meta
from pangu_jax.linear import linear
from pangu_jax.model import Pangu
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh
from pangu_jax.precision import exact_if_float32
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
    where = model.layout
    rows = batch.tokens.shape[0]
    more = [(0, where.round_rows(rows) - rows), (0, 0)]
    batch = jax.tree.map(lambda grid: jnp.pad(grid, more), batch)

    def local(model: Pangu, batch: Batch) -> Array:
        meta = Meta(batch.positions, batch.segments > 0, batch.segments)
        hidden, _ = pangu.forward(model, batch.tokens.reshape(-1), meta)
        total = cross_entropy(model, hidden, batch.targets.reshape(-1), batch.weights.reshape(-1))
        count = batch.weights.sum()
        if replicas := where.of("batch"):
            count = lax.psum(count, replicas)
        return total / jnp.maximum(count, jnp.finfo(jnp.float32).tiny)

    return on_mesh(model, local, (where.rows,), PartitionSpec())(model, batch)


def cross_entropy(
    model: Pangu,
    hidden: Float[Array, "shard D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """sum_n weights[n] * (logsumexp(z_n) - z_n[targets[n]]) over the tokens n of all devices, with
    z the logits of `hidden`, in chunks of CHUNK tokens.

    hidden: this device's part of the stream
    targets, weights: of all tokens of its replica of attention
    Where the vocabulary is split, every device has its part of the logits of all tokens.
    """
    where = model.layout
    axes = where.of("vocab")
    hidden = boundary.gather(hidden, axes, where)
    targets, weights = (boundary.spread(part, axes, where) for part in (targets, weights))
    head, others = pangu.head(model), tuple(a for a in where.stream if a not in axes)

    @jax.checkpoint
    def chunk(head: Array, hidden: Array, targets: Array, weights: Array) -> Array:
        return jnp.sum(weights * _nats(model, head, hidden, targets))

    N = hidden.shape[0]
    chunks = -(-N // CHUNK)
    if chunks == 1:
        total = chunk(head, hidden, targets, weights)
    else:
        size = -(-N // chunks)
        cut = lambda x: jnp.pad(x, [(0, chunks * size - N), *[(0, 0)] * (x.ndim - 1)]).reshape(
            chunks, size, *x.shape[1:]
        )
        parts = (cut(hidden), cut(targets), cut(weights))
        add = lambda total, part: (total + chunk(head, *part), None)
        total = lax.scan(add, boundary.varying(jnp.float32(0), others), parts)[0]
    return lax.psum(total, others) if others else total


def _nats(
    model: Pangu, head: Float[Array, "part D"], hidden: Float[Array, "N D"], targets: Array
) -> Float[Array, " N"]:
    """-log p(target) of every token; the same on every rank of the vocabulary's axes."""
    axes, part = model.layout.of("vocab"), head.shape[0]
    with exact_if_float32(model.dtype):
        logits = linear(hidden, head, jnp.float32)
    if not axes:
        own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - own
    first = lax.axis_index(axes) * part
    real = first + jnp.arange(part) < model.config.vocab_size
    logits = jnp.where(real[None], logits, -jnp.inf)
    largest = lax.pmax(lax.stop_gradient(logits.max(axis=1)), axes)
    total = lax.psum(jnp.exp(logits - largest[:, None]).sum(axis=1), axes)
    place = targets - first
    mine = (place >= 0) & (place < part)
    own = jnp.take_along_axis(logits, jnp.clip(place, 0, part - 1)[:, None], axis=1)[:, 0]
    return jnp.log(total) + largest - lax.psum(jnp.where(mine, own, 0), axes)
