"""Problems as files: conversations to learn from (`pangu-train sft`), questions to be asked
(`pangu-infer eval`).
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infer import files as disk
from infer.progress import say
from pangu_jax import strict
from pangu_jax.errors import InputError
from train import tasks
from train.commands import Tasks
from train.tasks.problem import Problem

TRAINING, HELD_OUT = "train.jsonl", "held-out.jsonl"

# Draws in vain before a kind of problem is taken to have no more (own choice).
PATIENCE = 200


def run(command: Tasks) -> int:
    """The `tasks` command."""
    folder = Path(command.output)
    for name in (TRAINING, HELD_OUT):
        if (folder / name).exists():
            raise InputError(f"{folder / name}: already exists; choose another folder")
    names = command.tasks or tuple(tasks.TASKS)
    counts = write(folder, names, command.examples, command.held_out, command.seed)
    for name, count in counts.items():
        say(f"wrote {folder / name}: {count:,} lines")
    return 0


def write(
    folder: Path, names: Sequence[str], examples: int, held_out: int, seed: int
) -> dict[str, int]:
    """train.jsonl and held-out.jsonl, and the number of lines in each.

    examples: lines to learn from, tasks, difficulties and both modes in equal parts
    held_out: different problems of each task and difficulty, or as many as there are
    Raises InputError.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in tasks.TASKS:
            raise InputError(
                f"unknown task {strict.shorten(name)}{strict.suggest(name, tasks.TASKS)}"
            )
    if not names:
        raise InputError("name at least one task")
    if examples < 0 or held_out < 0:
        raise InputError("--examples and --held-out must be at least 0")
    lines = {
        TRAINING: [*training(names, examples, seed)],
        HELD_OUT: [*questions(names, held_out, seed)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in lines.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        disk.write(folder / name, text.encode())
    return {name: len(found) for name, found in lines.items()}


def training(names: Sequence[str], examples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations for `pangu-train sft`, the fast and the slow answers of different problems."""
    rng = random.Random(seed)
    kinds = list(itertools.product(names, tasks.DIFFICULTIES, ("fast", "slow")))
    sources = {
        kind: tasks.draw(kind[0], kind[1], random.Random(f"{seed} {kind}"), "train")
        for kind in kinds
    }
    for i in range(examples):
        if i % len(kinds) == 0:
            rng.shuffle(kinds)
        task, difficulty, think = kinds[i % len(kinds)]
        yield conversation(next(sources[task, difficulty, think]), think)


def conversation(problem: Problem, think: str) -> dict[str, Any]:
    """A problem asked and answered: at once, or after its steps."""
    thinking = problem.steps if think == "slow" else ""
    return {
        "task": problem.task,
        "difficulty": problem.difficulty,
        "think": think,
        "messages": [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "thinking": thinking, "content": problem.answer},
        ],
    }


def questions(names: Sequence[str], each: int, seed: int) -> Iterator[dict[str, Any]]:
    """Held-out problems for `pangu-infer eval`, no two the same."""
    for task, difficulty in itertools.product(names, tasks.DIFFICULTIES):
        rng = random.Random(f"{seed} {task} {difficulty} held-out")
        for problem in distinct(tasks.draw(task, difficulty, rng, "held-out"), each):
            yield {
                "task": task,
                "difficulty": difficulty,
                "messages": [{"role": "user", "content": problem.question}],
                "answer": problem.answer,
            }


def distinct(problems: Iterable[Problem], most: int) -> Iterator[Problem]:
    """The first `most` with different keys, fewer where PATIENCE draws find no other."""
    seen: set[str] = set()
    vain = 0
    for problem in problems:
        if len(seen) == most or vain == PATIENCE:
            return
        if problem.key in seen:
            vain += 1
            continue
        vain = 0
        seen.add(problem.key)
        yield problem
