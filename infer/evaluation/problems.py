"""JSON lines to problems. A file is hostile until checked: a bad line is named by its number."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer import files
from pangu_jax import strict
from pangu_jax.errors import ConfigError, InputError
from pangu_jax.text import chat
from pangu_jax.text import messages as conversation

# Own choices: what a table and a plot can still show. A file that has more is not of this kind.
MAX_TASKS = 100
MAX_TASK_LENGTH = 40
MAX_DIFFICULTY = 99


@dataclasses.dataclass(frozen=True)
class Problem:
    """A conversation that asks for one exact answer.

    difficulty: 0 where none is known
    where: its place in a file, for a complaint
    """

    messages: tuple[Mapping[str, Any], ...]
    answer: str
    task: str = "all"
    difficulty: int = 0
    where: str = dataclasses.field(default="a problem", compare=False)

    @property
    def question(self) -> str:
        """What the user says last."""
        plain = conversation.read(self.messages)
        return [message.content for message in plain if message.role == "user"][-1]


def read(path: Path) -> list[Problem]:
    """The problems of a file of {"messages": [...], "answer": ...} lines, maybe with "task" and
    "difficulty"; other keys are ignored. Raises InputError.
    """
    found, tasks = [], set()
    for where, line in files.json_lines(path):
        try:
            problem = _problem(line, where)
        except (ConfigError, InputError) as error:
            raise InputError(f"{where}: {error}") from None
        found.append(problem)
        tasks.add(problem.task)
        if len(tasks) > MAX_TASKS:
            raise InputError(f"{where}: more than {MAX_TASKS} tasks; is the task a name?")
    if not found:
        raise InputError(f"{path}: holds no problems")
    return found


def _problem(line: dict[str, Any], where: str) -> Problem:
    for name in ("messages", "answer"):
        if name not in line:
            raise InputError(f"needs {name}")
    messages = strict.coerce(tuple[dict, ...], line["messages"], "messages")
    if "user" not in [message.role for message in conversation.read(messages)]:
        raise InputError("the messages ask nothing: none is a user's")
    if mode := chat.thinking_mode(messages):
        raise InputError(f"the message itself asks for {mode} thinking; that is for --think to say")
    answer = strict.coerce(str, line["answer"], "answer")
    if not answer.strip():
        raise InputError("the answer is empty")
    task = strict.coerce(str, line.get("task", "all"), "task")
    if not (task.strip() and task.isprintable() and len(task) <= MAX_TASK_LENGTH):
        raise InputError(f"task must be a name of at most {MAX_TASK_LENGTH} characters")
    difficulty = strict.coerce(int, line.get("difficulty", 0), "difficulty")
    if not 0 <= difficulty <= MAX_DIFFICULTY:
        raise InputError(f"difficulty must be from 0 to {MAX_DIFFICULTY}")
    return Problem(messages, answer, task, difficulty, where)
