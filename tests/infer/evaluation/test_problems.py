"""Problems are read as they stand, and a bad line is named; none of it needs JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer.evaluation import problems
from infer.evaluation.problems import Problem
from pangu_jax.errors import InputError

ROOT = Path(__file__).parent.parent.parent.parent
USER = {"role": "user", "content": "What is 1 + 2?"}
GOOD = {"messages": [USER], "answer": "3"}


def write(path: Path, *lines: Any) -> Path:
    """A file of lines; text is written as it is."""
    file = path / "tasks.jsonl"
    text = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    file.write_text("".join(line + "\n" for line in text))
    return file


def test_lines_become_problems(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    parts = {"role": "user", "content": [{"type": "text", "text": "二加二？"}]}
    lines = [
        {**GOOD, "task": "add", "difficulty": 3, "key": "1 2", "source": {"book": [1]}},
        "",
        {"messages": [system, USER, {"role": "assistant", "content": "3"}, parts], "answer": " 4 "},
    ]
    file = write(tmp_path, *lines)
    first, second = problems.read(file)
    assert first == Problem((USER,), "3", "add", 3)
    assert first.question == "What is 1 + 2?"
    assert (second.task, second.difficulty, second.answer) == ("all", 0, " 4 ")
    assert second.question == "二加二？"
    assert (first.where, second.where) == (f"{file}, line 1", f"{file}, line 3")


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
names = st.text(st.sampled_from("ab中 |[$"), min_size=1, max_size=40).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(words, names, st.integers(0, 99)), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path: Path, found: list[tuple[str, str, int]]) -> None:
    lines = [{**GOOD, "answer": a, "task": task, "difficulty": d} for a, task, d in found]
    expected = [Problem((USER,), *each) for each in found]
    assert problems.read(write(tmp_path, *lines)) == expected


BAD = [
    ("not json", "not valid JSON"),
    ("[1]", "must be a JSON object"),
    ('{"answer": "3", "answer": "4"}', "appears twice"),
    ('{"a": NaN}', "NaN"),
    ("[" * 100000, "nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "number too long"),
    ('{"answer": "\\ud800"}', "lone surrogate"),
    ({"answer": "3"}, "needs messages"),
    ({"messages": [USER]}, "needs answer"),
    ({**GOOD, "messages": "hi"}, "messages must be a list"),
    ({**GOOD, "messages": ["hi"]}, "messages[0] must be an object"),
    ({**GOOD, "messages": []}, "none is a user's"),
    ({**GOOD, "messages": [{"role": "usr", "content": "hi"}]}, "none is a user's"),
    ({**GOOD, "messages": [{"content": "hi"}]}, "message 1 must be an object with a role"),
    ({**GOOD, "messages": [{"role": "user", "content": 5}]}, "content must be text"),
    ({**GOOD, "messages": [{"role": "user", "content": "hi /no_think"}]}, "asks for fast thinking"),
    ({**GOOD, "answer": 3}, "answer must be a string"),
    ({**GOOD, "answer": " \n"}, "the answer is empty"),
    ({**GOOD, "answer": None}, "answer must be a string"),
    ({**GOOD, "task": 1}, "task must be a string"),
    ({**GOOD, "task": ""}, "task must be a name"),
    ({**GOOD, "task": "\x1b[31m"}, "task must be a name"),
    ({**GOOD, "task": "a\nb"}, "task must be a name"),
    ({**GOOD, "task": "a" * 41}, "task must be a name"),
    ({**GOOD, "difficulty": "hard"}, "difficulty must be an integer"),
    ({**GOOD, "difficulty": 1.5}, "difficulty must be an integer"),
    ({**GOOD, "difficulty": True}, "difficulty must be an integer"),
    ({**GOOD, "difficulty": -1}, "difficulty must be from 0 to 99"),
    ({**GOOD, "difficulty": 100}, "difficulty must be from 0 to 99"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    file = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(InputError) as caught:
        problems.read(file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 3: ")
    assert complaint in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_line_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: not UTF-8 \(byte 7\)"):
        problems.read(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        problems.read(tmp_path / "missing")
    with pytest.raises(InputError, match="not a regular file"):
        problems.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        problems.read(tmp_path / "pipe")
    with pytest.raises(InputError, match="holds no problems"):
        problems.read(write(tmp_path, "", "  "))


def test_names_that_are_numbers_are_no_tasks(tmp_path: Path) -> None:
    lines = [{**GOOD, "task": f"problem {i}"} for i in range(problems.MAX_TASKS + 1)]
    assert len(problems.read(write(tmp_path, *lines[:-1]))) == problems.MAX_TASKS
    with pytest.raises(InputError, match="line 101: more than 100 tasks"):
        problems.read(write(tmp_path, *lines))


def test_reading_and_reporting_import_no_jax() -> None:
    code = "import sys\nfrom infer.evaluation import problems, report, score\n"
    code += "assert not {'jax', 'flax', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
