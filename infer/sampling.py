"""What a request asks of its tokens: length, randomness, penalties, where to stop."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pangu_jax import strict
from pangu_jax.errors import InputError

# Below this a float32 cumulative sum cannot tell it from nothing.
SMALLEST_TOP_P = 1e-30
MAX_TOP_LOGPROBS = 100
MAX_N = 1024

# Far more than has any effect, and far from where float32 would overflow.
MAX_SHIFT = 1e6
MAX_FACTOR = 1000


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one request; the default is greedy.

    Raises InputError for values that make no sense.

    max_new_tokens: the most tokens to generate
    temperature: 0 is greedy; what is smaller than 0.0001 counts as that
    top_k: sample among the k likeliest tokens; 0 or -1 is off
    top_p: sample among the likeliest tokens that together reach this probability
    min_p: sample among tokens at least this fraction as likely as the likeliest; 0 is off
    repetition_penalty: above 1, tokens of the prompt and the answer so far become less likely:
        positive logits are divided by it, negative ones multiplied (CTRL, arXiv 1909.05858)
    presence_penalty: taken from the logit of every token of the answer so far
    frequency_penalty: the same, once for every time it is there
    logit_bias: added to logits, by token id
    seed: the draw at a position depends on the seed and the position alone; None seeds every prompt
        afresh
    n: completions of every prompt; they differ as if their seeds did
    top_logprobs: report this many of the likeliest tokens at every position
    stop_token_ids: generation also ends after one of these
    stop: generation also ends when its text contains one of these strings; needs a tokenizer
    ignore_eos: do not end at the model's end-of-sequence tokens
    thinking_budget: the most tokens of thinking before it is closed; needs a tokenizer
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    seed: int | None = None
    n: int = 1
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "n", "top_logprobs"):
            _check_integer(name, getattr(self, name))
        for name in ("seed", "thinking_budget"):
            _check_integer(name, getattr(self, name), optional=True)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _check_number(name, getattr(self, name))
        for name in ("presence_penalty", "frequency_penalty"):
            _check_shift(name, getattr(self, name))
        if not isinstance(self.ignore_eos, bool):
            raise InputError("ignore_eos must be true or false")
        self._check_stops()
        self._check_bias()
        for name, most in (("n", MAX_N), ("max_new_tokens", 2**31)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} must be from 1 to {most}, not {getattr(self, name)}")
        if self.top_k < -1:
            raise InputError(f"top_k must be positive, or 0 or -1 for off, not {self.top_k}")
        if not SMALLEST_TOP_P <= self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p > 1:
            raise InputError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 1 / MAX_FACTOR <= self.repetition_penalty <= MAX_FACTOR:
            raise InputError(
                f"repetition_penalty must be from {1 / MAX_FACTOR} to {MAX_FACTOR}, not "
                f"{self.repetition_penalty}; 1 is off"
            )
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InputError(
                f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, not {self.top_logprobs}"
            )
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise InputError(f"thinking_budget must be 0 or more, not {self.thinking_budget}")

    @property
    def shapes_logits(self) -> bool:
        """Whether penalties or biases change the logits."""
        off = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return not off or bool(self.logit_bias)

    @property
    def needs_tokenizer(self) -> str | None:
        """The field that cannot be honoured without a tokenizer, if one is set."""
        if self.stop:
            return "stop"
        return "thinking_budget" if self.thinking_budget is not None else None

    def _check_stops(self) -> None:
        ids = _tuple(self.stop_token_ids, "stop_token_ids must be a list of token ids")
        for id in ids:
            _check_integer("stop_token_ids", id)
        strings = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = _tuple(strings, "stop must be a list of strings")
        if not all(isinstance(text, str) and text for text in strings):
            raise InputError("stop must be a list of strings that are not empty")
        object.__setattr__(self, "stop_token_ids", tuple(int(id) for id in ids))
        object.__setattr__(self, "stop", strings)

    def _check_bias(self) -> None:
        try:
            bias = dict(self.logit_bias)
        except (TypeError, ValueError):
            raise InputError("logit_bias must map token ids to numbers") from None
        for id, value in bias.items():
            _check_integer("logit_bias", id)
            _check_shift("logit_bias", value)
        object.__setattr__(self, "logit_bias", bias)


def _tuple(values: Any, complaint: str) -> tuple:
    try:
        return tuple(values)
    except TypeError:
        raise InputError(complaint) from None


def _check_integer(name: str, value: Any, optional: bool = False) -> None:
    """Integers must fit the device's 32 bits."""
    if optional and value is None:
        return
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or abs(int(value)) >= 2**31:
        raise InputError(f"{name} must be an integer below 2**31, not {strict.describe(value)}")


def _check_shift(name: str, value: Any) -> None:
    """What is added to logits."""
    _check_number(name, value, negative=True)
    if abs(value) > MAX_SHIFT:
        raise InputError(f"{name} must be from {-MAX_SHIFT:g} to {MAX_SHIFT:g}, not {value}")


def _check_number(name: str, value: Any, negative: bool = False) -> None:
    """Numbers must be finite in float32."""
    number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not number or not abs(value) < 1e38:
        raise InputError(f"{name} must be a finite number, not {strict.describe(value)}")
    if value < 0 and not negative:
        raise InputError(f"{name} must be 0 or more, not {value}")
