"""What training minimises: the cross-entropy of the next token, without a [tokens, vocabulary]
array, and what keeps a MoGE's experts busy.

Everything here is global: `objective` opens the one shard_map of a step and gradients are taken
outside of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pangu_jax import lora
from pangu_jax import model as pangu
from pangu_jax.adapted import Adapters
from pangu_jax.cache import Meta
from pangu_jax.linear import linear
from pangu_jax.model import Pangu, Remat
from pangu_jax.moge import Routing
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


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, and how: the weights of what is added to the cross-entropy, and what of a
    layer the backward pass computes again (`model.tapped_forward`).
    """

    z_loss: float = 0.0
    balance: float = 0.0
    remat: Remat | None = None


@pytree
class Router:
    """What a MoGE's routers did, by layer.

    load: (token, expert) pairs of each expert
    entropy: of the softmax over all experts, in nats, the mean of the tokens
    """

    load: Float[Array, "L E"]
    entropy: Float[Array, " L"]


@pytree
class Measures:
    """Parts of an objective.

    cross_entropy: nats per target
    z: the mean of logsumexp(logits)^2
    balance: sum_i f_i p_i, the mean of the layers; 1 where all experts have as much to do
    """

    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]
    balance: Float[Array, ""] | None
    router: Router | None


def loss(model: Pangu, batch: Batch) -> Float[Array, ""]:
    """Cross-entropy in nats, averaged over the weights of the batch (0 where they are all 0)."""
    return objective(model, batch, Objective())[1].cross_entropy


def objective(
    model: Pangu,
    batch: Batch,
    wanted: Objective,
    count: Float[Array, ""] | None = None,
    share: float = 1.0,
    tokens: Float[Array, ""] | None = None,
    adapters: Adapters | None = None,
) -> tuple[Float[Array, ""], Measures]:
    """cross-entropy + z_loss mean(logsumexp^2) + balance l_aux, and its parts.

    l_aux = sum_i f_i p_i over the experts i, of the whole batch: f_i = E / (K tokens) times the
    tokens that chose i, p_i their mean share of the softmax over all experts (arXiv 2505.21411,
    eq. 8; here the mean of the layers).

    count, share, tokens: where this is a part of a batch, the weights of all of it, its part of it,
        and all tokens: the objectives, and what routers did, of all parts add up to the batch's
    adapters: low-rank ones beside the model's matrices
    """
    rows = batch.tokens.shape[0]
    more = [(0, model.layout.round_rows(rows) - rows), (0, 0)]
    batch = jax.tree.map(lambda grid: jnp.pad(grid, more), batch)
    of_all = batch.weights.sum() if count is None else count
    of_all = jnp.maximum(of_all, jnp.finfo(jnp.float32).tiny)
    nats, squares, router = _sums(model, batch, wanted.remat, adapters)
    nats, squares = nats / of_all, squares / of_all
    total, balance = nats + wanted.z_loss * squares, None
    if (moge := model.config.moge) is not None:
        E = moge.num_experts
        load, shares, entropy = jnp.split(router, [E, 2 * E], axis=1)
        own = jnp.maximum((batch.segments > 0).sum(), 1).astype(jnp.float32)
        scale = E / (moge.experts_per_token * own * own)
        balance = (load * shares).sum(axis=1).mean() * scale * share
        total = total + wanted.balance * balance
        router = Router(load, entropy[:, 0] / (own if tokens is None else tokens))
    return total, Measures(nats, squares, balance, router)


def _sums(
    model: Pangu, batch: Batch, remat: Remat | None, adapters: Adapters | None
) -> tuple[Array, Array, Any]:
    """Of all tokens: those of `cross_entropy`, and of every layer those of `_of_router`."""
    where = model.layout

    def local(model: Pangu, batch: Batch, adapters: Adapters | None) -> tuple[Array, Array, Any]:
        meta = Meta(batch.positions, batch.segments > 0, batch.segments)
        axes = where.of("heads")
        valid = boundary.own(boundary.spread(meta.valid.reshape(-1), axes, where), axes, where)
        tap = functools.partial(_of_router, valid)
        tap = tap if model.config.moge is not None else lambda x, routing: None
        tokens = batch.tokens.reshape(-1)
        forward = functools.partial(pangu.tapped_forward, remat=remat, adapters=adapters)
        hidden, _, kept = forward(model, tokens, meta, None, tap)
        sums = cross_entropy(model, hidden, batch.targets.reshape(-1), batch.weights.reshape(-1))
        router = jax.tree.map(lambda *runs: jnp.concatenate(runs), *kept)
        if router is not None and where.stream:
            router = lax.psum(router, where.stream)
        return *sums, router

    of_adapters = None if adapters is None else lora.specs(model, adapters)
    run = on_mesh(model, local, (where.rows, of_adapters), PartitionSpec())
    return run(model, batch, adapters)


def _of_router(valid: Array, x: Array, routing: Routing | None) -> Float[Array, " columns"]:
    """Sums over this device's valid tokens, one after the other: choices of every expert, shares of
    the softmax over all of them, its entropy.
    """
    assert routing is not None
    with jax.named_scope("router_statistics"):
        logs = jax.nn.log_softmax(routing.logits.astype(jnp.float32), axis=-1)
        logs = jnp.where(valid[:, None], logs, 0)
        p = jnp.where(valid[:, None], jnp.exp(logs), 0)
        E = logs.shape[1]
        chosen = jnp.where(valid[:, None], routing.experts, E).reshape(-1)
        load = jnp.zeros(E, jnp.float32).at[chosen].add(1.0, mode="drop")
        return jnp.concatenate([load, p.sum(0), -(p * logs).sum()[None]])


def cross_entropy(
    model: Pangu,
    hidden: Float[Array, "shard D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """sum_n weights[n] * (logsumexp(z_n) - z_n[targets[n]]) over the tokens n of all devices, and
    sum_n weights[n] * logsumexp(z_n)^2, with z the logits of `hidden`, in chunks of CHUNK tokens.

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
        nats, log_z = _nats(model, head, hidden, targets)
        return jnp.stack([jnp.sum(weights * nats), jnp.sum(weights * log_z**2)])

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
        total = lax.scan(add, boundary.varying(jnp.zeros(2, jnp.float32), others), parts)[0]
    total = lax.psum(total, others) if others else total
    return total[0], total[1]


def _nats(
    model: Pangu, head: Float[Array, "part D"], hidden: Float[Array, "N D"], targets: Array
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """-log p(target) and logsumexp of every token's logits; the same on every rank of the
    vocabulary's axes.
    """
    axes, part = model.layout.of("vocab"), head.shape[0]
    with exact_if_float32(model.dtype):
        logits = linear(hidden, head, jnp.float32)
    if not axes:
        own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        log_z = jax.nn.logsumexp(logits, axis=1)
        return log_z - own, log_z
    first = lax.axis_index(axes) * part
    real = first + jnp.arange(part) < model.config.vocab_size
    logits = jnp.where(real[None], logits, -jnp.inf)
    largest = lax.pmax(lax.stop_gradient(logits.max(axis=1)), axes)
    total = lax.psum(jnp.exp(logits - largest[:, None]).sum(axis=1), axes)
    place = targets - first
    mine = (place >= 0) & (place < part)
    own = jnp.take_along_axis(logits, jnp.clip(place, 0, part - 1)[:, None], axis=1)[:, 0]
    log_z = jnp.log(total) + largest
    return log_z - lax.psum(jnp.where(mine, own, 0), axes), log_z
