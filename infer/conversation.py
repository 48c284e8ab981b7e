"""A conversation: messages, how they become prompts, and answers as they come. No terminal here."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from infer import generation, inputs
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax.model import Pangu
from pangu_jax.text import chat, markers
from pangu_jax.text.markers import Think
from pangu_jax.text.parse import Event, Parser, Reply
from pangu_jax.text.tokenizer import Tokenizer

# Positions kept free for an answer, where the model has that many (own choice).
ROOM = 1024


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished turn.

    stopped: by the reader, not by the model
    prompt_tokens, tokens: of the prompt and the answer, thinking included
    rate: tokens/s after the first
    """

    reply: Reply
    stopped: bool
    prompt_tokens: int
    tokens: int
    rate: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """The oldest messages that no longer fit, and are gone."""

    messages: int


class Conversation:
    """What was said, and with what settings the next answer is made."""

    def __init__(
        self,
        model: Pangu,
        tokenizer: Tokenizer,
        sampling: Sampling,
        think: Think | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.think: Think | None = think
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self._markers = markers.of(tokenizer)
        self._stopped = False

    def stop(self) -> None:
        """Ends the answer that is being given, after the tokens under way."""
        self._stopped = True

    def reset(self) -> None:
        """Forgets what was said; the settings stay."""
        self.messages = []

    def ask(self, text: str) -> Iterator[Event | Forgotten | Answer]:
        """The events of the answer to a user's message, then its Answer.

        The exchange is remembered if there is an answer, whole or stopped; of the thinking only
        that there was one (own choice: the next answer shall not rest on old drafts).

        Raises InputError when the message alone is too long; then nothing is forgotten.
        """
        self._stopped = False
        message = {"role": "user", "content": text}
        dropped, prompt = self._prompt(message)
        inputs.check_prompt(self.model.config, prompt)
        if dropped:
            self.messages = self.messages[dropped:]
            yield Forgotten(dropped)
        asked = chat.thinking_mode([*self._system(), message])
        parser = Parser(asked or self.think, self._markers)
        clock = _Clock()
        completion: Completion | None = None
        for piece in generation.stream(
            self.model, prompt, self.sampling, tokenizer=self.tokenizer, told=clock.tick
        ):
            if isinstance(piece, Completion):
                completion = piece
                break
            yield from parser.push(piece)
            if self._stopped:
                break
        yield from parser.finish()
        self._remember(text, parser.reply)
        yield Answer(
            parser.reply,
            self._stopped,
            len(prompt),
            clock.tokens,
            clock.rate,
            completion.finish_reason if completion else "stopped",
        )

    def _prompt(self, message: dict[str, Any]) -> tuple[int, list[int]]:
        """How many of the oldest messages must go, and the prompt without them."""
        most = self.model.config.max_positions
        room = min(ROOM, most // 4)
        dropped = 0
        while True:
            said = [*self._system(), *self.messages[dropped:], message]
            ids = chat.encode(self.tokenizer, said, think=self.think, markers=self._markers)
            if len(ids) + room <= most or dropped == len(self.messages):
                return dropped, ids
            dropped += 2  # a question and its answer

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _remember(self, text: str, reply: Reply) -> None:
        if not (reply.answer or reply.tool_calls):
            return
        answer: dict[str, Any] = {"role": "assistant", "content": reply.answer}
        if reply.tool_calls:
            answer["tool_calls"] = [dataclasses.asdict(call) for call in reply.tool_calls]
        if reply.thinking:
            answer["thinking"] = ""
        self.messages += [{"role": "user", "content": text}, answer]


class _Clock:
    """Counts an answer's tokens and time."""

    def __init__(self) -> None:
        self.tokens = 0
        self._first = self._last = time.perf_counter()

    def tick(self, tokens: int) -> None:
        """So many tokens are there now."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens = tokens

    @property
    def rate(self) -> float:
        """Tokens/s after the first token."""
        seconds = self._last - self._first
        return (self.tokens - 1) / seconds if seconds > 0 else 0.0
