"""Batches of random examples, packed or an example in each row; and what a step is to make of the
latter, by formulas that share nothing with the product but the model's logits and its routing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from pangu_jax.model import Pangu
from train.data import packing
from train.data.examples import Example
from train.objectives import Batch


def examples(sizes: Sequence[int], vocab: int = 1000, learnt: float = 1.0) -> list[Example]:
    """Random tokens from 3 on, a part of which are to be learnt; the same for the same sizes."""
    rng = np.random.default_rng(sum(sizes))
    return [
        Example(rng.integers(3, vocab, size).astype(np.int32), rng.random(size) < learnt)
        for size in sizes
    ]


def packed(examples: Sequence[Example], length: int, rows: int | None = None) -> Batch:
    """Several examples side by side in rows of `length`, the fullest first. Exactly `rows` rows,
    where that is given: the last of them are left out, or are padding.
    """
    found = packing.pack(np.array([each.ids.size for each in examples], np.int64), length)
    count = max(len(found), rows or 0)
    tokens, segments = np.zeros((2, count, length), np.int32)
    learn = np.zeros((count, length), bool)
    for row in range(len(found)):
        end = 0
        for number, member in enumerate(found.members[found.starts[row] : found.starts[row + 1]]):
            begin, end = end, end + examples[member].ids.size
            tokens[row, begin:end], segments[row, begin:end] = examples[member].ids, number + 1
            learn[row, begin:end] = examples[member].learn
    return packing.batch(tokens[:rows], segments[:rows], learn[:rows])


def alone(examples: Sequence[Example], width: int) -> Batch:
    """Every example in a row of its own, without anything of train.data.packing."""

    def rows(values: Callable[[Example], Sequence], dtype: type) -> np.ndarray:
        cells = [[*values(e)[: e.ids.size], *[0] * (width - e.ids.size)] for e in examples]
        return np.array(cells, dtype)

    return Batch(
        tokens=rows(lambda e: e.ids, np.int32),
        targets=rows(lambda e: [*e.ids[1:], 0], np.int32),
        segments=rows(lambda e: [1] * e.ids.size, np.int32),
        positions=rows(lambda e: range(e.ids.size), np.int32),
        weights=rows(lambda e: [*e.learn[1:], False], np.float32),
    )


def of_targets(logits: np.ndarray, batch: Batch) -> tuple[float, float]:
    """Cross-entropy and the mean of logsumexp^2, a target at a time in float64."""
    nats = squares = count = 0.0
    for row, t in np.argwhere(batch.weights > 0):
        z, weight = logits[row, t].astype(np.float64), float(batch.weights[row, t])
        log_z = z.max() + np.log(np.exp(z - z.max()).sum())
        nats += weight * (log_z - z[batch.targets[row, t]])
        squares += weight * log_z**2
        count += weight
    return (nats / count, squares / count) if count else (0.0, 0.0)


def of_router(
    logits: np.ndarray, experts: np.ndarray, batch: Batch
) -> tuple[float, np.ndarray, np.ndarray]:
    """Balance, load and entropy from `router_logits` and `experts` of a trace, a token at a time in
    float64: sum_i f_i p_i with f_i = E/K times the tokens that chose i, of all of them (arXiv
    2505.21411, eq. 8).
    """
    L, _, _, E = logits.shape
    load, share, entropy, tokens = np.zeros((L, E)), np.zeros((L, E)), np.zeros(L), 0
    for row, t in np.argwhere(batch.segments > 0):
        tokens += 1
        for layer in range(L):
            p = np.exp(logits[layer, row, t].astype(np.float64) - logits[layer, row, t].max())
            p /= p.sum()
            share[layer] += p
            entropy[layer] -= sum(x * np.log(x) for x in p)
            for chosen in experts[layer, row, t]:
                load[layer, chosen] += 1
    if not tokens:
        return 0.0, load, entropy
    f = E / experts.shape[-1] * load / tokens
    return float((f * share / tokens).sum(1).mean()), load, entropy / tokens


def naive(model: Pangu, batch: Batch, z_loss: float, balance: float, parts: int = 1) -> Any:
    """The objective of rows of one example each, from whole logits and a whole trace: to be
    differentiated. The balance is the mean of those of rows 0, n, 2n, ..., of 1, n+1, ...
    """
    logits = model(batch.tokens)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    total = (batch.weights * (log_z - own + z_loss * log_z**2)).sum() / batch.weights.sum()
    if model.config.moge is None:
        return total
    seen = pangu_jax.trace(model, batch.tokens)
    E, K = seen.router_logits.shape[-1], seen.experts.shape[-1]
    p = jax.nn.softmax(seen.router_logits, axis=-1)
    chose = jax.nn.one_hot(seen.experts, E).sum(axis=-2)
    for part in range(parts):
        own = (np.arange(len(batch.tokens)) % parts == part)[:, None] & (batch.segments > 0)
        own = own.astype(np.float32)
        mean = lambda x, own=own: (x * own[None, :, :, None]).sum((1, 2)) / own.sum()
        total += balance / parts * (E / K * mean(chose) * mean(p)).sum(1).mean()
    return total
