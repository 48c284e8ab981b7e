"""The command from a folder and a file to scores: each answer is what `infer.generate` says."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import infer
import pangu_jax
from infer import __main__ as door
from infer import evaluation, generation, inputs, loading
from infer.evaluation import examine
from infer.evaluation.problems import Problem
from infer.evaluation.score import Evaluation
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text import chat, parse
from pangu_jax.text.markers import Think
from pangu_jax.text.tokenizer import Tokenizer, write_preset
from tests.infer import test_conversation

MODES: tuple[Think, ...] = ("fast", "slow")
NEW = 12


def problem(question: str, answer: str, task: str = "all", difficulty: int = 0) -> Problem:
    return Problem(({"role": "user", "content": question},), answer, task, difficulty)


def as_line(each: Problem) -> dict[str, Any]:
    return {
        "task": each.task,
        "difficulty": each.difficulty,
        "messages": list(each.messages),
        "answer": each.answer,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random answers, of which many tokens are the last."""
    home = tmp_path_factory.mktemp("random") / "model"
    ends = tuple(range(300, 1024, 8))
    config = dataclasses.replace(
        pangu_jax.preset("nano"), num_layers=1, init_range=0.1, eos_token_ids=ends
    )
    pangu_jax.save_hf(pangu_jax.init(config, jax.random.key(0)), home)
    write_preset("nano", home)
    return home


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Pangu:
    return pangu_jax.load(folder)


@pytest.fixture(scope="module")
def alone(model: Pangu, words: Tokenizer) -> dict[tuple[str, Think], Completion]:
    """What the model says to each question in each mode when it is asked nothing else."""
    found = {}
    for i in range(10):
        question = "What is " + " + ".join(str(i + j) for j in range(1 + 5 * (i % 2))) + "?"
        for mode in MODES:
            prompt = chat.encode(words, [{"role": "user", "content": question}], think=mode)
            (found[question, mode],) = infer.generate(
                model, [prompt], Sampling(NEW), tokenizer=words
            )
    return found


@pytest.fixture(scope="module")
def problems(alone: dict[tuple[str, Think], Completion]) -> list[Problem]:
    """Two of three expect what the model says when it need not think."""
    found = []
    for i, question in enumerate(dict.fromkeys(question for question, _ in alone)):
        says = parse.parse(alone[question, "fast"].text or "", "fast").answer
        answer = says if says and i % 3 else "no such answer"
        found.append(problem(question, answer, f"task {i % 3}", i % 2))
    return found


def test_scores_are_those_of_greedy_answers(model, words, problems, alone) -> None:
    told = []
    found = evaluation.evaluate(
        model, words, problems, MODES, batch=4, max_new_tokens=NEW, progress=told.append
    )
    assert [(a.mode, a.question) for a in found.answers] == [
        (mode, p.messages[0]["content"]) for mode in MODES for p in problems
    ]
    right = dict.fromkeys(MODES, 0)
    for answer in found.answers:
        completion = alone[answer.question, answer.mode]
        reply = parse.parse(completion.text or "", answer.mode)
        assert (answer.answer, answer.thinking) == (reply.answer, reply.thinking)
        assert answer.tokens == len(completion.token_ids)
        assert answer.cut == (completion.finish_reason == "length")
        same = reply.answer.split() == answer.expected.split()
        assert answer.correct == (same and completion.finish_reason == "stop")
        right[answer.mode] += answer.correct
    # The test is about something: some are right, some wrong, some cut.
    assert 0 < right["fast"] < len(problems)
    whole = {s.mode: s for s in found.scores if s.task is None and s.difficulty is None}
    assert {mode: s.correct for mode, s in whole.items()} == right
    assert whole["fast"].cut + whole["slow"].cut > 0
    assert sorted(told) == sorted(len(each.token_ids) for each in alone.values())
    assert [speed.mode for speed in found.speed] == [*MODES]
    for speed in found.speed:
        assert speed.tokens == whole[speed.mode].tokens
        assert speed.seconds > 0


def values(found: Evaluation) -> set[tuple]:
    return {dataclasses.astuple(answer) for answer in found.answers}


@pytest.mark.slow
def test_neither_batch_nor_order_matter(model, words, problems) -> None:
    usual = evaluation.evaluate(model, words, problems, MODES, batch=4, max_new_tokens=NEW)
    for batch in (1, 3, 64):
        found = evaluation.evaluate(model, words, problems, MODES, batch=batch, max_new_tokens=NEW)
        assert found.answers == usual.answers
        assert found.scores == usual.scores
    found = evaluation.evaluate(model, words, problems[::-1], MODES[::-1], max_new_tokens=NEW)
    assert values(found) == values(usual)
    assert set(found.scores) == set(usual.scores)


