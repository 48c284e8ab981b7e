"""What a command opens: a folder's model, its tokenizer, and its settings."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

import pangu_jax
from infer import progress
from infer.commands import ModelFlags, SamplingFlags
from infer.sampling import Sampling
from pangu_jax import build, strict
from pangu_jax.checkpoint import hf
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError, ConfigError, InputError
from pangu_jax.kernels import native
from pangu_jax.model import Pangu
from pangu_jax.text import tokenizer as tokenizers
from pangu_jax.text.tokenizer import Tokenizer

# Settings that generation_config.json may have; its other fields are no settings of ours.
DEFAULTS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}


def model(command: ModelFlags) -> tuple[Pangu, float]:
    """The model of the command's folder, and the seconds it took."""
    start = time.perf_counter()
    with progress.reading() as advance:
        loaded = pangu_jax.load(
            command.model, command.dtype, command.layout, command.form, progress=advance
        )
        jax.block_until_ready(loaded)
    seconds = time.perf_counter() - start
    kernels()
    if command.cache is not None:
        loaded = build.with_cache(loaded, command.cache)
    if command.voted_experts is not None:
        loaded = build.with_voting(loaded, command.voted_experts)
    return loaded, seconds


def kernels() -> None:
    """Makes the kernels of the CPU ready, and says so where that takes some seconds."""
    if jax.default_backend() == "cpu" and native.must_compile():
        progress.say("compiling kernels for this processor, once ...")
    native.available()


def tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """The folder's tokenizer; None if it has none.

    Raises CheckpointError, also for one with more tokens than the model has.
    """
    if not (folder / tokenizers.MODEL).exists():
        return None
    found = Tokenizer.load(folder)
    check_fits(found, config, folder)
    return found


def check_fits(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Raises CheckpointError for a tokenizer (in `folder`) with more tokens than the model has."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / tokenizers.MODEL}: {tokenizer.vocab_size} tokens, but the model has only "
            f"{config.vocab_size}: they do not belong together"
        )


def settings(command: SamplingFlags, folder: Path, **otherwise: Any) -> Sampling:
    """The command's Sampling; fields that are not given come from generation_config.json, then
    from `otherwise`.

    Raises CheckpointError for a bad file, InputError for bad flags.
    """
    defaults = hf.generation_defaults(folder)
    try:
        known = {name: kind for name, kind in DEFAULTS.items() if defaults.get(name) is not None}
        chosen: dict[str, Any] = {
            name: strict.coerce(kind, defaults[name], name) for name, kind in known.items()
        }
        if strict.coerce(bool, defaults.get("do_sample") or False, "do_sample"):
            chosen.setdefault("temperature", 1.0)
        else:
            chosen["temperature"] = 0.0
        Sampling(**chosen)
    except (ConfigError, InputError) as error:
        raise CheckpointError(f"{folder / hf.GENERATION}: {error}") from None
    given = {
        field.name: value
        for field in dataclasses.fields(Sampling)
        if (value := getattr(command, field.name, None)) is not None
    }
    return Sampling(**{**otherwise, **chosen, **given})
