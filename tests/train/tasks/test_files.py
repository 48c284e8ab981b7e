"""Problems as files: equal parts, the same bytes for a seed, and whole or not at all."""

import collections
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pangu_jax
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from tests.train.tasks import test_tasks
from train import __main__ as door
from train import config, tasks
from train.data import examples, records
from train.tasks import files
from train.tasks.problem import Problem

ROOT = Path(__file__).parent.parent.parent.parent
ALL = tuple(tasks.TASKS)
BOTH = ["held-out.jsonl", "train.jsonl"]


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked(line: dict[str, Any]) -> str:
    return line["messages"][0]["content"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "new" / "folder"
    counts = files.write(folder, ALL, 64 * 12 + 5, 20, 7)
    assert counts == {"train.jsonl": 64 * 12 + 5, "held-out.jsonl": 32 * 20}
    assert sorted(os.listdir(folder)) == BOTH
    return folder


def test_a_line_to_learn_from(written: Path) -> None:
    for line in lines(written / "train.jsonl"):
        assert set(line) == {"task", "difficulty", "think", "messages"}
        user, assistant = line["messages"]
        assert set(user) == {"role", "content"}
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        solve, check = test_tasks.SOLVERS[line["task"]], test_tasks.STEPS[line["task"]]
        assert assistant["content"] == solve(user["content"])
        if line["think"] == "fast":
            assert assistant["thinking"] == ""
        else:
            assert line["think"] == "slow"
            check(
                Problem(
                    line["task"],
                    line["difficulty"],
                    user["content"],
                    assistant["thinking"],
                    assistant["content"],
                    "",
                )
            )


def test_a_line_to_be_asked(written: Path) -> None:
    for line in lines(written / "held-out.jsonl"):
        assert set(line) == {"task", "difficulty", "messages", "answer"}
        (user,) = line["messages"]
        assert (user["role"], set(user)) == ("user", {"role", "content"})
        assert line["answer"] == test_tasks.SOLVERS[line["task"]](user["content"])


def test_equal_parts(written: Path) -> None:
    learnt = [(x["task"], x["difficulty"], x["think"]) for x in lines(written / "train.jsonl")]
    counts = collections.Counter(learnt)
    assert len(counts) == 8 * 4 * 2
    assert sorted(counts.values()) == [12] * 59 + [13] * 5
    # In every stretch as well, so that a part of the file is as good a mixture as the whole.
    for start in range(0, 64 * 12, 64):
        assert len(set(learnt[start : start + 64])) == 64
    assert learnt[:64] != learnt[64:128]
    counts = collections.Counter(
        (x["task"], x["difficulty"]) for x in lines(written / "held-out.jsonl")
    )
    assert dict(counts) == dict.fromkeys(test_tasks.KINDS, 20)


def test_no_question_is_learnt(written: Path) -> None:
    for_learning, for_asking = (
        {test_tasks.same(line["task"], asked(line)) for line in lines(written / name)}
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert not for_learning & for_asking


def test_no_question_is_asked_twice(written: Path) -> None:
    kinds: dict[str, list[tuple]] = collections.defaultdict(list)
    for line in lines(written / "held-out.jsonl"):
        kinds[line["task"]].append(test_tasks.same(line["task"], asked(line)))
    assert all(len(set(each)) == len(each) for each in kinds.values())


def test_fast_and_slow_are_of_different_problems(written: Path) -> None:
    found: dict[str, set[str]] = {"fast": set(), "slow": set()}
    for line in lines(written / "train.jsonl"):
        if line["difficulty"] == 4:
            found[line["think"]].add(asked(line))
    assert not found["fast"] & found["slow"]


def test_sft_reads_every_line(tmp_path: Path) -> None:
    tokenizer = pangu_jax.Tokenizer.load(configs_folder() / "tokenizers" / "nano")
    files.write(tmp_path, ALL, 192, 0, 0)
    encode = examples.conversations(tokenizer)
    for record in records.read(tmp_path / "train.jsonl"):
        (example,), line = examples.of(record, encode), record.value
        said = tokenizer.decode(example.ids[example.learn])
        answer = line["messages"][1]
        assert said == f"[unused16]{answer['thinking']}[unused17]{answer['content']}[unused10]"
        # Or the shipped run would leave it out.
        assert example.ids.size <= config.load("nano", {}).data.length


def test_a_seed_is_its_bytes(written: Path, tmp_path: Path) -> None:
    assert files.write(tmp_path / "same", ALL, 64 * 12 + 5, 20, 7)
    assert bytes_of(tmp_path / "same") == bytes_of(written)
    files.write(tmp_path / "other", ALL, 64 * 12 + 5, 20, 8)
    for name in BOTH:
        here, there = (
            {asked(line) for line in lines(folder / name) if line["difficulty"] == 4}
            for folder in (written, tmp_path / "other")
        )
        assert len(here & there) < len(here) / 10


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys, pathlib\nfrom train.tasks import files\n"
    code += "files.write(pathlib.Path(sys.argv[1]), ['add', 'edit'], 40, 3, 1)\n"
    code += "assert not {'jax', 'flax'} & sys.modules.keys(), 'imported'"
    for seed in ("1", "2"):
        argv = [sys.executable, "-c", code, str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(argv, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")
    digest = hashlib.sha256(b"".join(bytes_of(tmp_path / "1").values())).hexdigest()
    files.write(tmp_path / "3", ["add", "edit"], 40, 3, 1)
    assert hashlib.sha256(b"".join(bytes_of(tmp_path / "3").values())).hexdigest() == digest


def test_more_lines_begin_with_the_same(tmp_path: Path) -> None:
    for count in (10, 200):
        files.write(tmp_path / str(count), ["add", "sort"], count, 5, 0)
    few, many = ((tmp_path / n / "train.jsonl").read_bytes() for n in ("10", "200"))
    assert many.startswith(few)


@pytest.mark.parametrize(("examples", "held_out"), [(0, 0), (1, 0), (0, 1), (3, 2)])
def test_few(tmp_path: Path, examples: int, held_out: int) -> None:
    counts = files.write(tmp_path, ["date"], examples, held_out, 0)
    assert counts == {"train.jsonl": examples, "held-out.jsonl": 4 * held_out}
    assert len(lines(tmp_path / "train.jsonl")) == examples
    assert len(lines(tmp_path / "held-out.jsonl")) == 4 * held_out


def test_as_many_questions_as_there_are(tmp_path: Path) -> None:
    counts = files.write(tmp_path, ["total"], 0, 120, 0)
    easy = [line for line in lines(tmp_path / "held-out.jsonl") if line["difficulty"] == 1]
    assert 15 <= len(easy) < 120
    assert counts["held-out.jsonl"] == len(lines(tmp_path / "held-out.jsonl"))


def test_a_task_named_twice_is_one(tmp_path: Path) -> None:
    files.write(tmp_path / "once", ["add", "sort"], 30, 5, 0)
    files.write(tmp_path / "twice", ["add", "sort", "add"], 30, 5, 0)
    assert bytes_of(tmp_path / "once") == bytes_of(tmp_path / "twice")


@pytest.mark.parametrize(
    ("names", "examples", "held_out", "complaint"),
    [
        ([], 5, 5, "name at least one task"),
        (["ad"], 5, 5, "unknown task 'ad'; did you mean add?"),
        (["add", "multipy"], 5, 5, "unknown task 'multipy'; did you mean multiply?"),
        (["xyzzy"], 5, 5, "unknown task 'xyzzy'"),
        ([""], 5, 5, "unknown task ''"),
        (["a\nb"], 5, 5, "unknown task 'a\\x0ab'"),
        (["add"], -1, 5, "at least 0"),
        (["add"], 5, -1, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, names: list[str], examples: int, held_out: int, complaint: str
) -> None:
    with pytest.raises(InputError) as caught:
        files.write(tmp_path / "new", names, examples, held_out, 0)
    assert complaint in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    files.write(tmp_path / "old", ["add"], 20, 2, 0)
    before = bytes_of(tmp_path / "old")
    made = []

    def fails(rng: Any, difficulty: int) -> Problem:
        made.append(difficulty)
        if len(made) > 10:
            raise OSError(28, "No space left on device")
        return Problem("add", difficulty, f"{len(made)}?", "", "1", str(len(made)))

    monkeypatch.setitem(tasks.TASKS, "add", fails)
    for name in ("old", "new"):
        made.clear()
        with pytest.raises(OSError, match="No space left"):
            files.write(tmp_path / name, ["add"], 20, 2, 1)
        assert made
    assert os.listdir(tmp_path) == ["old"]
    assert bytes_of(tmp_path / "old") == before


# --- the command


def run(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[int, str]:
    code = door.main(["tasks", "--output", str(folder), *flags])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_the_command(tmp_path: Path, capsys) -> None:
    flags = ("--tasks", "add", "--tasks=sort", "--examples", "24", "--held-out", "3", "--seed", "5")
    code, err = run(capsys, tmp_path / "new", *flags)
    assert code == 0
    said = err.replace("\n", "")
    assert "train.jsonl: 24 lines" in said
    assert "held-out.jsonl: 24 lines" in said
    files.write(tmp_path / "same", ["add", "sort"], 24, 3, 5)
    assert bytes_of(tmp_path / "new") == bytes_of(tmp_path / "same")
    assert {line["task"] for line in lines(tmp_path / "new" / "train.jsonl")} == {"add", "sort"}


@pytest.mark.parametrize("name", BOTH)
def test_files_that_are_there_stay(tmp_path: Path, capsys, name: str) -> None:
    (tmp_path / name).write_text("kept")
    (tmp_path / "other").write_text("kept")
    before = bytes_of(tmp_path)
    code, err = run(capsys, tmp_path, "--examples=1", "--held-out=1")
    assert code == 2
    assert err == f"error: {tmp_path / name}: already exists; choose another folder\n"
    assert bytes_of(tmp_path) == before
    (tmp_path / name).unlink()
    assert run(capsys, tmp_path, "--examples=1", "--held-out=1")[0] == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*BOTH, "other"])


def test_all_tasks_unless_some_are_named(tmp_path: Path, capsys) -> None:
    assert run(capsys, tmp_path, "--examples", "64", "--held-out", "1")[0] == 0
    for name in BOTH:
        assert {line["task"] for line in lines(tmp_path / name)} == set(tasks.TASKS)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tasks", "add", "--tasks", "sotr"], "unknown task 'sotr'; did you mean sort?"),
        (["--tasks", "add,sort"], "unknown task 'add,sort'"),
        (["--task", "add"], "unknown option '--task'; did you mean --tasks?"),
        (["--examples", "many"], "'many' is not N"),
        (["--examples=-1"], "at least 0"),
        (["--held-out=-1"], "at least 0"),
        (["add"], "unrecognized arguments: add"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, flags: list[str], complaint: str) -> None:
    code, err = run(capsys, tmp_path / "new", *flags)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert not os.listdir(tmp_path)


def test_places_that_cannot_be_used(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        code, err = run(capsys, place, "--examples=1", "--held-out=1")
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
