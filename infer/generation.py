"""Generation: prompts of token ids in, completions out, in few compiled shapes.

Prompts are ragged: they are padded on the right to powers of two. Between dispatches the host looks
for the end, gives text, can be interrupted, and makes room in the cache.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from infer import decode, thinking
from infer.decode import Request, State
from infer.output import Completion, FinishReason, Row
from infer.sampler import Choice, Controls, Shaping
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer

__all__ = ["Completion", "Decoding", "FinishReason", "check_prompt", "generate", "stream"]

# A cache that must grow gets room for this many tokens more, rounded up to a power of two: every
# size compiles once, and unused slots are still read.
AHEAD = 512

SMALLEST_PROMPT = 16
SMALLEST_STOPS = 8

# How long a reader may wait for the next words of a stream.
STREAM_SECONDS = 0.08

Progress = Callable[[int], None]
Prompt = Sequence[SupportsIndex] | np.ndarray


def generate(
    model: Pangu,
    token_lists: Sequence[Prompt] | np.ndarray,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """The completions of prompts of token ids, in order; `sampling.n` in a row for each prompt.

    sampling: for all prompts, or one for each; None is greedy
    tokenizer: gives completions their text; stop strings and thinking budgets need one
    progress: called with the number of decode steps done after every dispatch
    Raises InputError: an empty prompt, an id outside the vocabulary, a prompt past the model's last
    position, settings that need a tokenizer.
    """
    if len(token_lists) == 0:
        return []
    decoding = Decoding(model, token_lists, sampling, tokenizer)
    while decoding.alive:
        decoding.step()
        if progress and decoding.alive:
            progress(decoding.steps)
    return [row.completion for row in decoding.rows]


def stream(
    model: Pangu,
    prompt: Prompt,
    sampling: Sampling | None = None,
    *,
    tokenizer: Tokenizer,
    told: Progress = lambda tokens: None,
) -> Iterator[str | Completion]:
    """The text of one completion as it becomes certain, "" when nothing is; its Completion last.

    told: called with the number of tokens so far, before their text comes
    Errors as for `generate`; `sampling.n` must be 1.
    """
    if sampling is not None and sampling.n != 1:
        raise InputError("n must be 1 in a stream")
    decoding = Decoding(model, [prompt], sampling, tokenizer)
    steps = 1
    while decoding.alive:
        start, before = time.perf_counter(), decoding.steps
        (text,) = decoding.step(steps)
        each = (time.perf_counter() - start) / max(decoding.steps - before, 1)
        steps = max(int(STREAM_SECONDS / each), 1)
        told(decoding.steps)
        yield text
    yield decoding.rows[0].completion


class Decoding:
    """A batch on its way: every `step` is one dispatch, and tells each row's new text."""

    def __init__(
        self,
        model: Pangu,
        token_lists: Sequence[Prompt] | np.ndarray,
        sampling: Sampling | Sequence[Sampling] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        prompts = [check_prompt(model.config, prompt) for prompt in token_lists]
        settings = _settings(sampling, len(prompts), model.config, tokenizer)
        ends = [_end_ids(each, model.config) for each in settings]
        self.rows = [
            Row(each, end_ids, tokenizer)
            for each, end_ids in zip(settings, ends, strict=True)
            for _ in range(each.n)
        ]
        self.steps = 0
        """Tokens that the longest row has so far."""
        self._model = model
        self._tokens, self._mask = _pad(prompts)
        # In powers of two: every number is a program of its own.
        most = max(each.top_logprobs for each in settings)
        self._top = bucket(most) if most else 0
        self._request = _request(model.config, prompts, settings, ends, tokenizer)
        self._state: State | None = None

    @property
    def alive(self) -> bool:
        """Whether any row goes on."""
        return any(row.finish_reason is None for row in self.rows)

    def step(self, steps: int | None = None) -> list[str]:
        """Up to `steps` more tokens of every row, CHUNK at most (the first call: one), and their
        texts.
        """
        if not self.alive:
            return [""] * len(self.rows)
        if self._state is None:
            state, choice = decode.prefill(
                self._model, self._tokens, self._mask, self._request, self._top
            )
        else:
            state = _make_room(self._state)
            most = min(steps or decode.CHUNK, decode.CHUNK)
            state, choice = decode.decode(
                self._model, state, self._request, jnp.asarray(most, jnp.int32), self._top
            )
        return self._collect(state, choice)

    def _collect(self, state: State, choice: Choice) -> list[str]:
        ids, logprobs = np.asarray(choice.token), np.asarray(choice.logprob)
        likeliest = None if choice.top is None else tuple(map(np.asarray, choice.top))
        left, texts = np.array(state.left), []
        for i, row in enumerate(self.rows):
            if row.finish_reason is not None:
                texts.append("")
                continue
            top = None if likeliest is None else (likeliest[0][i], likeliest[1][i])
            text = row.take(ids[i], logprobs[i], top)
            if left[i] == 0:
                text += row.end()
            elif row.finish_reason is not None:  # a stop string: the device does not know
                left[i] = 0
                # Placed as it was: another placement would be another program.
                placed = jax.device_put(left, state.left.sharding)
                state = dataclasses.replace(state, left=placed)
            texts.append(text)
        self.steps = max(row.num_tokens for row in self.rows)
        self._state = state
        return texts


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


def check_sampling(sampling: Sampling, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises InputError for settings that this model or its tokenizer cannot honour."""
    if sampling.needs_tokenizer and tokenizer is None:
        raise InputError(f"{sampling.needs_tokenizer} needs a tokenizer")
    if sampling.thinking_budget is not None and tokenizer is not None:
        thinking.marker_ids(tokenizer, config.vocab_size)
    for id in sampling.logit_bias:
        if not 0 <= id < config.vocab_size:
            raise InputError(
                f"logit_bias: token id {id} is outside the vocabulary of {config.vocab_size}"
            )


def bucket(size: int, smallest: int = 1) -> int:
    """The padded size: the next power of two, so that few shapes are ever compiled."""
    return max(smallest, 1 << (size - 1).bit_length())


def _settings(
    sampling: Sampling | Sequence[Sampling] | None,
    prompts: int,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
) -> list[Sampling]:
    """One Sampling per prompt, each checked against the model."""
    if sampling is None or isinstance(sampling, Sampling):
        settings = [sampling or Sampling()] * prompts
    else:
        settings = list(sampling)
    if len(settings) != prompts:
        raise InputError(f"{len(settings)} samplings for {prompts} prompts")
    for each in settings:
        check_sampling(each, config, tokenizer)
    return settings


def _end_ids(sampling: Sampling, config: ModelConfig) -> frozenset[int]:
    ends = frozenset(sampling.stop_token_ids)
    return ends if sampling.ignore_eos else ends | frozenset(config.eos_token_ids)


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
    config: ModelConfig,
    prompts: list[np.ndarray],
    settings: list[Sampling],
    ends: list[frozenset[int]],
    tokenizer: Tokenizer | None,
) -> Request:
    """The rows of all prompts, padded to a bucket with rows that have nothing to do."""
    rows = [(i, j) for i, each in enumerate(settings) for j in range(each.n)]
    blank = bucket(len(rows)) - len(rows)
    # The token after the last position is chosen but never fed back, so a full prompt gets one.
    limits = [
        min(settings[i].max_new_tokens, config.max_positions - prompts[i].size + 1) for i, _ in rows
    ]
    stops = np.full((len(rows) + blank, bucket(max(map(len, ends)), SMALLEST_STOPS)), -1, np.int32)
    for row, (i, _) in enumerate(rows):
        stops[row, : len(ends[i])] = sorted(ends[i])
    of_row = [settings[i] for i, _ in rows] + [Sampling()] * blank
    sources = None
    if len(rows) > len(prompts):
        sources = jnp.asarray([i for i, _ in rows] + [0] * blank, jnp.int32)
    budget = thought = None
    if any(each.thinking_budget is not None for each in settings):
        assert tokenizer is not None
        budgets = [each.thinking_budget for each in of_row]
        budget = thinking.budget(tokenizer, budgets, config.vocab_size)
        open_thoughts = [thinking.used_in_prompt(budget, prompts[i]) for i, _ in rows]
        thought = jnp.asarray(open_thoughts + [thinking.NOT_THINKING] * blank, jnp.int32)
    return Request(
        _controls(of_row, _keys(settings, blank), config.vocab_size),
        jnp.asarray(limits + [0] * blank, jnp.int32),
        jnp.asarray(stops),
        sources,
        budget,
        thought,
    )


def _keys(settings: list[Sampling], blank: int) -> jax.Array:
    """A key for every row: of the request's seed, and which of its n completions it is."""
    fresh = lambda seed: secrets.randbits(31) if seed is None else int(seed) % 2**31
    pairs = [(seed, j) for each in settings for seed in [fresh(each.seed)] for j in range(each.n)]
    seeds, which = np.array(pairs + [(0, 0)] * blank, np.int32).T
    return jax.vmap(lambda s, j: jax.random.fold_in(jax.random.key(s), j))(
        jnp.asarray(seeds), jnp.asarray(which)
    )


def _controls(rows: list[Sampling], keys: jax.Array, vocab: int) -> Controls:
    floats = lambda name: jnp.asarray([getattr(row, name) for row in rows], jnp.float32)
    shaping = None
    if any(row.shapes_logits for row in rows):
        bias = np.zeros((len(rows), vocab), np.float32)
        for i, row in enumerate(rows):
            for id, value in row.logit_bias.items():
                bias[i, id] = value
        shaping = Shaping(
            floats("repetition_penalty"),
            floats("presence_penalty"),
            floats("frequency_penalty"),
            jnp.asarray(bias),
        )
    return Controls(
        floats("temperature"),
        jnp.asarray([row.top_k for row in rows], jnp.int32),
        floats("top_p"),
        floats("min_p"),
        keys,
        shaping,
    )


def _make_room(state: State) -> State:
    """Slots for the next chunk at least; a cache that must grow also gets room AHEAD."""
    left = np.asarray(state.left)
    length, left = np.asarray(state.cache.length)[left > 0], left[left > 0]
    if (length + np.minimum(left, decode.CHUNK)).max() <= state.cache.capacity:
        return state
    slots = bucket(int((length + np.minimum(left, AHEAD)).max()))
    return dataclasses.replace(state, cache=decode.grow(state.cache, slots))
