"""A file of prompts to a file of answers: each as if alone, in order, resumed, nothing lost."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infer
import pangu_jax
from infer import __main__ as door
from infer import batch as batches
from infer import loading
from infer.engine.engine import Engine
from infer.engine.runner import Shape
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax.text import chat
from pangu_jax.text.tokenizer import Tokenizer
from tests import folders
from tests.infer.test_conversation import write_random

ROOT = Path(__file__).parent.parent.parent
LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


class Batch:
    """The command on files in a folder of its own."""

    def __init__(self, model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.capsys = model, capsys
        self.input, self.output = home / "prompts.jsonl", home / "answers.jsonl"

    def write(self, *lines: Any) -> None:
        """The prompts; text is written as it is."""
        text = [each if isinstance(each, str) else json.dumps(each) for each in lines]
        self.input.write_text("".join(line + "\n" for line in text))

    def argv(self, *flags: str) -> list[str]:
        argv = ["generate", "--model", str(self.model), "--max-new-tokens", str(LENGTH)]
        argv += ["--ignore-eos", "--input", str(self.input), "--output", str(self.output)]
        return [*argv, *flags]

    def run(self, *flags: str) -> tuple[int, str]:
        """Exit code and stderr; nothing is on stdout."""
        code = door.main(self.argv(*flags))
        out, err = self.capsys.readouterr()
        assert out == ""
        return code, err.replace("\n", "") if code == 0 else err

    def answers(self) -> list[dict[str, Any]]:
        data = self.output.read_bytes()
        assert data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]

    def refused(self, *flags: str) -> str:
        """The one line that says why; the files stay as they are."""
        before = {p: p.read_bytes() for p in (self.input, self.output) if p.is_file()}
        code, err = self.run(*flags)
        after = {p: p.read_bytes() for p in (self.input, self.output) if p.is_file()}
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert after == before
        return err


@pytest.fixture
def batch(folder: Path, tmp_path: Path, capsys, monkeypatch) -> Batch:
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "") or "0.95")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    return Batch(folder, tmp_path, capsys)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be said before the model is loaded, which may take minutes."""

    def load(command: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "model", load)


def ids_of(answers: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [[each["token_ids"] for each in line["completions"]] for line in answers]


class Played(Engine):
    """Takes the place of the engine: remembers what was asked, counts up from the prompt's last id.

    before: called before each completion is given
    """

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Sampling]] = []
        self.given = 0
        self.before: Callable[[], None] = lambda: None

    def make(self, model: Any, shape: Shape, tokenizer: Any) -> "Played":
        """As `Engine`."""
        self.shape, self.tokenizer, self.closed = shape, tokenizer, False
        return self

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def check(self, prompt: Any, sampling: Sampling) -> None:
        """Everything fits."""

    @property
    def capacity(self) -> int:
        """As `Engine`."""
        return self.shape.slots

    def submit(self, ids: np.ndarray, sampling: Sampling) -> list[Any]:
        """As `Engine.submit`."""
        self.asked.append((ids.tolist(), sampling))

        def result(i: int) -> Completion:
            self.before()
            self.given += 1
            new = [(int(ids[-1]) + i + j) % 1024 for j in range(4)]
            return Completion(new, [0.0] * 4, "length", self.tokenizer.decode(new))

        return [
            types.SimpleNamespace(result=functools.partial(result, i)) for i in range(sampling.n)
        ]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(batches, "Engine", found.make)
    return found


# --- what is answered


def test_every_kind_of_line_in_order_with_its_other_fields(batch: Batch, played, words) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"name": "look", "parameters": {"type": "object"}}]
    lines = [
        {"id": 7, "prompt": "Hello 你好", "tags": ["a", None, 1.5]},
        {"prompt_ids": [1, 5, 9]},
        {"messages": messages, "think": "fast", "tools": tools, "id": {"x": "ü"}},
        {"messages": [{"role": "system", "content": "Be brief."}, *messages]},
        {"prompt": "Hello", "sampling": {"n": 2, "temperature": 0.5, "seed": 3}},
    ]
    batch.write(lines[0], "", lines[1], "  ", *lines[2:])
    code, err = batch.run("--batch", "2", "--top-k", "9")
    assert code == 0
    assert "5 answers" in err
    answers = batch.answers()
    own = [{k: v for k, v in line.items() if k not in ("completions", "run")} for line in answers]
    assert own == lines
    usual = Sampling(max_new_tokens=LENGTH, ignore_eos=True, top_k=9)
    assert played.shape.slots == 2
    assert played.shape.context >= max(len(ids) for ids, _ in played.asked) + LENGTH
    assert played.closed
    assert played.asked == [
        (words.encode("Hello 你好"), usual),
        ([1, 5, 9], usual),
        (chat.encode(words, messages, think="fast", tools=tools), usual),
        (chat.encode(words, lines[3]["messages"]), usual),
        (words.encode("Hello"), dataclasses.replace(usual, n=2, temperature=0.5, seed=3)),
    ]
    assert ids_of(answers)[1] == [[9, 10, 11, 12]]
    assert [len(line["completions"]) for line in answers] == [1, 1, 1, 1, 2]
    assert {"answer", "thinking", "tool_calls"} <= answers[2]["completions"][0].keys()
    assert "answer" not in answers[0]["completions"][0]


