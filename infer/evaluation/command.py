"""The `eval` command: a model and problems in, accuracy out."""

import json
import os
from pathlib import Path

from infer import files, loading, plots, progress
from infer.commands import Eval
from infer.evaluation import examine, problems, report
from infer.evaluation.score import Evaluation
from infer.sampling import Sampling
from pangu_jax.checkpoint import hf
from pangu_jax.errors import InputError
from pangu_jax.text import chat
from pangu_jax.text.markers import Think

# What JAX calls the making of a program, or the reading of one from its cache on disk.
COMPILED = "/jax/core/compile/backend_compile_duration"


def run(command: Eval) -> int:
    """Prints the table (or one JSON object) on stdout, everything else on stderr."""
    modes = _modes(command.think)
    sampling = Sampling(command.max_new_tokens)
    if command.batch < 1:
        raise InputError("--batch must be at least 1")
    _check_files(command)
    found = problems.read(Path(command.tasks))
    folder = Path(command.model)
    config, _ = hf.read_config(folder)
    tokenizer = loading.tokenizer(folder, config)
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer.model there")
    prompts = examine.encode(config, tokenizer, found, modes)
    model, _ = loading.model(command)
    with progress.answering(len(prompts), 0) as advance:
        evaluation = examine.answer(model, tokenizer, prompts, sampling, command.batch, advance)
    said = {"model": command.model, "tasks": command.tasks, **evaluation.as_json()}
    text = json.dumps(said, ensure_ascii=False)
    _write_files(command, evaluation, text)
    if command.json:
        print(text)
    else:
        report.show(evaluation)
    return 0


def _modes(said: str) -> tuple[Think, ...]:
    """The modes of --think, in order. Raises InputError."""
    modes: tuple[Think, ...] = tuple(chat.check_think(word.strip()) for word in said.split(","))
    if len(set(modes)) < len(modes):
        raise InputError("--think names a mode twice")
    return modes


def _check_files(command: Eval) -> None:
    """Raises InputError for a file that could not be written when all work is done."""
    named = {"--output": command.output, "--answers": command.answers, "--plot": command.plot}
    taken = {os.path.realpath(command.tasks): "--tasks"}
    for flag, name in named.items():
        if name is None:
            continue
        path = Path(name)
        files.check_target(path)
        if (other := taken.setdefault(os.path.realpath(path), flag)) != flag:
            raise InputError(f"{other} and {flag} are the same file")
    if command.plot is not None:
        plots.check(Path(command.plot))


def _write_files(command: Eval, evaluation: Evaluation, text: str) -> None:
    if command.output is not None:
        files.write(Path(command.output), f"{text}\n".encode())
    if command.answers is not None:
        files.write(Path(command.answers), evaluation.answers_as_lines().encode())
    if command.plot is not None:
        plots.save(report.figure(evaluation), Path(command.plot))
