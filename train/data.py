"""JSON lines to examples: documents to continue, or conversations to answer.

A file is hostile until checked: a bad line ends the run before it begins, named by its number.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pangu_jax import strict
from pangu_jax.errors import InputError
from pangu_jax.text import chat
from pangu_jax.text import markers as marking
from pangu_jax.text import messages as conversation
from pangu_jax.text.markers import Markers
from pangu_jax.text.tokenizer import Tokenizer
from train.packing import Example

# One line; a document is shorter, anything longer is not JSON lines (own choice).
MAX_LINE_BYTES = 64 * 2**20


def documents(path: Path, tokenizer: Tokenizer, length: int) -> Iterator[Example]:
    """The documents of {"text": ...} lines, every token to be learnt, in pieces of `length`.

    A document begins with BOS and ends with EOS, where the tokenizer has them. Raises InputError.
    """
    ends = ([tokenizer.bos_id], [tokenizer.eos_id])
    first, last = ([id for id in end if id is not None] for end in ends)
    for where, line in _lines(path):
        text = line.get("text")
        if not isinstance(text, str):
            raise InputError(f'{where}: "text" must be a string, not {strict.describe(text)}')
        ids = first + tokenizer.encode(text, add_special_tokens=False) + last
        for start in range(0, len(ids), length):
            piece = np.array(ids[start : start + length], np.int32)
            yield Example(piece, np.ones(piece.size, bool))


def conversations(path: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """The conversations of {"messages": [...], "think": ..., "tools": ...} lines.

    What is learnt is what assistants say, up to and with the token that ends their turn; what comes
    before is exactly the prompt that generation would see. Raises InputError.
    """
    markers = marking.of(tokenizer)
    for where, line in _lines(path):
        if "messages" not in line:
            raise InputError(f'{where}: needs "messages"')
        try:
            found = list(_turns(line, tokenizer, markers))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if not found:
            raise InputError(f"{where}: no message of an assistant, so there is nothing to learn")
        yield from found


def _turns(line: dict[str, Any], tokenizer: Tokenizer, markers: Markers) -> Iterator[Example]:
    """One example of all turns, as long as every prompt goes on from the turn before; where a
    template rewrites what was said (a thinking switch that moves on), another one begins.
    """
    messages, think = line["messages"], line.get("think")
    if think is not None:
        chat.check_think(think)
    plain = conversation.read(messages)
    ids: list[int] = []
    learn: list[bool] = []
    for i, message in enumerate(plain):
        if message.role != "assistant":
            continue
        prompt = chat.encode(tokenizer, messages[:i], think=think, tools=line.get("tools"))
        if ids and prompt[: len(ids)] != ids:
            yield Example(np.array(ids, np.int32), np.array(learn))
            ids, learn = [], []
        said = tokenizer.encode(message.text(markers) + markers.turn_end, add_special_tokens=False)
        learn += [False] * (len(prompt) - len(ids)) + [True] * len(said)
        ids = prompt + said
    if ids:
        yield Example(np.array(ids, np.int32), np.array(learn))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line's place for a complaint, and its object; empty lines are skipped."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 (byte {error.start})") from None
            if text:
                yield where, strict.parse_json_object(text, where)