def test_chat_flags_are_for_lines_that_do_not_say(batch: Batch, played, words) -> None:
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    batch.write({"prompt": "Hi"}, {"messages": own, "think": None}, {"messages": own[1:]})
    assert batch.run("--chat", "--system", "Be brief.", "--think", "fast")[0] == 0
    brief = [{"role": "system", "content": "Be brief."}, own[1]]
    assert [ids for ids, _ in played.asked] == [
        chat.encode(words, brief, think="fast"),
        chat.encode(words, own),
        chat.encode(words, brief, think="fast"),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--temperature", "1", "--seed", "4", "--top-p", "0.9"],
    ],
    ids=["greedy", "sampled"],
)
def test_every_prompt_is_answered_as_if_alone(batch: Batch, folder, words, flags) -> None:
    lines = [{"prompt_ids": [1, 5 + i, 9]} for i in range(5)]
    lines[3]["sampling"] = {"temperature": 1.0, "seed": 3}
    batch.write(*lines)
    assert batch.run("--batch", "2", *flags)[0] == 0
    answers = batch.answers()
    usual = Sampling(max_new_tokens=LENGTH, ignore_eos=True)
    if flags:
        usual = dataclasses.replace(usual, temperature=1.0, seed=4, top_p=0.9)
    model = pangu_jax.load(folder)
    for line, answer in zip(lines, answers, strict=True):
        own = dataclasses.replace(usual, **line.get("sampling", {}))
        (alone,) = infer.generate(model, [line["prompt_ids"]], own, tokenizer=words)
        (got,) = answer["completions"]
        assert got["token_ids"] == alone.token_ids
        assert (got["text"], got["finish_reason"]) == (alone.text, "length")
        np.testing.assert_allclose(got["logprobs"], alone.logprobs, atol=1e-4)


@pytest.mark.usefixtures("played")
def test_no_newline_at_the_end_and_windows_ones(batch: Batch) -> None:
    batch.input.write_bytes(b'{"prompt_ids": [1]}\r\n{"prompt_ids": [5]}')
    assert batch.run()[0] == 0
    assert [line["prompt_ids"] for line in batch.answers()] == [[1], [5]]


# --- bad input, before anything is loaded or written