def test_nothing_has_no_score(model, words, problems) -> None:
    for asked, modes in (([], MODES), (problems, [])):
        with pytest.raises(InputError, match="no problems to answer"):
            evaluation.evaluate(model, words, asked, modes)


def test_compilation_is_noticed_and_then_over(model, words, problems) -> None:
    jax.clear_caches()
    ask = lambda: evaluation.evaluate(model, words, problems, ["fast"], max_new_tokens=NEW)
    (cold,), (warm,) = ask().speed, ask().speed
    assert cold.includes_compilation
    assert not warm.includes_compilation
    assert warm.compiled_seconds == 0


# --- batches, without a model


class Played:
    """Takes the place of generation: the answer to a prompt is a number made of its ids."""

    def __init__(self) -> None:
        self.groups: list[list[np.ndarray]] = []

    def generate(
        self, model: Any, token_lists: Any, sampling: Sampling, *, tokenizer: Any
    ) -> list[Completion]:
        """As `infer.generate`."""
        self.groups.append(list(token_lists))
        return [
            Completion([int(ids.sum()) % 1024], [0.0], "stop", str(ids.sum()))
            for ids in token_lists
        ]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(generation, "generate", found.generate)
    return found


counts = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["a", "b"]), st.integers(0, 2)),
    min_size=1,
    max_size=30,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(counts, st.integers(1, 9), st.sampled_from([("fast",), MODES, ("slow", "auto", "fast")]))
