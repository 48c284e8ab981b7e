"""Text from token ids as they come: each character once, as soon as it is certain."""

import codecs
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

from pangu_jax.text.tokenizer import Tokenizer

SPACE = "\u2581"


class Detokenizer:
    """The streaming form of `Tokenizer.decode`.

    The texts that `push` and `finish` return, one after another, are exactly what `decode` makes of
    all the ids. Bytes of an unfinished character wait for the rest.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._whole_runs = tokenizer.rewrites_text
        self._reset()

    def _reset(self) -> None:
        self._lead: list[int] = []  # what came before the first character of this run
        self._bytes: list[int] = []  # byte pieces that are not yet text
        self._started = False

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that these ids make certain."""
        return "".join(text for id in ids for text in self._next(int(id)))

    def finish(self) -> str:
        """What was held back. The next `push` begins a new text."""
        held = self._lead if self._whole_runs else self._bytes
        self._reset()
        return self._tokenizer.spell(held) if held else ""

    def _next(self, id: int) -> Iterator[str]:
        if id in self._skipped:
            return
        if (text := self._tokenizer.separators.get(id)) is not None:
            yield self.finish()
            yield text
        elif 0 <= id < len(self._tokenizer.pieces):
            if self._whole_runs:
                self._lead.append(id)
            elif self._tokenizer.processor.is_byte(id):
                self._bytes.append(id)
                yield self._certain_bytes()
            else:
                yield self._flush_bytes()
                yield self._piece(id)

    def _certain_bytes(self) -> str:
        pieces = self._tokenizer.pieces
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(int(pieces[id][1:-1], 16) for id in self._bytes))
        pending = utf8.getstate()[0]
        # Python waits for the rest of a surrogate, which no UTF-8 text has.
        surrogate = pending[:1] == b"\xed" and pending[1:2] >= b"\xa0"
        unfinished = 0 if surrogate else len(pending)
        if unfinished == len(self._bytes):
            return ""
        certain = self._bytes[: len(self._bytes) - unfinished]
        self._bytes = self._bytes[len(certain) :]
        self._started = True
        return self._tokenizer.spell(certain)

    def _flush_bytes(self) -> str:
        if not self._bytes:
            return ""
        text = self._tokenizer.spell(self._bytes)
        self._bytes, self._started = [], True
        return text

    def _piece(self, id: int) -> str:
        """A piece's text; only SentencePiece knows which spaces it drops at the start of a run."""
        processor = self._tokenizer.processor
        if not self._started:
            self._lead.append(id)
            text = self._tokenizer.spell(self._lead)
            self._started = bool(text)
            return text
        if processor.is_control(id):
            return ""
        if processor.is_unknown(id):
            return self._tokenizer.spell([id])
        return self._tokenizer.pieces[id].replace(SPACE, " ")
