"""`generate --input`: a file of prompts to a file of answers, resumed where it stopped."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from infer import files, jobs, loading, progress
from infer.commands import Generate
from infer.engine import sizes
from infer.engine.engine import Engine, Ticket
from infer.engine.sizes import Wish
from infer.jobs import OURS, Job
from infer.output import Completion, as_json
from infer.sampling import Sampling
from pangu_jax import strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError, InputError
from pangu_jax.text.tokenizer import Tokenizer


def run(
    command: Generate, config: ModelConfig, tokenizer: Tokenizer | None, sampling: Sampling
) -> int:
    """Answers the lines of --input that --output does not have yet."""
    todo = list(jobs.read(command, config, tokenizer, sampling))
    if not todo:
        raise InputError(f"{command.input}: holds no prompts")
    output, mark = Path(str(command.output)), _mark(command, sampling)
    if output.exists() and output.samefile(str(command.input)):
        raise InputError("--input and --output are the same file")
    done = _resume(output, todo, mark)
    if done:
        progress.say(f"{output}: {done} of {len(todo)} are there already")
    if done == len(todo):
        return 0
    with output.open("ab"):
        pass  # whoever cannot write there shall know before the model is loaded
    model, _ = loading.model(command)
    longest = max(job.ids.size + job.sampling.max_new_tokens for job in todo[done:])
    replicas = model.layout.size(model.layout.of("batch"))
    shape = sizes.fitting(model, Wish(-(-command.batch // replicas), longest))
    if shape.context < min(longest, config.max_positions):
        progress.say(
            f"memory has room for {shape.context:,} tokens of a prompt and its answer, which may "
            f"have {longest:,}: longer answers end there (--cache int8 has room for more)"
        )
    with (
        Engine(model, shape, tokenizer) as engine,
        output.open("ab") as file,
        progress.answering(len(todo), done) as advance,
    ):
        for job in todo[done:]:
            engine.check(job.ids, job.sampling)
        for job, completions in _answered(engine, todo[done:]):
            found = [as_json(each, tokenizer, job.chat, job.think) for each in completions]
            line = {**job.line, "completions": found, "run": mark}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            advance(sum(len(each.token_ids) for each in completions))
    progress.say(f"{output}: {len(todo)} answers")
    return 0


def _answered(engine: Engine, todo: list[Job]) -> Iterator[tuple[Job, list[Completion]]]:
    """The jobs in order, with their completions. So many are under way that slots are seldom empty,
    and memory holds what is done.
    """
    ahead = 4 * engine.capacity
    going: collections.deque[tuple[Job, list[Ticket]]] = collections.deque()
    left = iter(todo)
    while True:
        for job in itertools.islice(left, ahead - len(going)):
            going.append((job, engine.submit(job.ids, job.sampling)))
        if not going:
            return
        job, tickets = going.popleft()
        yield job, [ticket.result() for ticket in tickets]


def _mark(command: Generate, sampling: Sampling) -> str:
    """A short digest of what the answers depend on, besides the prompts."""
    folder = Path(command.model)
    found = [*folder.glob("*.safetensors"), *folder.glob("*token*"), *folder.glob("*.jinja")]
    model = sorted((file.name, files.fingerprint(file)) for file in found if file.is_file())
    said = [model, dataclasses.asdict(sampling), command.dtype, command.chat]
    said += [command.system, command.think]
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _resume(output: Path, todo: list[Job], mark: str) -> int:
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
            if done == len(todo):
                raise InputError(
                    f"{output}: has more lines than the input; choose another --output"
                )
            if not data.endswith(b"\n"):
                _check_tail(data, todo[done], str(output))
                break
            _check_answer(data, todo[done], mark, f"{output}, line {done + 1}")
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
