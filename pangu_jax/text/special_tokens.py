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
    additional: `additional_special_tokens`; None when the folder has none of the files
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
    config = _object(folder / CONFIG)
    sources = dict.fromkeys(config, folder / CONFIG)
    if "added_tokens_decoder" in config:
        added = _decoder(config["added_tokens_decoder"], f"{folder / CONFIG}: added_tokens_decoder")
    else:
        legacy = _object(folder / MAP)
        config = _with_map(config, legacy)
        sources |= dict.fromkeys(legacy, folder / MAP)
        added = _encoder(_object(folder / ADDED), str(folder / ADDED))
    where = lambda name: f"{sources.get(name, folder / CONFIG)}: {name}"
    roles = {
        role: _added(value, where(role))
        for role in ROLES
        if (value := config.get(role, DEFAULTS.get(role))) not in (None, "")
    }
    listed = config.get("additional_special_tokens")
    additional = None
    if sources or added:
        additional = _distinct(listed or [], where("additional_special_tokens"))
    return Declared(
        roles,
        additional,
        added,
        strict.coerce(bool, config.get("add_bos_token", True), where("add_bos_token")),
        strict.coerce(bool, config.get("add_eos_token", False), where("add_eos_token")),
        _chat_template(folder / TEMPLATE, config.get("chat_template"), where("chat_template")),
    )


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file. A link to nowhere is an
    error: half a download.
    """
    return strict.read_json_object(path) if path.exists() or path.is_symlink() else {}


def _with_map(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json over tokenizer_config.json; the additional tokens of both."""
    merged = {**config, **legacy}
    first, second = (said.get("additional_special_tokens") for said in (config, legacy))
    if isinstance(first, list) and isinstance(second, list):
        merged["additional_special_tokens"] = first + second
    return merged


def _decoder(said: Any, where: str) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: an object for every id."""
    table = strict.coerce(dict, said, where)
    for id, value in table.items():
        flags = strict.coerce(dict, value, f"{where}: {strict.shorten(id)}")
        strict.coerce(bool, flags.get("special", False), f"{where}: {strict.shorten(id)}: special")
    return _numbered([*table.items()], where)


def _encoder(table: dict[str, Any], where: str) -> dict[int, AddedToken]:
    """added_tokens.json: an id for every string."""
    for content, id in table.items():
        strict.coerce(int, id, f"{where}: {strict.shorten(content)}")
    return _numbered([(id, content) for content, id in table.items()], where)


def _numbered(pairs: list[tuple[Any, Any]], where: str) -> dict[int, AddedToken]:
    """Tokens by id. Raises ConfigError for a token or id that is there twice."""
    added: dict[int, AddedToken] = {}
    seen: set[str] = set()
    for id, value in _limited(pairs, where):
        number, token = _token_id(id, where), _added(value, f"{where}: {strict.describe(id)}")
        if number in added or token.content in seen:
            raise ConfigError(f"{where}: {strict.shorten(token.content)} or its id is there twice")
        added[number] = token
        seen.add(token.content)
    return added


def _distinct(said: Any, where: str) -> tuple[AddedToken, ...]:
    tokens = [_added(token, where) for token in _limited(strict.coerce(list, said, where), where)]
    return tuple({token.content: token for token in tokens}.values())


def _limited(items: list, where: str) -> list:
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


def _chat_template(file: Path, said: Any, where: str) -> str | None:
    """The template's text: a file of its own wins; of several named ones, the default."""
    if file.exists() or file.is_symlink():
        return strict.read_text(file)
    if isinstance(said, list):
        named = {}
        for entry in said:
            table = strict.coerce(dict, entry, where)
            name = strict.coerce(str, table.get("name"), f"{where}: name")
            named[name] = strict.coerce(str, table.get("template"), f"{where}: template")
        said = named.get("default")
    return strict.coerce(str | None, said, where)