def test_every_problem_is_asked_once_in_even_batches(
    played: Played, model, words, said: list, batch: int, modes: tuple[Think, ...]
) -> None:
    played.groups.clear()
    asked = [problem("1 " * size, "1", task, difficulty) for size, task, difficulty in said]
    found = evaluation.evaluate(model, words, asked, modes, batch=batch)
    prompts = examine.encode(model.config, words, asked, modes)
    assert [a.answer for a in found.answers if a.mode != "slow"] == [
        str(p.ids.sum()) for p in prompts if p.mode != "slow"
    ]
    assert [(a.task, a.difficulty, a.mode) for a in found.answers] == [
        (p.problem.task, p.problem.difficulty, p.mode) for p in prompts
    ]
    sizes = list(map(len, played.groups))
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == len(modes) * -(-len(asked) // batch)
    per_mode = len(sizes) // len(modes)
    for start in range(0, len(sizes), per_mode):
        widths = [
            inputs.bucket(ids.size) for group in played.groups[start:][:per_mode] for ids in group
        ]
        assert widths == sorted(widths)


# --- the command


class Eval:
    """The command on files in a folder of its own."""

    def __init__(self, model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.home, self.capsys = model, home, capsys
        self.tasks = home / "tasks.jsonl"

    def write(self, *lines: Any) -> None:
        """The problems; text is written as it is."""
        text = [each if isinstance(each, str) else json.dumps(each) for each in lines]
        self.tasks.write_text("".join(line + "\n" for line in text))

    def run(self, *flags: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        argv = ["eval", "--model", str(self.model), "--tasks", str(self.tasks), *flags]
        return door.main(argv), *self.capsys.readouterr()

    def refused(self, *flags: str) -> str:
        """The one line that says why; no file comes of it."""
        before = sorted(os.listdir(self.home))
        code, out, err = self.run(*flags)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(os.listdir(self.home)) == before
        return err


SCRIPT = ("[unused16]", "1", "5", "[unused17]", "4", "3", "2", "[unused10]")
LINES = [
    as_line(problem("One?", "432", "one", 1)),
    as_line(problem("Two?", "2", "two", 2)),
    as_line(problem("Three?", " 432\n", "two", 1)),
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says SCRIPT to everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_conversation, "SCRIPT", SCRIPT)
        return test_conversation.write_scripted(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def program(scripted: Path, tmp_path: Path, capsys, monkeypatch) -> Eval:
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "") or "0.95")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    found = Eval(scripted, tmp_path, capsys)
    found.write(*LINES)
    return found


def test_files_and_json(program: Eval) -> None:
    pytest.importorskip("matplotlib")
    paths = {name: program.home / name for name in ("out.json", "answers.jsonl", "plot.svg")}
    flags = ["--output", str(paths["out.json"]), "--answers", str(paths["answers.jsonl"])]
    code, out, err = program.run(*flags, "--plot", str(paths["plot.svg"]), "--json")
    assert code == 0, err
    said = json.loads(out)
    assert paths["out.json"].read_text() == out
    assert out.count("\n") == 1
    assert (said["model"], said["tasks"]) == (str(program.model), str(program.tasks))
    got = {(s["mode"], s["task"], s["difficulty"]): s for s in said["scores"]}
    for mode in MODES:
        assert got[mode, None, None]["accuracy"] == pytest.approx(2 / 3)
        assert got[mode, None, None]["mean_tokens"] == len(SCRIPT)
        assert got[mode, "two", None]["accuracy"] == 0.5
        assert got[mode, None, 1]["accuracy"] == 1
        assert got[mode, "two", 2]["accuracy"] == 0
    answers = [json.loads(line) for line in paths["answers.jsonl"].read_text().splitlines()]
    assert [(a["mode"], a["question"], a["correct"]) for a in answers] == [
        (mode, question, right)
        for mode in MODES
        for question, right in (("One?", True), ("Two?", False), ("Three?", True))
    ]
    assert answers[1] == {
        "task": "two",
        "difficulty": 2,
        "mode": "fast",
        "question": "Two?",
        "expected": "2",
        "answer": "432",
        "thinking": "15",
        "tokens": len(SCRIPT),
        "cut": False,
        "correct": False,
    }
    assert b"<svg" in paths["plot.svg"].read_bytes()
    assert sorted(os.listdir(program.home)) == sorted([*paths, "tasks.jsonl"])


def test_the_table_is_on_stdout(program: Eval) -> None:
    code, out, _ = program.run("--think", "auto", "--max-new-tokens", "7", "--batch", "2")
    assert code == 0
    assert out.startswith("accuracy in %, by difficulty; 3 problems\n")
    assert "| all | auto | 0 | 0 | 0 | 0-57 | 7.0 |" in out
    assert "- cut off at 7 tokens, so wrong: auto 3 of 3" in out


def test_modes_change_the_prompt(program: Eval, played: Played, model, monkeypatch) -> None:
    monkeypatch.setattr(loading, "model", lambda command: (model, 0.0))
    assert program.run("--think", "slow, fast ,auto")[0] == 0
    words = Tokenizer.load(program.model)
    texts = [words.decode(group[0]) for group in played.groups]
    assert [next((s for s in ("/no_think", "/auto_think") if s in t), "") for t in texts] == [
        "",
        "/no_think",
        "/auto_think",
    ]


def test_ctrl_c_leaves_no_file(program: Eval, monkeypatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupt)
    code, out, err = program.run("--output", str(program.home / "out.json"))
    assert (code, out, err) == (130, "", "interrupted\n")
    assert os.listdir(program.home) == ["tasks.jsonl"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be said before the model is loaded, which may take minutes."""

    def load(command: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "model", load)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--think", "hard"], 'unknown thinking mode "hard"'),
        (["--think", ""], 'unknown thinking mode ""'),
        (["--think", "fast,"], 'unknown thinking mode ""'),
        (["--think", "fast,fast"], "names a mode twice"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--model", "/nowhere"], "/nowhere: does not exist"),
        (["--tasks", "/nowhere"], "/nowhere: no such file"),
        (["--output", "/"], "/: a folder"),
        (["--answers", "/dev/null"], "/dev/null: not a regular file"),
        (["--output", "/nowhere/a.json"], "no such folder: /nowhere"),
        (["--plot", "a.pdf"], "a.pdf: --plot writes .png or .svg files"),
        (["--plot", "/nowhere/a.png"], "no such folder"),
        (["--max-new-tokens", "3000000000"], "max_new_tokens"),
    ],
)
def test_mistakes_are_one_line(program: Eval, flags: list[str], complaint: str) -> None:
    assert complaint in program.refused(*flags)


@pytest.mark.usefixtures("unloaded")
def test_files_must_differ(program: Eval) -> None:
    other = str(program.home / "out")
    assert "--tasks and --output are the same file" in program.refused(
        "--output", str(program.tasks)
    )
    assert "--output and --answers are the same" in program.refused(
        "--output", other, "--answers", other
    )


@pytest.mark.usefixtures("unloaded")
def test_bad_problems_are_named(program: Eval) -> None:
    program.write(LINES[0], {"messages": [], "answer": "1"})
    assert f"{program.tasks}, line 2: the messages ask nothing" in program.refused()
    program.write(LINES[0], "", as_line(problem("1 " * 20000, "1")))
    err = program.refused()
    assert f"{program.tasks}, line 3: a prompt of" in err
    assert "positions" in err


@pytest.mark.usefixtures("unloaded")
def test_a_folder_without_tokenizer(program: Eval) -> None:
    program.model = Path(__file__).parent.parent.parent / "oracle" / "dense-tiny"
    assert "no tokenizer.model there" in program.refused()


@pytest.mark.usefixtures("unloaded")
def test_no_matplotlib_is_one_line(program: Eval, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib: pip install matplotlib" in program.refused(
        "--plot", str(program.home / "a.png")
    )
