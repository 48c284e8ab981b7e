"""How the next token is chosen: the request's settings, and the choice itself on the device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from pangu_jax.errors import InputError
from pangu_jax.pytree import pytree

# Below this a float32 cumulative sum cannot tell it from nothing.
SMALLEST_TOP_P = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one request; the default is greedy.

    Raises InputError for values that make no sense.

    max_new_tokens: the most tokens to generate
    temperature: 0 is greedy
    top_k: sample among the k likeliest tokens; 0 or -1 is off
    top_p: sample among the likeliest tokens that together reach this probability
    seed: the draw at a position depends on the seed and the position alone; None seeds every prompt
        afresh
    stop_token_ids: generation also ends after one of these
    ignore_eos: do not end at the model's end-of-sequence tokens
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            _check_integer(name, getattr(self, name), optional=name == "seed")
        try:
            stops = tuple(self.stop_token_ids)
        except TypeError:
            raise InputError("stop_token_ids must be a list of token ids") from None
        for stop in stops:
            _check_integer("stop_token_ids", stop)
        object.__setattr__(self, "stop_token_ids", tuple(int(stop) for stop in stops))
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not (0 <= self.temperature < math.inf):
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < -1:
            raise InputError(f"top_k must be positive, or 0 or -1 for off, not {self.top_k}")
        if not SMALLEST_TOP_P <= self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def _check_integer(name: str, value: Any, optional: bool = False) -> None:
    """Integers must fit the device's 32 bits."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or abs(value) >= 2**31:
        raise InputError(f"{name} must be an integer below 2**31, not {value!r}")


@pytree
class Controls:
    """The settings of every row of a batch, on the device."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    keys: Key[Array, " B"]


def choose(
    logits: Float[Array, "B V"], controls: Controls, positions: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of every row, and its log-probability in the distribution it was drawn from.

    A greedy row takes the likeliest token (the first of equals) and reports it in the unscaled
    distribution.
    positions: where the tokens will stand; with the row's key they fix the draw, whatever the batch
    """
    greedy = controls.temperature == 0
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> tuple[Array, Array]:
        processed = process(logits, controls)
        keys = jax.vmap(jax.random.fold_in)(controls.keys, positions)
        drawn = jax.vmap(jax.random.categorical)(keys, processed).astype(jnp.int32)
        return processed, jnp.where(greedy, best, drawn)

    # Sorting the vocabulary for nobody would cost more than a small model's step.
    processed, tokens = lax.cond(jnp.all(greedy), lambda: (logits, best), draw)
    chosen = jnp.take_along_axis(processed, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(processed, axis=-1)


def process(logits: Float[Array, "B V"], controls: Controls) -> Float[Array, "B V"]:
    """Logits after temperature, then top-k, then top-p of what is left; greedy rows unchanged.

    Tokens equal to the last one kept are kept too (own choice: the result does not depend on how
    ties sort).
    """
    temperature = jnp.where(controls.temperature == 0, 1.0, controls.temperature)
    scaled = logits / temperature[:, None]
    V = logits.shape[-1]
    ranked = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(controls.top_k <= 0, V, jnp.minimum(controls.top_k, V))
    in_top_k = jnp.arange(V)[None, :] < k[:, None]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = controls.top_p[:, None]
    kept = in_top_k & ((before < top_p) | (top_p >= 1))
    lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    unlimited = (controls.temperature == 0)[:, None]
    return jnp.where(unlimited | (scaled >= lowest), scaled, -jnp.inf)
