"""What a folder declares about its tokenizer: added tokens, special tokens, BOS and EOS rules.

The files are those of Transformers 4.53, which the published models were made with, and they mean
here what they mean there: an `added_tokens_decoder` makes special_tokens_map.json and
added_tokens.json obsolete.
"""

import dataclasses
from pathlib import Path
from typing import Any

from pangu_jax import strict
from pangu_jax.errors import ConfigError

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"

# The markers of the published models, in the order of their ids. The ids are the vocabulary's.
PUBLISHED_SPECIALS = ("<|User|>:", "<|Bot|>:", *(f"[unused{i}]" for i in range(34)))

# As many added tokens as no published tokenizer comes near.
MAX_ADDED = 4096
MAX_ID = 2**24

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A string that text is split on before SentencePiece sees it, and how it is split."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclasses.dataclass(frozen=True)
class Declared:
    """The tokenizer files of a folder, checked.

    roles: bos_token, eos_token, ...; only those that exist
    additional: `additional_special_tokens`; None when no file says anything about added tokens
    added: tokens with ids of their own, by id
    """

    roles: dict[str, AddedToken]
    additional: tuple[AddedToken, ...] | None
    added: dict[int, AddedToken]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read(folder: Path) -> Declared:
    """What the folder's tokenizer files say; the published class's defaults where they are silent.

    Raises ConfigError.
    """
    where = f"{folder / CONFIG}"
    config = _object(folder / CONFIG)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config = _with_map(config, _object(folder / MAP))
        numbered = _limited(_object(folder / ADDED), f"{folder / ADDED}")
        pairs = [(id, content) for content, id in numbered.items()]
        added = _numbered(pairs, f"{folder / ADDED}")
    else:
        if not isinstance(decoder, dict):
            raise ConfigError(f"{where}: added_tokens_decoder must be an object")
        added = _numbered([*_limited(decoder, where).items()], f"{where}: added_tokens_decoder")
    roles = {
        role: _added(value, f"{where}: {role}")
        for role in ROLES
        if (value := config.get(role, DEFAULTS.get(role))) not in (None, "")
    }
    listed = config.get("additional_special_tokens")
    if listed is None and (decoder is not None or added):
        listed = []
    additional = None
    if listed is not None:
        if not isinstance(listed, list):
            raise ConfigError(f"{where}: additional_special_tokens must be a list")
        tokens = [_added(t, f"{where}: additional_special_tokens") for t in _limited(listed, where)]
        additional = tuple({token.content: token for token in tokens}.values())
    return Declared(
        roles,
        additional,
        added,
        strict.coerce(bool, config.get("add_bos_token", True), f"{where}: add_bos_token"),
        strict.coerce(bool, config.get("add_eos_token", False), f"{where}: add_eos_token"),
        _chat_template(folder, config.get("chat_template")),
    )


def _with_map(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json over tokenizer_config.json; the additional tokens of both."""
    merged = {**config, **legacy}
    first, second = (said.get("additional_special_tokens") for said in (config, legacy))
    if isinstance(first, list) and isinstance(second, list):
        merged["additional_special_tokens"] = first + second
    return merged


def _numbered(pairs: list[tuple[Any, Any]], where: str) -> dict[int, AddedToken]:
    """Tokens by id. Raises ConfigError for a token or id that is there twice."""
    added: dict[int, AddedToken] = {}
    seen: set[str] = set()
    for id, value in pairs:
        number, token = _token_id(id, where), _added(value, f"{where} {strict.describe(id)}")
        if number in added or token.content in seen:
            raise ConfigError(f"{where}: {strict.shorten(token.content)} or its id is there twice")
        added[number] = token
        seen.add(token.content)
    return added


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    return strict.read_json_object(path) if path.exists() else {}


def _limited(items: Any, where: str) -> Any:
    if len(items) > MAX_ADDED:
        raise ConfigError(f"{where}: {len(items)} added tokens are more than {MAX_ADDED}")
    return items


def _token_id(value: Any, where: str) -> int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < MAX_ID):
        raise ConfigError(f"{where}: {strict.describe(value)} is not a token id")
    return int(text)


def _added(value: Any, where: str) -> AddedToken:
    """A token from its string, or from the object Transformers writes for it."""
    table = {"content": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a string or an object, not {strict.describe(value)}")
    content = strict.coerce(str, table.get("content"), f"{where}: content")
    if not content or not _encodable(content):
        raise ConfigError(f"{where}: {strict.describe(content)} cannot be a token")
    flags = {
        name: strict.coerce(bool, table.get(name, False), f"{where}: {name}")
        for name in ("lstrip", "rstrip", "single_word")
    }
    return AddedToken(content, **flags)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _chat_template(folder: Path, said: Any) -> str | None:
    """The template's text: a file of its own wins; of several named ones, the default."""
    where = f"{folder / CONFIG}: chat_template"
    if (folder / TEMPLATE).exists():
        return strict.read_text(folder / TEMPLATE)
    if isinstance(said, list):
        entries = [entry for entry in said if isinstance(entry, dict)]
        said = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return strict.coerce(str | None, said, where)
