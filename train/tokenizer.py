"""The `tokenizer` command: text in, a small tokenizer of the published kind out."""

import collections
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from infer.progress import say
from pangu_jax import strict
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text.special_tokens import CONFIG
from pangu_jax.text.tokenizer import MODEL, PUBLISHED_SPECIALS
from train.commands import Tokenizer

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
END_OF_TURN = "[unused10]"

# The ids before any text: unknown, begin, end, the special tokens, and the 256 single bytes.
RESERVED = 3 + len(PUBLISHED_SPECIALS) + 256
FEWEST_PIECES = 16

# Of the pieces that are left, this part may be single characters. More of them, and Chinese rarely
# falls back to three bytes; fewer, and more words are one token.
CHARACTER_SHARE = 0.6


def run(command: Tokenizer) -> int:
    """Writes the two files and says how far the text shrank."""
    folder = Path(command.output)
    train_tokenizer(read_lines(Path(command.input)), folder, command.vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    characters = tokens = 0
    for line in read_lines(Path(command.input)):
        characters += len(line)
        tokens += len(processor.encode(line))
    say(
        f"wrote {folder}: {processor.vocab_size()} pieces; {tokens:,} tokens for the "
        f"{characters:,} characters of {command.input}"
    )
    return 0


def train_tokenizer(lines: Iterable[str], folder: Path, vocab_size: int) -> None:
    """A folder with tokenizer.model and tokenizer_config.json, made from the text of `lines`.

    folder: may exist and hold other files, but no tokenizer; nothing of it changes on an error
    vocab_size: exactly so many pieces. Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, the published special
        tokens, the bytes, then what was learnt.

    The same lines give the same bytes. Raises InputError.
    """
    for name in (MODEL, CONFIG):
        if (folder / name).exists():
            raise InputError(f"{folder / name}: already exists; choose another folder")
    if vocab_size < RESERVED + FEWEST_PIECES:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: the special tokens and the single bytes "
            f"take {RESERVED}; use at least {RESERVED + FEWEST_PIECES}"
        )
    text = [line for line in lines if line.strip()]
    if not text:
        raise InputError("there is no text to train a tokenizer on")
    model = _learn(_without_rare_characters(text, vocab_size), vocab_size)
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
    _write(folder, {CONFIG: config.encode(), MODEL: model})


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, one after the other, without their ends. Raises InputError.

    A named pipe or device is refused before it is opened: opening one could block for ever.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def tokenizer_config() -> dict[str, Any]:
    """What tokenizer_config.json says: the published fields, without a pointer to remote code."""
    added = (UNK, BOS, EOS, *PUBLISHED_SPECIALS)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "PanguTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "use_fast": False,
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": UNK,
        "additional_special_tokens": list(PUBLISHED_SPECIALS),
        "added_tokens_decoder": {
            str(id): {"content": content, **flags, "special": True}
            for id, content in enumerate(added)
        },
        "chat_template": strict.read_text(configs_folder() / "tokenizers" / "chat_template.jinja"),
    }


def _without_rare_characters(lines: list[str], vocab_size: int) -> list[str]:
    """The lines with a `0` for every character that shall not become a piece.

    SentencePiece makes a piece of every character it must cover, and cannot be told to cover less
    than 98% of a text. A digit is always a piece of its own, so that the `0` joins nothing.
    """
    counts = collections.Counter(character for line in lines for character in line)
    most = int(CHARACTER_SHARE * (vocab_size - RESERVED))
    # By count, then by code point: the choice must not depend on the order of the lines.
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    table = {ord(character): "0" for character in ranked[most:]}
    return [line.translate(table) for line in lines]


def _learn(lines: list[str], vocab_size: int) -> bytes:
    """The SentencePiece model. Raises InputError when the text or the size does not do."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            user_defined_symbols=list(PUBLISHED_SPECIALS),
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            # Text comes back as it went in: nothing is normalised, no space is dropped.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            # Longer lines than the default 4192 bytes would be left out without a word.
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(_complaint(str(error), vocab_size)) from None
    return model.getvalue()


def _complaint(message: str, vocab_size: int) -> str:
    """One line for an error of SentencePiece, without the place in its sources."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"the text is enough for about {found[1]} pieces, not for {vocab_size}"
    reason = message.rpartition("] ")[2].strip() or message
    return f"SentencePiece cannot train on this: {strict.shorten(reason, quote=False)}"


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The new files in the folder: each complete, and all of them or none."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in files}
    try:
        for name, data in files.items():
            partial[name].write_bytes(data)
        for name in files:
            os.replace(partial[name], folder / name)
    except BaseException:
        for path in (*partial.values(), *(folder / name for name in files)):
            path.unlink(missing_ok=True)
        raise
