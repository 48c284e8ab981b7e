"""The lines of `generate --input`, each checked and made into a prompt before any time is spent."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infer import files, inputs
from infer.commands import Generate
from infer.sampling import Sampling
from pangu_jax import strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError, PanguError
from pangu_jax.text import chat, markers
from pangu_jax.text.markers import Think
from pangu_jax.text.tokenizer import Tokenizer

# What an answer's line has beyond its prompt's.
OURS = ("completions", "run")


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the input, understood."""

    line: dict[str, Any]
    ids: np.ndarray
    sampling: Sampling
    chat: bool
    think: Think | None


def read(
    command: Generate, config: ModelConfig, tokenizer: Tokenizer | None, sampling: Sampling
) -> Iterator[Job]:
    """The jobs of the command's input, in order. Raises InputError with file and line."""
    for where, line in files.json_lines(Path(str(command.input))):
        try:
            job = _job(line, command, config, tokenizer, sampling)
        except PanguError as error:
            raise InputError(f"{where}: {error}") from None
        yield job


def _job(
    line: dict[str, Any],
    command: Generate,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    sampling: Sampling,
) -> Job:
    for name in OURS:
        if name in line:
            raise InputError(f"the field {name} is what an answer's line gets; rename it")
    kinds = [name for name in ("prompt", "prompt_ids", "messages") if name in line]
    if len(kinds) != 1:
        raise InputError("needs one of prompt, prompt_ids and messages")
    value = line[kinds[0]]
    if kinds[0] != "prompt_ids" and tokenizer is None:
        raise InputError(f"{command.model} has no tokenizer.model; use prompt_ids")
    think, messages = None, None
    if kinds[0] == "messages":
        messages = strict.coerce(tuple[dict, ...], value, "messages")
        if not messages:
            raise InputError("messages holds no message")
    elif kinds[0] == "prompt":
        value = strict.coerce(str, value, "prompt")
        messages = [{"role": "user", "content": value}] if command.chat else None
    if messages is not None:
        assert tokenizer is not None
        think = strict.coerce(Think | None, line.get("think", command.think), "think")
        if command.system and not (messages and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": command.system}, *messages]
        tools = strict.coerce(tuple[dict, ...] | None, line.get("tools"), "tools")
        value = chat.encode(
            tokenizer, messages, think=think, tools=tools, markers=markers.of(tokenizer)
        )
    elif "think" in line or "tools" in line:
        raise InputError("think and tools need messages, or --chat")
    elif kinds[0] == "prompt":
        assert tokenizer is not None
        value = tokenizer.encode(value)
    ids = inputs.check_prompt(config, value)
    own = _own_sampling(sampling, line.get("sampling"))
    inputs.check_sampling(own, config, tokenizer)
    return Job(line, ids, own, messages is not None, think)


def _own_sampling(sampling: Sampling, said: Any) -> Sampling:
    """The run's sampling with the line's own fields."""
    if said is None:
        return sampling
    hints = typing.get_type_hints(Sampling)
    fields = {name: getattr(sampling, name) for name in hints}
    for name, value in strict.coerce(dict, said, "sampling").items():
        if name not in fields:
            raise InputError(
                f"sampling: unknown field {strict.shorten(name)}{strict.suggest(name, fields)}"
            )
        if name == "logit_bias":
            fields[name] = _bias(value)
        elif name == "stop" and isinstance(value, str):
            fields[name] = (value,)
        else:
            fields[name] = strict.coerce(hints[name], value, f"sampling: {name}")
    return Sampling(**fields)


def _bias(said: Any) -> dict[int, float]:
    """A logit bias in JSON, where keys are strings."""
    found = {}
    for key, value in strict.coerce(dict, said, "sampling: logit_bias").items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InputError(f"sampling: logit_bias: {strict.shorten(key)} is not a token id")
        found[int(key)] = strict.coerce(float, value, f"sampling: logit_bias: {key}")
    return found
