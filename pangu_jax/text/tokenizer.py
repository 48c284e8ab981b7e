"""The tokenizer of the published models: SentencePiece between special tokens.

Text is first split on the special and added tokens; each run between them is SentencePiece's own
business, its dummy prefix included. Decoding is the mirror image. This is what the published
PanguTokenizer does under Transformers 4.53 (`legacy` slow tokenizers).
"""

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import sentencepiece

from pangu_jax import strict
from pangu_jax.config import configs_folder
from pangu_jax.errors import CheckpointError, ConfigError, InputError
from pangu_jax.text import special_tokens
from pangu_jax.text.sentencepiece_model import has_denormalizer
from pangu_jax.text.special_tokens import PUBLISHED_SPECIALS, AddedToken, Declared

__all__ = ["MODEL", "PUBLISHED_SPECIALS", "Tokenizer", "write_preset"]

MODEL = "tokenizer.model"

T = TypeVar("T")

# The published file has 2.5 MB.
MAX_MODEL_BYTES = 64 * 2**20
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Make one with `load`.

    pieces: SentencePiece's vocabulary; the ids are the places
    added: the tokens text is split on, by id
    special_ids: what `skip_special_tokens` removes: bos, eos, unk, pad, sep, cls, mask and the
        additional special tokens; other added tokens stay
    roles: ids of "bos", "eos", ..., as far as they exist
    chat_template: the folder's own Jinja template
    """

    processor: sentencepiece.SentencePieceProcessor
    pieces: tuple[str, ...]
    added: dict[int, AddedToken]
    special_ids: frozenset[int]
    roles: dict[str, int]
    add_bos: bool = True
    add_eos: bool = False
    chat_template: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder: tokenizer.model, and what the JSON files beside it say.

        Raises CheckpointError: a file is missing, damaged or not what it says it is.
        """
        folder = Path(folder)
        try:
            processor = _processor(folder / MODEL)
            declared = special_tokens.read(folder)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        return _assemble(processor, _pieces(processor, folder / MODEL), declared)

    @property
    def vocab_size(self) -> int:
        """Pieces, and added tokens beyond them: one more than the largest id."""
        return max(len(self.pieces), *(id + 1 for id in self.added), 0)

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence: SentencePiece's own, whatever the folder calls it."""
        return self.roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        """End of sequence (and of a turn)."""
        return self.roles.get("eos")

    @property
    def pad_id(self) -> int | None:
        """Padding; the published models use `<unk>`."""
        return self.roles.get("pad")

    @property
    def unk_id(self) -> int | None:
        """The unknown token."""
        return self.roles.get("unk")

    def id(self, token: str) -> int | None:
        """The id of a special token or piece, None if there is no such token."""
        return self._added_ids.get(token, self._piece_ids.get(token))

    def token(self, id: int) -> str:
        """The string of an id: a special token, or a piece as SentencePiece writes it; else ""."""
        if id in self.added:
            return self.added[id].content
        return self.pieces[id] if 0 <= id < len(self.pieces) else ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with BOS in front (and EOS behind) where the folder's config asks for them.

        Special tokens spelt out in the text become their ids. Raises InputError for text that is
        not Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has a lone surrogate at character {error.start}") from None
        ids: list[int] = []
        for part in self._split(text):
            id = self._added_ids.get(part)
            ids += [id] if id is not None else self._guarded(self.processor.encode, part)
        if add_special_tokens and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special_tokens and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> str:
        """The text of ids. Special tokens are spelt out, or skipped before anything else.

        Each run between added tokens is decoded by itself. Ids without a token are "" (own choice:
        the model's matrix is larger than the vocabulary).
        """
        text: list[str] = []
        run: list[int] = []
        for id in map(int, ids):
            if skip_special_tokens and id in self.special_ids:
                continue
            if id in self.separators:
                text += [self.spell(run), self.separators[id]]
                run = []
            elif 0 <= id < len(self.pieces):
                run.append(id)
        return "".join([*text, self.spell(run)])

    def spell(self, run: list[int]) -> str:
        """SentencePiece's text of a run of pieces."""
        return self._guarded(self.processor.decode, run)

    @functools.cached_property
    def separators(self) -> dict[int, str]:
        """Ids that end a run of SentencePiece's, and their text."""
        spelt = {token.content for token in self.added.values()}
        twins = {self._piece_ids[text]: text for text in spelt if text in self._piece_ids}
        return {**twins, **{id: token.content for id, token in self.added.items()}}

    @functools.cached_property
    def _added_ids(self) -> dict[str, int]:
        return {token.content: id for id, token in self.added.items()}

    @functools.cached_property
    def _piece_ids(self) -> dict[str, int]:
        return {piece: id for id, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _splitter(self) -> re.Pattern[str]:
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @functools.cached_property
    def rewrites_text(self) -> bool:
        """Whether SentencePiece changes decoded text as a whole, so that it cannot be streamed."""
        return has_denormalizer(self.processor.serialized_model_proto())

    def _split(self, text: str) -> list[str]:
        """Added tokens and what is between them, cut as Transformers' slow tokenizers do it."""
        if not self.added:
            return [text] if text else []
        parts = [part for part in self._splitter.split(text) if part]
        for i, part in enumerate(parts):
            if part not in self._added_ids:
                continue
            style = self.added[self._added_ids[part]]
            left = parts[i - 1] if i > 0 else ""
            right = parts[i + 1] if i + 1 < len(parts) else ""
            if style.rstrip and right:
                parts[i + 1] = right.lstrip()
            if style.lstrip and left:
                parts[i - 1] = left.rstrip()
            if style.single_word and left and not left.endswith(" "):
                parts[i - 1], parts[i] = parts[i - 1] + part, ""
            elif style.single_word and right and not right.startswith(" "):
                parts[i + 1], parts[i] = part + parts[i + 1], ""
        return [part for part in parts if part]

    def _guarded(self, action: Callable[[Any], T], value: Any) -> T:
        try:
            return action(value)
        except UnicodeDecodeError:
            raise CheckpointError(f"{MODEL}: damaged: it makes text that is not UTF-8") from None


def write_preset(name: str, folder: Path) -> None:
    """Puts the tokenizer of configs/tokenizers/`name` into a model folder."""
    home = configs_folder() / "tokenizers" / name
    for file in (MODEL, special_tokens.CONFIG):
        shutil.copyfile(home / file, folder / file)


def _processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    data = strict.read_bytes(path, MAX_MODEL_BYTES)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not data:
            raise RuntimeError
        processor.LoadFromSerializedProto(data)
    except (RuntimeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not a SentencePiece model, or damaged") from None
    return processor


def _pieces(processor: sentencepiece.SentencePieceProcessor, path: Path) -> tuple[str, ...]:
    ids = [*range(processor.get_piece_size())]
    try:
        pieces = tuple(processor.id_to_piece(ids))
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: holds a piece that is not UTF-8") from None
    if not pieces:
        raise CheckpointError(f"{path}: the vocabulary is empty")
    for piece, is_byte in zip(pieces, processor.is_byte(ids), strict=True):
        # SentencePiece would end the process when it meets such a piece.
        if is_byte and not BYTE.fullmatch(piece):
            raise CheckpointError(f"{path}: {strict.shorten(piece)} is not a byte piece")
    return pieces


def _assemble(
    processor: sentencepiece.SentencePieceProcessor, pieces: tuple[str, ...], declared: Declared
) -> Tokenizer:
    known = {piece: id for id, piece in enumerate(pieces)}
    added = dict(declared.added)
    ids = {token.content: id for id, token in added.items()}
    additional = declared.additional
    if additional is None:
        additional = tuple(AddedToken(text) for text in PUBLISHED_SPECIALS if text in known)
    specials = [*declared.roles.values(), *additional]
    for token in specials:
        if token.content not in ids:
            # As Transformers numbers tokens that have no id yet.
            id = known.get(token.content, len(known.keys() | ids.keys()))
            ids[token.content], added[id] = id, token
    roles = {name.removesuffix("_token"): ids[t.content] for name, t in declared.roles.items()}
    roles.pop("bos", None)
    if processor.bos_id() >= 0:
        roles["bos"] = processor.bos_id()
    return Tokenizer(
        processor,
        pieces,
        dict(sorted(added.items())),
        frozenset(ids[token.content] for token in specials),
        roles,
        declared.add_bos,
        declared.add_eos,
        declared.chat_template,
    )