BAD = [
    ("{", "not valid JSON"),
    ("[1]", "must be a JSON object"),
    ("{}", "needs one of prompt, prompt_ids and messages"),
    ('{"prompt": "a", "prompt_ids": [1]}', "needs one of"),
    ('{"prompt": 5}', "prompt must be a string"),
    ('{"prompt": "\\ud800"}', "lone surrogate"),
    ('{"prompt": "a", "prompt": "b"}', "appears twice"),
    ('{"prompt": NaN}', "NaN"),
    ('{"prompt_ids": []}', "is empty"),
    ('{"prompt_ids": "1,2"}', "must be a list of token ids"),
    ('{"prompt_ids": [1.5]}', "must be a list of token ids"),
    ('{"prompt_ids": [[1], [2, 3]]}', "must be a list of token ids"),
    ('{"prompt_ids": null}', "must be a list of token ids"),
    ('{"prompt_ids": [1024]}', "outside the vocabulary of 1024"),
    ('{"prompt_ids": [-1]}', "outside the vocabulary"),
    ('{"prompt_ids": [99999999999999999999]}', "outside the vocabulary"),
    (json.dumps({"prompt_ids": [1] * 513}), "longer than the model's 512 positions"),
    ('{"messages": "Hi"}', "messages must be a list"),
    ('{"messages": [5]}', "must be an object"),
    ('{"messages": [{"content": "Hi"}]}', "object with a role"),
    ('{"messages": [{"role": "user", "content": 5}]}', "content must be text"),
    ('{"messages": [{"role": "user", "content": "a"}], "think": "hard"}', "think must be one of"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": {}}', "tools must be a list"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', "with a name"),
    ('{"prompt": "a", "sampling": 5}', "sampling must be an object"),
    ('{"prompt": "a", "sampling": {"temprature": 1}}', "did you mean temperature?"),
    ('{"prompt": "a", "sampling": {"temperature": "hot"}}', "temperature must be a number"),
    ('{"prompt": "a", "sampling": {"temperature": true}}', "temperature must be a number"),
    ('{"prompt": "a", "sampling": {"n": 0}}', "n must be from 1"),
    ('{"prompt": "a", "sampling": {"max_new_tokens": null}}', "max_new_tokens must be"),
    ('{"prompt": "a", "sampling": {"stop": 5}}', "stop must be a list"),
    ('{"prompt": "a", "sampling": {"logit_bias": {"1024": 1}}}', "outside the vocabulary"),
    ('{"prompt": "a", "sampling": {"logit_bias": {"x": 1}}}', "logit_bias"),
    ('{"prompt": "a", "sampling": {"logit_bias": [1]}}', "logit_bias"),
    ('{"prompt": "a", "sampling": {"ignore_eos": "false"}}', "ignore_eos"),
    ('{"messages": []}', "message"),
    ('{"prompt_ids": [1], "id": "\\ud800"}', "surrogate"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD)
@pytest.mark.usefixtures("unloaded")
def test_a_bad_line_is_named(batch: Batch, line: str, complaint: str) -> None:
    batch.write({"prompt": "good"}, "", line, {"prompt": "good"})
    err = batch.refused()
    assert err.startswith(f"error: {batch.input}, line 3: ")
    assert complaint in err
    assert not batch.output.exists()


@pytest.mark.usefixtures("unloaded")
def test_a_line_that_is_not_text_is_named(batch: Batch) -> None:
    batch.input.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert f"{batch.input}, line 2: not UTF-8" in batch.refused()


@pytest.mark.usefixtures("unloaded")
def test_inputs_that_are_no_files(batch: Batch, tmp_path: Path) -> None:
    assert "no such file" in batch.refused()
    batch.input.mkdir()
    assert "not a regular file" in batch.refused()
    batch.input.rmdir()
    os.mkfifo(batch.input)
    assert "not a regular file" in batch.refused()
    batch.input.unlink()
    batch.input.write_text("\n  \n")
    assert "holds no prompts" in batch.refused()


@pytest.mark.usefixtures("unloaded")
def test_outputs_that_cannot_be(batch: Batch, tmp_path: Path) -> None:
    batch.write({"prompt": "a"})
    batch.output = tmp_path / "missing" / "answers.jsonl"
    assert str(batch.output) in batch.refused() or str(batch.output.parent) in batch.refused()
    batch.output = tmp_path
    assert "not a regular file" in batch.refused()
    batch.output = tmp_path / "pipe"
    os.mkfifo(batch.output)
    assert "not a regular file" in batch.refused()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(batch: Batch, tmp_path: Path) -> None:
    batch.write({"prompt": "a"})
    (tmp_path / "locked").mkdir(mode=0o500)
    batch.output = tmp_path / "locked" / "answers.jsonl"
    assert str(batch.output) in batch.refused()


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.usefixtures("unloaded")
def test_the_input_is_no_output(batch: Batch, end: str) -> None:
    batch.input.write_text('{"prompt": "a"}' + end)
    batch.output = batch.input
    batch.refused()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("text", ["precious", "precious\n", "\n", "{}\n", '{"prompt": "a"}', "\0"])
def test_somebody_elses_file_is_left_alone(batch: Batch, text: str) -> None:
    batch.write({"prompt": "a"}, {"prompt": "b"})
    batch.output.write_text(text)
    assert "choose another --output" in batch.refused()


# --- going on


@pytest.mark.usefixtures("played")
def test_all_done_is_quick(batch: Batch, monkeypatch) -> None:
    batch.write({"prompt": "a"}, {"prompt": "b"})
    assert batch.run()[0] == 0
    before = batch.output.read_bytes()
    monkeypatch.setattr(loading, "model", lambda command: pytest.fail("loaded"))
    code, err = batch.run()
    assert code == 0
    assert "2 of 2 are there already" in err
    assert batch.output.read_bytes() == before


@pytest.mark.usefixtures("played")
def test_it_goes_on_where_the_file_ends(batch: Batch) -> None:
    batch.write(*({"prompt_ids": [1, 5 + i]} for i in range(5)))
    assert batch.run()[0] == 0
    whole = batch.output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[1] + 30, ends[3] - 2, len(whole) - 1):
        batch.output.write_bytes(whole[:cut])
        code, _ = batch.run("--batch", "2")
        assert code == 0
        assert ids_of(batch.answers()) == ids_of(list(map(json.loads, whole.splitlines())))
        assert len(batch.output.read_bytes().splitlines()) == 5


@pytest.mark.usefixtures("played")
def test_more_prompts_may_be_added(batch: Batch) -> None:
    batch.write({"prompt": "a"})
    assert batch.run()[0] == 0
    batch.write({"prompt": "a"}, {"prompt": "b"})
    assert batch.run()[0] == 0
    assert [line["prompt"] for line in batch.answers()] == ["a", "b"]


@pytest.fixture
def answered(batch: Batch, played: Played, monkeypatch: pytest.MonkeyPatch) -> Batch:
    batch.write({"prompt": "a"}, {"prompt": "b"})
    assert batch.run()[0] == 0
    monkeypatch.setattr(loading, "model", lambda command: pytest.fail("loaded"))
    return batch


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1"],
        ["--max-new-tokens", "9"],
        ["--chat"],
        ["--dtype", "bfloat16"],
        ["--logit-bias", "5:1"],
        ["--stop", "x"],
        ["--system", "Be brief."],
    ],
)
def test_other_settings_are_refused(answered: Batch, flags: list[str]) -> None:
    assert "made by another model or settings" in answered.refused(*flags)


