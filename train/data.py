"""JSON lines to examples: documents to continue, or conversations to answer.

A file is hostile until checked: a bad line ends the run before it begins, named by its number.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infer import files
from pangu_jax import strict
from pangu_jax.errors import InputError, PanguError
from pangu_jax.text import chat
from pangu_jax.text import markers as marking
from pangu_jax.text import messages as conversation
from pangu_jax.text.markers import Markers, Think
from pangu_jax.text.tokenizer import Tokenizer
from train.packing import Example

# No tokenizer has a piece of this and something else.
SOMETHING = "\x01"


def documents(path: Path, tokenizer: Tokenizer, length: int) -> Iterator[Example]:
    """The documents of {"text": ...} lines, every token to be learnt, in pieces of `length`.

    A document begins with BOS and ends with EOS, where the tokenizer has them. Raises InputError.
    """
    ends = ([tokenizer.bos_id], [tokenizer.eos_id])
    first, last = ([id for id in end if id is not None] for end in ends)
    for where, line in files.json_lines(path):
        text = line.get("text")
        if not isinstance(text, str):
            raise InputError(f'{where}: "text" must be a string, not {strict.describe(text)}')
        ids = first + tokenizer.encode(text, add_special_tokens=False) + last
        # The last token of a piece is the first of the next: no other token predicts it there.
        for start in range(0, max(len(ids) - 1, 1), length - 1):
            piece = np.array(ids[start : start + length], np.int32)
            yield Example(piece, np.ones(piece.size, bool))


def conversations(path: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """The conversations of {"messages": [...], "think": ..., "tools": ...} lines.

    What is learnt is what assistants say, up to and with the token that ends their turn; what comes
    before is the prompt that a chat would have then. Raises InputError.
    """
    markers = marking.of(tokenizer)
    for where, line in files.json_lines(path):
        try:
            talk = _talk(line)
            found = list(_turns(talk, tokenizer, markers))
        except PanguError as error:
            raise InputError(f"{where}: {error}") from None
        if not found:
            raise InputError(f"{where}: no message of an assistant, so there is nothing to learn")
        yield from found


@dataclasses.dataclass(frozen=True)
class _Talk:
    """One line, checked."""

    messages: tuple[dict, ...]
    think: Think | None
    tools: tuple[dict, ...] | None


def _talk(line: dict[str, Any]) -> _Talk:
    if "messages" not in line:
        raise InputError('needs "messages"')
    messages = strict.coerce(tuple[dict, ...], line["messages"], "messages")
    for i, plain in enumerate(conversation.read(messages), 1):
        if plain.role not in chat.TITLES:
            raise InputError(
                f"message {i}: unknown role {strict.shorten(plain.role)}"
                f"{strict.suggest(plain.role, chat.TITLES)}"
            )
    return _Talk(
        messages,
        strict.coerce(Think | None, line.get("think"), "think"),
        strict.coerce(tuple[dict, ...] | None, line.get("tools"), "tools"),
    )


def _turns(talk: _Talk, tokenizer: Tokenizer, markers: Markers) -> Iterator[Example]:
    """One example of all turns, as long as every prompt goes on from the turn before. Where it does
    not, another one begins: a thought that is over is not told again, a thinking switch moves on.
    """
    ids: list[int] = []
    learn: list[bool] = []
    for i, message in enumerate(conversation.read(talk.messages)):
        if message.role != "assistant":
            continue
        before = [_without_thought(each) for each in talk.messages[:i]]
        encode = functools.partial(
            chat.encode, tokenizer, before, think=talk.think, tools=talk.tools, markers=markers
        )
        prompt, said = encode(), message.text(markers) + markers.turn_end
        whole = encode(begun=said)
        if whole[: len(prompt)] != prompt:  # a token across the border: generation has none
            whole = prompt + _going_on(tokenizer, said)
        if ids and prompt[: len(ids)] != ids:
            yield Example(np.array(ids, np.int32), np.array(learn))
            ids, learn = [], []
        learn += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids = whole
    if ids:
        yield Example(np.array(ids, np.int32), np.array(learn))


def _going_on(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that something goes before, without those of that and without BOS."""
    before = tokenizer.encode(SOMETHING, add_special_tokens=False)
    ids = tokenizer.encode(SOMETHING + text, add_special_tokens=False)
    if ids[: len(before)] == before:
        ids = ids[len(before) :]
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    return [id for id in ids if id != tokenizer.bos_id]


def _without_thought(message: dict[str, Any]) -> dict[str, Any]:
    """The message as a chat remembers it: that there was thinking, not what it was."""
    thoughts = [key for key in ("thinking", "reasoning_content") if key in message]
    return {**message, **{key: "" if message[key] else None for key in thoughts}}
