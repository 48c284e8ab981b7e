"""One record as token ids: a document to go on with, or a conversation to answer."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from pangu_jax import strict
from pangu_jax.errors import InputError, PanguError
from pangu_jax.text import chat
from pangu_jax.text import markers as marking
from pangu_jax.text import messages as conversation
from pangu_jax.text.markers import Markers, Think
from pangu_jax.text.tokenizer import Tokenizer
from train.data.records import Record

# No tokenizer has a piece of this and something else.
SOMETHING = "\x01"

# Whose tokens are learnt: all that assistants say, their last turn only, or everybody's.
Learn = Literal["assistants", "last", "all"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids, and which of them are to be learnt."""

    ids: Int[np.ndarray, " T"]
    learn: Bool[np.ndarray, " T"]


Encode = Callable[[dict[str, Any]], Iterator[Example]]


def of(record: Record, encode: Encode) -> list[Example]:
    """The examples of a record. Raises InputError, naming its place."""
    if isinstance(record.value, InputError):
        raise record.value
    try:
        return list(encode(record.value))
    except PanguError as error:
        raise InputError(f"{record.where}: {error}") from None


def documents(tokenizer: Tokenizer) -> Encode:
    """Of {"text": ...}: one example, every token to be learnt.

    A document begins with BOS and ends with EOS, where the tokenizer has them.
    """
    ends = ([tokenizer.bos_id], [tokenizer.eos_id])
    first, last = ([id for id in end if id is not None] for end in ends)

    def encode(line: dict[str, Any]) -> Iterator[Example]:
        text = line.get("text")
        if not isinstance(text, str):
            raise InputError(f'"text" must be a string, not {strict.describe(text)}')
        ids = first + tokenizer.encode(text, add_special_tokens=False) + last
        yield Example(np.array(ids, np.int32), np.ones(len(ids), bool))

    return encode


def conversations(tokenizer: Tokenizer, learn: Learn = "assistants") -> Encode:
    """Of {"messages": [...], "think": ..., "tools": ...}: what assistants say is learnt, up to and
    with the token that ends their turn; what comes before is the prompt that a chat would have
    then. An assistant's message with "learn": false is not learnt, with true it is.
    """
    markers = marking.of(tokenizer)

    def encode(line: dict[str, Any]) -> Iterator[Example]:
        found = list(_turns(_talk(line, learn), tokenizer, markers, learn == "all"))
        if not found:
            raise InputError("no message of an assistant, so there is nothing to learn")
        yield from (example for example in found if example.learn.any())

    return encode


def either(text: Encode, talk: Encode) -> Encode:
    """Of records that have "messages" conversations, of others documents."""
    return lambda line: (talk if "messages" in line else text)(line)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """One record, checked. learn: of each message, whether what it says is learnt."""

    messages: tuple[dict, ...]
    learn: tuple[bool, ...]
    think: Think | None
    tools: tuple[dict, ...] | None


def _talk(line: dict[str, Any], learn: Learn) -> _Talk:
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
        _learnt(messages, learn),
        strict.coerce(Think | None, line.get("think"), "think"),
        strict.coerce(tuple[dict, ...] | None, line.get("tools"), "tools"),
    )


def _learnt(messages: tuple[dict, ...], learn: Learn) -> tuple[bool, ...]:
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = []
    for i, message in enumerate(messages):
        own = message.get("learn") if i in said else False
        if own is None:  # as where there is none: in a table every message has every field
            own = learn != "last" or i == said[-1]
        if not isinstance(own, bool):
            raise InputError(
                f"message {i + 1}: learn must be true or false, not {strict.describe(own)}"
            )
        found.append(own)
    return tuple(found)


def _turns(talk: _Talk, tokenizer: Tokenizer, markers: Markers, prompts: bool) -> Iterator[Example]:
    """One example of all turns, as long as every prompt goes on from the turn before. Where it does
    not, another one begins: a thought that is over is not told again, a thinking switch moves on.

    prompts: they are learnt too
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
        learn += [prompts] * (len(prompt) - len(ids))
        learn += [talk.learn[i]] * (len(whole) - len(prompt))
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
