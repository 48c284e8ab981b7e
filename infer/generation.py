"""Generation: prompts of token ids in, completions out.

Between dispatches the host looks for the end, gives text, can be interrupted, and makes room in the
cache.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from infer import decode, inputs
from infer.decode import State
from infer.output import Completion, Row
from infer.sampler import Choice
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer

# A cache that must grow gets room for this many tokens more, rounded up to a power of two: every
# size compiles once, and unused slots are still read.
AHEAD = 512

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
        prompts = [inputs.check_prompt(model.config, prompt) for prompt in token_lists]
        settings = inputs.settings(sampling, len(prompts), model.config, tokenizer)
        ends = [inputs.end_ids(each, model.config) for each in settings]
        self.rows = [
            Row(each, end_ids, tokenizer)
            for each, end_ids in zip(settings, ends, strict=True)
            for _ in range(each.n)
        ]
        self.steps = 0
        """Tokens that the longest row has so far."""
        self._model = model
        where = model.layout
        of_rows = [p for p, each in zip(prompts, settings, strict=True) for _ in range(each.n)]
        # A replica of attention has its rows' caches, and no others': it reads a prompt n times.
        self._tokens, self._mask = inputs.pad(of_rows if where.of("batch") else prompts, where)
        # In powers of two: every number is a program of its own.
        most = max(each.top_logprobs for each in settings)
        self._top = inputs.bucket(most) if most else 0
        self._request = inputs.request(model.config, prompts, settings, ends, tokenizer, where)
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


def _make_room(state: State) -> State:
    """Slots for the next chunk at least; a cache that must grow also gets room AHEAD."""
    left = np.asarray(state.left)
    length, left = np.asarray(state.cache.length)[left > 0], left[left > 0]
    if (length + np.minimum(left, decode.CHUNK)).max() <= state.cache.capacity:
        return state
    slots = inputs.bucket(int((length + np.minimum(left, AHEAD)).max()))
    return dataclasses.replace(state, cache=decode.grow(state.cache, slots))
