"""Generation on the device: one prefill, then a decode loop that returns to the host every CHUNK
tokens.

Prompts are ragged: they are padded on the right to one of few shapes. Within a chunk there is no
host round trip; between chunks the host looks for the end, reports progress, can be interrupted,
and makes room in the cache.
"""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from infer import sampling as samplers
from infer.sampling import Controls, Sampling
from pangu_jax import cache as caches
from pangu_jax import model as models
from pangu_jax.cache import Cache, Meta
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.pytree import pytree

# Decode steps of one dispatch (own choice): few host round trips, and Ctrl-C still answers.
CHUNK = 32

# A cache that must grow gets room for this many tokens more, rounded up to a power of two: every
# size compiles once, and unused slots are still read.
AHEAD = 512

SMALLEST_PROMPT = 16
SMALLEST_STOPS = 8

FinishReason = Literal["stop", "length"]
Progress = Callable[[int], None]
Prompt = Sequence[SupportsIndex] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    token_ids: without the prompt, with the end-of-sequence or stop token that ended it
    logprobs: of each token, in the distribution it was chosen from
    finish_reason: "stop" after an end token, "length" at max_new_tokens or the model's last
        position
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


@pytree
class State:
    """Where decoding stands. `token` was chosen last and is not in the cache yet."""

    cache: Cache
    token: Int[Array, " B"]
    left: Int[Array, " B"]
    """Tokens each row may still choose; 0 when it has finished."""


@pytree
class Request:
    """What stays the same for the rows of a batch."""

    controls: Controls
    limits: Int[Array, " B"]
    stops: Int[Array, " X"]
    """Ids that end a row, padded with -1."""


def generate(
    model: Pangu,
    token_lists: Sequence[Prompt] | np.ndarray,
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> list[Completion]:
    """One Completion per prompt of token ids, in order. Greedy when `sampling` is None.

    progress: called with the number of decode steps done after every dispatch
    Raises InputError: an empty prompt, an id outside the vocabulary, a prompt past the model's last
    position.
    """
    sampling = sampling or Sampling()
    prompts = [check_prompt(model.config, prompt) for prompt in token_lists]
    if not prompts:
        return []
    stops = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops |= frozenset(model.config.eos_token_ids)
    tokens, mask = _pad(prompts)
    request = _request(model, prompts, sampling, stops, rows=len(tokens))
    state, new = _prefill(model, tokens, mask, request)
    chosen = [jax.device_get(new)]
    steps = 1
    while (alive := np.asarray(state.left) > 0).any():
        if progress:
            progress(steps)
        state = _make_room(state, alive)
        state, new = _decode(model, state, request)
        chosen.append(jax.device_get(new))
        steps += int((chosen[-1][0] >= 0).any(axis=0).sum())
    ids = np.concatenate([ids for ids, _ in chosen], axis=1)
    logprobs = np.concatenate([logprobs for _, logprobs in chosen], axis=1)
    return [_completion(ids[row], logprobs[row], stops) for row in range(len(prompts))]


def check_prompt(config: ModelConfig, prompt: Any) -> np.ndarray:
    """The prompt as int32. Raises InputError."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # ragged
        raise InputError("a prompt must be a list of token ids") from None
    if ids.dtype == object and all(isinstance(token, int) for token in ids.reshape(-1)):
        raise InputError(f"a token id is outside the vocabulary of {config.vocab_size}")
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        what = "is empty" if ids.size == 0 else "must be a list of token ids"
        raise InputError(f"a prompt {what}")
    for wrong in ids[(ids < 0) | (ids >= config.vocab_size)][:1]:
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
    if ids.size > config.max_positions:
        raise InputError(
            f"a prompt of {ids.size} tokens is longer than the model's {config.max_positions} "
            "positions"
        )
    return ids.astype(np.int32)


def bucket(size: int, smallest: int = 1) -> int:
    """The padded size: the next power of two, so that few shapes are ever compiled."""
    return max(smallest, 1 << (size - 1).bit_length())


def _pad(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the left of a [rows, width] grid of bucket sizes, and the mask of what is real."""
    rows = bucket(len(prompts))
    width = bucket(max(prompt.size for prompt in prompts), SMALLEST_PROMPT)
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : prompt.size] = prompt
        mask[row, : prompt.size] = True
    return tokens, mask


