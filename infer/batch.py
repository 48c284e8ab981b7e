"""`generate --input`: a file of prompts to a file of answers, resumed where it stopped."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infer import generation, loading, progress
from infer.commands import Generate
from infer.output import as_json
from infer.sampling import Sampling
from pangu_jax import strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError, InputError, PanguError
from pangu_jax.text import chat, markers
from pangu_jax.text.markers import Think
from pangu_jax.text.tokenizer import Tokenizer

# What an answer's line has beyond its prompt's.
OURS = ("completions", "run")

# Bytes at either end of a file that tell it from another of its size.
ENDS = 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the input, understood."""

    line: dict[str, Any]
    ids: np.ndarray
    sampling: Sampling
    chat: bool
    think: Think | None


def run(
    command: Generate, config: ModelConfig, tokenizer: Tokenizer | None, sampling: Sampling
) -> int:
    """Answers the lines of --input that --output does not have yet."""
    jobs = list(_jobs(command, config, tokenizer, sampling))
    if not jobs:
        raise InputError(f"{command.input}: holds no prompts")
    output, mark = Path(str(command.output)), _mark(command, sampling)
    if output.exists() and output.samefile(str(command.input)):
        raise InputError("--input and --output are the same file")
    done = _resume(output, jobs, mark)
    if done:
        progress.say(f"{output}: {done} of {len(jobs)} are there already")
    if done == len(jobs):
        return 0
    with output.open("ab"):
        pass  # whoever cannot write there shall know before the model is loaded
    model, _ = loading.model(command)
    with output.open("ab") as file, progress.answering(len(jobs), done) as advance:
        for start in range(done, len(jobs), command.batch):
            group = jobs[start : start + command.batch]
            completions = iter(
                generation.generate(
                    model,
                    [job.ids for job in group],
                    [job.sampling for job in group],
                    tokenizer=tokenizer,
                )
            )
            for job in group:
                found = [
                    as_json(next(completions), tokenizer, job.chat, job.think)
                    for _ in range(job.sampling.n)
                ]
                line = {**job.line, "completions": found, "run": mark}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                advance(sum(len(each["token_ids"]) for each in found))
            file.flush()
    progress.say(f"{output}: {len(jobs)} answers")
    return 0


def _jobs(
    command: Generate, config: ModelConfig, tokenizer: Tokenizer | None, sampling: Sampling
) -> Iterator[Job]:
    """Every line, checked before any time is spent. Raises InputError with file and line."""
    path = Path(str(command.input))
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                if text := data.decode().strip():
                    line = strict.parse_json_object(text, "the line")
                    json.dumps(line, ensure_ascii=False).encode()
                    yield _job(line, command, config, tokenizer, sampling)
            except UnicodeDecodeError:
                raise InputError(f"{where}: not UTF-8 text") from None
            except UnicodeEncodeError:
                raise InputError(f"{where}: has a lone surrogate, which is not text") from None
            except PanguError as error:
                raise InputError(f"{where}: {error}") from None


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
    ids = generation.check_prompt(config, value)
    own = _own_sampling(sampling, line.get("sampling"))
    generation.check_sampling(own, config, tokenizer)
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


def _mark(command: Generate, sampling: Sampling) -> str:
    """A short digest of what the answers depend on, besides the prompts."""
    folder = Path(command.model)
    files = [*folder.glob("*.safetensors"), *folder.glob("*token*"), *folder.glob("*.jinja")]
    model = sorted((file.name, _fingerprint(file)) for file in files if file.is_file())
    said = [model, dataclasses.asdict(sampling), command.dtype, command.chat]
    said += [command.system, command.think]
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fingerprint(file: Path) -> str:
    """A digest of a file's size and of its ends: two checkpoints of a run differ there."""
    size = file.stat().st_size
    with file.open("rb") as data:
        ends = data.read(ENDS)
        data.seek(max(size - ENDS, 0))
        ends += data.read(ENDS)
    return f"{size}:{hashlib.sha256(ends).hexdigest()}"


def _resume(output: Path, jobs: list[Job], mark: str) -> int:
    """How many answers the file has. A last answer that was cut off is removed.

    Raises InputError if they are answers to something else; then the file stays as it is.
    """
    if not output.exists():
        return 0
    if not output.is_file():
        raise InputError(f"{output}: not a regular file")
    done = whole = 0
    with output.open("rb") as file:
        for data in file:
            if done == len(jobs):
                raise InputError(
                    f"{output}: has more lines than the input; choose another --output"
                )
            if not data.endswith(b"\n"):
                _check_tail(data, jobs[done], str(output))
                break
            _check_answer(data, jobs[done], mark, f"{output}:{done + 1}")
            done, whole = done + 1, whole + len(data)
    if whole < output.stat().st_size:
        with output.open("rb+") as file:
            file.truncate(whole)
    return done


def _check_tail(data: bytes, job: Job, where: str) -> None:
    """Only a piece of an answer of ours may be removed."""
    ours = json.dumps(job.line, ensure_ascii=False).encode()[:-1] + b", "
    if not (data.startswith(ours) or ours.startswith(data)):
        raise InputError(f"{where}: ends with something else; choose another --output")


def _check_answer(data: bytes, job: Job, mark: str, where: str) -> None:
    try:
        line = strict.parse_json_object(data.decode(), where)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text; choose another --output") from None
    except ConfigError as error:
        raise InputError(f"{error}; choose another --output") from None
    if line.get("run") != mark:
        raise InputError(f"{where}: made by another model or settings; choose another --output")
    if {name: value for name, value in line.items() if name not in OURS} != job.line:
        raise InputError(f"{where}: answers another prompt; choose another --output")
