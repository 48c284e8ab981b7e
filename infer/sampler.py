"""How the next token is chosen, on the device.

Logits pass through, in this order: logit bias, repetition penalty, frequency and presence penalty,
temperature, top-k, top-p of what is left, min-p. Log-probabilities are those of the distribution
that comes out.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from pangu_jax.parallel import boundary
from pangu_jax.pytree import pytree

# Logits divided by less would leave the range of float32.
SMALLEST_TEMPERATURE = 1e-4

LOWEST, HIGHEST = -(2**31), 2**31 - 1


@pytree
class Shaping:
    """What changes single tokens' logits, of every row of a batch."""

    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    bias: Float[Array, "B V"]


@pytree
class Controls:
    """The settings of every row of a batch, on the device. `shaping` is None where no row has any:
    it takes memory and time in proportion to the vocabulary.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    keys: Key[Array, " B"]
    shaping: Shaping | None


@pytree
class History:
    """What every row has seen: tokens of its prompt, and how often it chose each token since."""

    prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]

    @classmethod
    def of(cls, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], vocab: int) -> "History":
        """The history of prompts that have no answer yet."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        seen = jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(mask)
        return cls(seen, jnp.zeros(seen.shape, jnp.int32))

    def add(self, token: Int[Array, " B"], alive: Bool[Array, " B"]) -> "History":
        """The history after every living row chose its token."""
        rows = jnp.arange(token.shape[0])
        counted = self.counts.at[rows, jnp.maximum(token, 0)].add(alive.astype(jnp.int32))
        return History(self.prompt, counted)


@pytree
class Choice:
    """A token for every row (and step), its log-probability, and those of the K likeliest."""

    token: Int[Array, "B *C"]
    logprob: Float[Array, "B *C"]
    top: tuple[Int[Array, "B *C K"], Float[Array, "B *C K"]] | None


def choose(
    logits: Float[Array, "B V"],
    controls: Controls,
    positions: Int[Array, " B"],
    history: History | None = None,
    top: int = 0,
    wanted: Bool[Array, ""] | None = None,
) -> Choice:
    """The next token of every row, drawn from the processed distribution.

    A greedy row takes the likeliest token (the first of equals) and reports it in the distribution
    before temperature and cuts.
    positions: where the tokens will stand; with the row's key they fix the draw, whatever the batch
    top: K, how many of the likeliest tokens to report
    wanted: whether anybody wants them now; None is yes
    """
    if controls.shaping is not None:
        assert history is not None
        logits = shape(logits, controls.shaping, history)
    greedy = controls.temperature == 0
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> tuple[Array, Array]:
        processed = process(logits, controls)
        keys = jax.vmap(jax.random.fold_in)(controls.keys, positions)
        drawn = jax.vmap(jax.random.categorical)(keys, processed).astype(jnp.int32)
        return processed, jnp.where(greedy, best, drawn)

    # Sorting the vocabulary for nobody would cost more than a small model's step.
    processed, token = lax.cond(jnp.all(greedy), lambda: (logits, best), draw)
    total = jax.nn.logsumexp(processed, axis=-1)
    chosen = jnp.take_along_axis(processed, token[:, None], axis=-1)[:, 0]
    likeliest = None
    if top:
        best_of = lambda: _likeliest(processed, total, min(top, processed.shape[-1]))
        if wanted is None:
            likeliest = best_of()
        else:
            zeros = lambda like: jnp.zeros(like.shape, like.dtype)
            blank = jax.tree.map(zeros, jax.eval_shape(best_of))
            blank = boundary.varying((blank, processed))[0]
            likeliest = lax.cond(wanted, best_of, lambda: blank)
    return Choice(token, chosen - total, likeliest)


def _likeliest(
    processed: Float[Array, "B V"], total: Float[Array, " B"], count: int
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    values, ids = lax.top_k(processed, count)
    return ids.astype(jnp.int32), values - total[:, None]


def shape(logits: Float[Array, "B V"], shaping: Shaping, history: History) -> Float[Array, "B V"]:
    """Logits after bias and penalties (definitions in `Sampling`; the order is vLLM's)."""
    logits = logits + shaping.bias
    chosen = history.counts > 0
    by = shaping.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / by, logits * by)
    logits = jnp.where(history.prompt | chosen, repeated, logits)
    times = history.counts.astype(logits.dtype)
    logits = logits - shaping.frequency[:, None] * times
    return logits - shaping.presence[:, None] * chosen.astype(logits.dtype)


def process(logits: Float[Array, "B V"], controls: Controls) -> Float[Array, "B V"]:
    """Logits after temperature, top-k, top-p of what is left, and min-p; greedy rows unchanged.

    Every cut keeps the tokens above some logit, so equal tokens stay or go together (own choice:
    the result does not depend on how ties sort).
    """
    temperature = jnp.maximum(controls.temperature, SMALLEST_TEMPERATURE)
    temperature = jnp.where(controls.temperature == 0, 1.0, temperature)
    scaled = logits / temperature[:, None]
    keys = _ordered(scaled)
    nothing = jnp.full_like(controls.top_k, LOWEST)
    k = jnp.where(controls.top_k > 0, controls.top_k, scaled.shape[-1]).astype(jnp.float32)
    top_k = lax.cond(
        jnp.any(controls.top_k > 0),
        lambda: _cut(keys, jnp.ones_like(scaled), k),
        lambda: nothing,
    )
    # Relative to the likeliest token, so that nothing overflows; far ones count for nothing.
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    left = jnp.where(keys > top_k[:, None], weights, 0.0)
    share = jnp.where(controls.top_p < 1, controls.top_p, 2.0)
    top_p = lax.cond(
        jnp.any(controls.top_p < 1),
        lambda: _cut(keys, left, share * jnp.sum(left, axis=-1)),
        lambda: nothing,
    )
    kept = (keys > jnp.maximum(top_k, top_p)[:, None]) & (weights >= controls.min_p[:, None])
    # The likeliest stays whatever is asked for: its weight may be rounded to less than 1.
    kept = kept | (keys == jnp.max(keys, axis=-1, keepdims=True))
    unlimited = (controls.temperature == 0)[:, None]
    return jnp.where(unlimited | kept, scaled, -jnp.inf)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers in the order of the floats."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 is 0.0
    return bits ^ ((bits >> 31) & HIGHEST)


def _cut(
    keys: Int[Array, "B V"], weights: Float[Array, "B V"], needed: Float[Array, " B"]
) -> Int[Array, " B"]:
    """The largest key above which there is at least the needed weight; LOWEST if there is none.

    By bisection, bit by bit: sorting a vocabulary takes ten times as long on CPU.
    """

    def bit(i: Array, low: Array) -> Array:
        higher = low + (jnp.int32(1) << (31 - i))  # wraps from LOWEST to 0 in the first step
        above = jnp.sum(jnp.where(keys > higher[:, None], weights, 0.0), axis=-1)
        return jnp.where(above >= needed, higher, low)

    return lax.fori_loop(0, 32, bit, jnp.full_like(keys[:, 0], LOWEST))