def _request(
    model: Pangu,
    prompts: list[np.ndarray],
    sampling: Sampling,
    stops: frozenset[int],
    rows: int,
) -> Request:
    last = model.config.max_positions
    limits = np.zeros(rows, np.int32)
    # The token after the last position is chosen but never fed back, so a full prompt still gets
    # one.
    for row, prompt in enumerate(prompts):
        limits[row] = min(sampling.max_new_tokens, last - prompt.size + 1)
    stop_ids = np.full(bucket(len(stops), SMALLEST_STOPS), -1, np.int32)
    stop_ids[: len(stops)] = sorted(stops)
    if sampling.seed is None:
        seeds = [secrets.randbits(31) for _ in range(rows)]
    else:
        seeds = [sampling.seed % 2**31] * rows
    controls = Controls(
        temperature=jnp.full(rows, sampling.temperature, jnp.float32),
        top_k=jnp.full(rows, sampling.top_k, jnp.int32),
        top_p=jnp.full(rows, sampling.top_p, jnp.float32),
        keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.int32)),
    )
    return Request(controls, jnp.asarray(limits), jnp.asarray(stop_ids))


def _make_room(state: State, alive: np.ndarray) -> State:
    """Slots for the next chunk at least; a cache that must grow also gets room AHEAD."""
    length, left = np.asarray(state.cache.length)[alive], np.asarray(state.left)[alive]
    if (length + np.minimum(left, CHUNK)).max() <= state.cache.capacity:
        return state
    slots = bucket(int((length + np.minimum(left, AHEAD)).max()))
    return dataclasses.replace(state, cache=_grow(state.cache, slots))


_grow = jax.jit(caches.grow, static_argnames="capacity")


@jax.jit
def _prefill(
    model: Pangu, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], request: Request
) -> tuple[State, tuple[Int[Array, "B 1"], Float[Array, "B 1"]]]:
    """The prompts in a fresh cache of their own width, and the first token of each."""

    def local(model: Pangu, tokens: Array, mask: Array, request: Request) -> tuple:
        B, T = tokens.shape
        meta = Meta.from_mask(mask)
        hidden, cache = models.forward(model, tokens.reshape(-1), meta, model.empty_cache(B, T))
        assert cache is not None
        last = jnp.maximum(cache.length - 1, 0)
        ends = hidden.reshape(B, T, -1)[jnp.arange(B), last]
        return _advance(model, cache, ends, request.limits, request)

    state, (token, logprob) = models.on_mesh(model, local)(model, tokens, mask, request)
    return state, (token[:, None], logprob[:, None])


@jax.jit(donate_argnames="state")
def _decode(
    model: Pangu, state: State, request: Request
) -> tuple[State, tuple[Int[Array, "B C"], Float[Array, "B C"]]]:
    """Up to CHUNK more tokens of every unfinished row; -1 where a row had finished."""

    def local(model: Pangu, state: State, request: Request) -> tuple:
        B = state.token.shape[0]

        def step(carry: tuple) -> tuple:
            i, state, tokens, logprobs = carry
            state, (token, logprob) = _decode_one(model, state, request)
            put = lambda buffer, new: lax.dynamic_update_index_in_dim(buffer, new, i, axis=1)
            return i + 1, state, put(tokens, token), put(logprobs, logprob)

        going = lambda carry: (carry[0] < CHUNK) & jnp.any(carry[1].left > 0)
        blank = jnp.full((B, CHUNK), -1, jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
        _, state, *out = lax.while_loop(going, step, (jnp.int32(0), state, *blank))
        return state, tuple(out)

    return models.on_mesh(model, local)(model, state, request)


def _decode_one(model: Pangu, state: State, request: Request) -> tuple:
    alive = state.left > 0
    meta = Meta(state.cache.length[:, None], alive[:, None])
    hidden, cache = models.forward(model, state.token, meta, state.cache)
    assert cache is not None
    return _advance(model, cache, hidden, state.left, request)


def _advance(model: Pangu, cache: Cache, ends: Array, left: Array, request: Request) -> tuple:
    """The state after choosing the token that follows each row's last hidden state."""
    token, logprob = samplers.choose(models.logits(model, ends), request.controls, cache.length)
    alive = left > 0
    token = jnp.where(alive, token, -1)
    stopped = jnp.any(token[:, None] == request.stops[None, :], axis=1)
    left = jnp.where(stopped | ~alive, 0, left - 1)
    return State(cache, token, left), (token, logprob)


def _completion(ids: np.ndarray, logprobs: np.ndarray, stops: frozenset[int]) -> Completion:
    real = ids >= 0
    chosen = ids[real].tolist()
    reason: FinishReason = "stop" if chosen[-1] in stops else "length"
    return Completion(chosen, logprobs[real].tolist(), reason)
