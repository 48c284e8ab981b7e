"""What a request gets back, put together on the host as tokens arrive."""

import dataclasses
from typing import Any, Literal

import numpy as np

from infer.sampling import Sampling
from pangu_jax.text import markers, parse
from pangu_jax.text.detokenizer import Detokenizer
from pangu_jax.text.markers import Think
from pangu_jax.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    token_ids: without the prompt, with the end-of-sequence or stop token that ended it
    logprobs: of each token, in the distribution it was chosen from
    finish_reason: "stop" after an end token or stop string, "length" at max_new_tokens or the
        model's last position; of the engine also "cancelled" and "deadline"
    text: special tokens spelt out, without the token or string that ended it; None without a
        tokenizer
    top_logprobs: of each token's position, the likeliest ids, most likely first; None when not
        asked for
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str | None = None
    top_logprobs: list[dict[int, float]] | None = None


class Row:
    """One completion in the making."""

    def __init__(
        self, sampling: Sampling, end_ids: frozenset[int], tokenizer: Tokenizer | None
    ) -> None:
        self._sampling = sampling
        self._end_ids = end_ids
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._text = StopText(sampling.stop)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    def take(
        self, ids: np.ndarray, logprobs: np.ndarray, top: tuple[np.ndarray, np.ndarray] | None
    ) -> str:
        """The text that these tokens make certain; ids below 0 are no tokens.

        ids [C], logprobs [C], top ([C, K] ids, [C, K] log-probabilities). What comes after the
        row's end is ignored.
        """
        text = ""
        for i in np.flatnonzero(ids >= 0):
            if self.finish_reason is not None:
                break
            self._token_ids.append(int(ids[i]))
            self._logprobs.append(float(logprobs[i]))
            if top is not None:
                self._top.append(_likeliest(top[0][i], top[1][i], self._sampling.top_logprobs))
            text += self._read(int(ids[i]))
        return text

    def end(self) -> str:
        """The text that was held back; no more tokens come."""
        if self.finish_reason == "stop":
            return ""
        self.finish_reason = "length"
        if self._detokenizer is None:
            return ""
        text = self._text.add(self._detokenizer.finish())
        if self._text.found:
            self.finish_reason = "stop"
        return text + self._text.finish()

    def give_up(self, reason: FinishReason) -> str:
        """Ends it where it is; returns the text that was held back."""
        text = self.end()
        self.finish_reason = reason
        return text

    def _read(self, id: int) -> str:
        ended = id in self._end_ids
        if ended:
            self.finish_reason = "stop"
        if self._detokenizer is None:
            return ""
        # The bytes of a character that the end cuts off are text too.
        text = self._text.add(self._detokenizer.finish() if ended else self._detokenizer.push([id]))
        if self._text.found:
            self.finish_reason = "stop"
        return text + self._text.finish() if ended else text

    @property
    def completion(self) -> Completion:
        """The completion, once it has ended."""
        return Completion(
            self._token_ids,
            self._logprobs,
            self.finish_reason or "length",
            self._text.text if self._detokenizer else None,
            self._top if self._sampling.top_logprobs else None,
        )


def as_json(
    completion: Completion,
    tokenizer: Tokenizer | None,
    chat: bool = False,
    think: Think | None = None,
) -> dict[str, Any]:
    """A completion as JSON; of a chat also its parts. Text is null without a tokenizer."""
    found: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.top_logprobs is not None:
        found["top_logprobs"] = completion.top_logprobs
    if chat and tokenizer is not None:
        reply = parse.parse(completion.text or "", think, markers.of(tokenizer))
        found |= dataclasses.asdict(reply)
    return found


class StopText:
    """Text up to the stop string that ends first (the longest of those): `add` returns what can no
    longer be part of one.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._given: list[str] = []
        self._held = ""
        self.found = False

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._given)

    def add(self, more: str) -> str:
        """The text that is certain now; nothing after a stop string."""
        if self.found:
            return ""
        self._held += more
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._give(min(found)[1], keep=False)
        return self._give(len(self._held) - self._unsure())

    def finish(self) -> str:
        """The text that was held back; no more comes."""
        return "" if self.found else self._give(len(self._held))

    def _give(self, size: int, keep: bool = True) -> str:
        certain, self._held = self._held[:size], self._held[size:] if keep else ""
        self._given.append(certain)
        return certain

    def _unsure(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


def _likeliest(ids: np.ndarray, logprobs: np.ndarray, most: int) -> dict[int, float]:
    """The `most` likeliest tokens of a position; impossible ones are left out."""
    pairs = zip(ids[:most].tolist(), logprobs[:most].tolist(), strict=True)
    return {id: logprob for id, logprob in pairs if np.isfinite(logprob)}