def test_other_prompts_are_refused(answered: Batch) -> None:
    answered.write({"prompt": "a"}, {"prompt": "c"})
    assert f"{answered.output}, line 2: answers another prompt" in answered.refused()
    answered.write({"prompt": "b"}, {"prompt": "a"})
    assert f"{answered.output}, line 1: answers another prompt" in answered.refused()
    answered.write({"prompt": "a", "id": 1}, {"prompt": "b"})
    assert f"{answered.output}, line 1: answers another prompt" in answered.refused()
    answered.write({"prompt": "a"})
    assert "has more lines than the input" in answered.refused()


@pytest.mark.parametrize("garbage", [b"garbage\n", b"\xff\n", b"[]\n", b"\n", b'{"prompt": "b"}\n'])
def test_garbage_in_the_middle_is_refused(answered: Batch, garbage: bytes) -> None:
    first = answered.output.read_bytes().splitlines(keepends=True)[0]
    answered.output.write_bytes(first + garbage)
    assert f"{answered.output}, line 2: " in answered.refused()


@pytest.mark.usefixtures("played")
def test_another_model_is_refused(batch: Batch, tmp_path: Path) -> None:
    """Of the same shape, so that only the weights differ: two checkpoints of one training run."""
    batch.model = write_random(tmp_path / "other")
    batch.write({"prompt": "a"}, {"prompt": "b"})
    assert batch.run()[0] == 0
    batch.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    shape = {**folders.DENSE, "vocab_size": 1024, "eos_token_id": 15}
    folders.write(batch.model, shape, folders.random_tensors(shape, seed=1))
    assert "made by another model" in batch.refused()


def test_ctrl_c_leaves_whole_lines(batch: Batch, played: Played) -> None:
    batch.write(*({"prompt_ids": [1, 5 + i]} for i in range(5)))

    def interrupt() -> None:
        if played.given == 2:
            raise KeyboardInterrupt

    played.before = interrupt
    code, err = batch.run("--batch", "1")
    assert (code, err) == (130, "interrupted\n")
    assert len(batch.answers()) == 2
    played.before = lambda: None
    code, err = batch.run("--batch", "1")
    assert code == 0
    assert "2 of 5 are there already" in err
    assert [line["prompt_ids"][1] for line in batch.answers()] == [5, 6, 7, 8, 9]


def test_a_crash_leaves_whole_lines(batch: Batch, played: Played) -> None:
    batch.write(*({"prompt_ids": [1, 5 + i]} for i in range(3)))

    def crash() -> None:
        if played.given == 2:
            raise MemoryError

    played.before = crash
    code, err = batch.run("--batch", "2")
    assert code == 2
    assert err.startswith("error: out of memory")
    assert len(batch.answers()) == 2


@pytest.mark.slow
def test_kill_and_go_on(batch: Batch, tmp_path: Path) -> None:
    count = 200
    batch.write(*({"prompt_ids": [1, 5 + i]} for i in range(count)))
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PANGU_JAX_NATIVE": "0"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    argv = [sys.executable, "-m", "infer", *batch.argv("--batch", "1")]
    for signum, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(batch.output.read_bytes()) if batch.output.exists() else 0
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not batch.output.exists() or len(batch.output.read_bytes()) < before + 300:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        if signum == signal.SIGINT:
            assert err.endswith("interrupted\n")
            assert 0 < len(batch.answers()) < count
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line["prompt_ids"][1] for line in batch.answers()] == [*range(5, 5 + count)]
    resumed = ids_of(batch.answers())
    batch.output.unlink()
    assert batch.run("--batch", "16")[0] == 0
    assert resumed == ids_of(batch.answers())
