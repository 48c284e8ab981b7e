"""Prompts and settings, checked, and made into the rows of a batch on the device.

Prompts are ragged: they are padded on the right to powers of two, so that few shapes are compiled.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer import thinking
from infer.decode import Request
from infer.sampler import Controls, Shaping
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.parallel.layout import Layout
from pangu_jax.text.tokenizer import Tokenizer

SMALLEST_PROMPT = 16
SMALLEST_STOPS = 8


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


def settings(
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


def end_ids(sampling: Sampling, config: ModelConfig) -> frozenset[int]:
    """The ids that end a completion."""
    ends = frozenset(sampling.stop_token_ids)
    return ends if sampling.ignore_eos else ends | frozenset(config.eos_token_ids)


def pad(prompts: list[np.ndarray], where: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the left of a [rows, width] grid of bucket sizes, and the mask of what is real."""
    rows = where.round_rows(bucket(len(prompts)))
    width = bucket(max(prompt.size for prompt in prompts), SMALLEST_PROMPT)
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : prompt.size] = prompt
        mask[row, : prompt.size] = True
    return tokens, mask


def request(
    config: ModelConfig,
    prompts: list[np.ndarray],
    settings: list[Sampling],
    ends: list[frozenset[int]],
    tokenizer: Tokenizer | None,
    where: Layout,
) -> Request:
    """The rows of all prompts, padded to a bucket with rows that have nothing to do."""
    rows = [(i, j) for i, each in enumerate(settings) for j in range(each.n)]
    blank = where.round_rows(bucket(len(rows))) - len(rows)
    # The token after the last position is chosen but never fed back, so a full prompt gets one.
    limits = [
        min(settings[i].max_new_tokens, config.max_positions - prompts[i].size + 1) for i, _ in rows
    ]
    stops = np.full((len(rows) + blank, bucket(max(map(len, ends)), SMALLEST_STOPS)), -1, np.int32)
    for row, (i, _) in enumerate(rows):
        stops[row, : len(ends[i])] = sorted(ends[i])
    of_row = [settings[i] for i, _ in rows] + [Sampling()] * blank
    sources = None
    if len(rows) > len(prompts) and not where.of("batch"):
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
