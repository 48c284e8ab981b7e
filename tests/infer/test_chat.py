"""The chat command: what is typed, and a chat through real pipes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pangu_jax
from infer import __main__ as door
from infer import chat as command
from infer import generation
from infer.conversation import Answer, Conversation, Forgotten
from infer.sampling import Sampling
from infer.terminal import Pipe
from pangu_jax.errors import InputError
from pangu_jax.text.parse import Event, Text
from pangu_jax.text.tokenizer import Tokenizer
from tests.infer.test_conversation import (
    ESCAPE,
    SPOKEN,
    Playback,
    conversation,
    prompt,
    write_random,
    write_scripted,
)

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_random(tmp_path_factory.mktemp("random")))


@pytest.fixture
def playback(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Playback:
    found = Playback(words)
    monkeypatch.setattr(generation, "stream", found.stream)
    return found


class Typist(Pipe):
    """A view that types lines and remembers what it saw."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self.lines = list(lines)
        self.told: list[str] = []
        self.calls: list[str] = []
        self.answers: list[Answer] = []

    def read(self) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def tell(self, line: str) -> None:
        self.told.append(line)

    def begin(self) -> None:
        self.calls.append("begin")

    def show(self, event: Event | Forgotten) -> None:
        self.calls.append(event.text if isinstance(event, Text) else type(event).__name__)

    def end(self, answer: Answer) -> None:
        self.calls.append("end")
        self.answers.append(answer)

    def abandon(self) -> None:
        self.calls.append("abandon")


def typed(talk: Conversation, *lines: str) -> Typist:
    view = Typist(*lines)
    command.talk(talk, view)
    assert not view.lines
    return view


# --- what is typed


def test_messages_are_answered_until_the_end(playback: Playback, words) -> None:
    playback.says("Hel", "lo!")
    playback.says("Bye!")
    view = typed(conversation(words), "Hi", "", "  \n ", "Bye")
    assert view.calls == ["begin", "Hel", "lo!", "end", "begin", "Bye!", "end"]
    assert view.told == []
    assert [each.reply.answer for each in view.answers] == ["Hello!", "Bye!"]


def test_a_message_of_several_lines_is_one(playback: Playback, words) -> None:
    playback.says("Yes.")
    typed(conversation(words), "One\n\n  two\n")
    assert playback.prompts == [prompt("系：", "用：One\n\n  two\n")]


@pytest.mark.parametrize("text", ["/no_think", "/auto_think", "/no_think Hi", "Hi /think fast"])
def test_messages_that_are_no_commands(playback: Playback, words, text: str) -> None:
    playback.says("Yes.")
    view = typed(conversation(words), text)
    assert view.told == []
    assert playback.prompts == [prompt("系：", f"用：{text}")]


@pytest.mark.parametrize("text", ["/quit", "/exit", "/quit now", "/quit  "])
def test_leaving(playback: Playback, words, text: str) -> None:
    view = Typist(text, "never read")
    command.talk(conversation(words), view)
    assert view.lines == ["never read"]


def test_think_changes_and_tells(playback: Playback, words) -> None:
    talk = conversation(words)
    playback.says("Yes.")
    lines = ["/think", "/think fast", "/think", "/think hard", "Hi", "/think  slow ", "/think auto"]
    view = typed(talk, *lines)
    assert [line for line in view.told if "fast" in line] == [
        "(thinking: fast)",
        "(thinking: fast)",
        'error: unknown thinking mode "hard"; use fast, slow or auto',
    ]
    assert view.told[-2:] == ["(thinking: slow)", "(thinking: auto)"]
    assert playback.prompts == [prompt("系：", "用：Hi /no_think")]


def test_system_changes_and_tells(playback: Playback, words) -> None:
    talk = conversation(words, system="Be brief.")
    for _ in range(3):
        playback.says("[unused11][unused12]")
    view = typed(talk, "/system", "Hi", "/system Be  kind. ", "Hi", "/system -", "/system", "Hi")
    assert view.told == [
        "(system message: Be brief.)",
        "(system message: Be  kind.)",
        "(system message: none)",
        "(system message: none)",
    ]
    systems = ["系：Be brief.", "系：Be  kind.", "系："]
    assert playback.prompts == [prompt(each, "用：Hi") for each in systems]


def test_a_system_message_may_have_lines(playback: Playback, words) -> None:
    talk = conversation(words)
    view = typed(talk, "/system Be brief.\nBe kind.")
    assert talk.system == "Be brief.\nBe kind."
    view = typed(talk, "/system\nOne.\nTwo.")
    assert talk.system == "One.\nTwo.", view.told


def test_white_space_after_a_command(playback: Playback, words) -> None:
    talk = conversation(words)
    view = typed(talk, "/think\tfast", "/reset \n")
    assert view.told == ["(thinking: fast)", "(forgotten)"]


def test_reset_and_thought(playback: Playback, words) -> None:
    talk = conversation(words)
    playback.says("[unused16]Hm, hm.[unused17]Hello!")
    playback.says("Hello!")
    view = typed(talk, "/thought", "Hi", "/thought", "/reset", "Hi", "/thought")
    assert view.told == ["(no thinking to show)", "Hm, hm.", "(forgotten)", "(no thinking to show)"]
    assert playback.prompts == [prompt("系：", "用：Hi")] * 2


def test_help_names_every_command(words) -> None:
    (told,) = typed(conversation(words), "/help").told
    for name in command.COMMANDS:
        assert name in told or name in ("/help", "/exit")
    assert "Ctrl-C" in told
    assert "Alt-Enter" in told


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("/thnk fast", "unknown command '/thnk'; did you mean /think?"),
        ("/rest", "unknown command '/rest'; did you mean /reset?"),
        ("/", "unknown command '/'; see /help"),
        ("/etc/passwd is a file", "unknown command '/etc/passwd'"),
        ("//", "unknown command '//'"),
        ("/\x1b[31m", "unknown command '/\\x1b[31m'"),
    ],
)
def test_unknown_commands(words, text: str, complaint: str) -> None:
    (told,) = typed(conversation(words), text).told
    assert told.startswith(f"error: {complaint}")


def test_errors_do_not_end_the_talk(playback: Playback, words) -> None:
    talk = conversation(words, positions=100)
    playback.says("One", InputError("no more"))
    playback.says("Yes.")
    view = typed(talk, "long " * 200, "fails", "lone \ud800", "/nothing", "Hi")
    assert len([line for line in view.told if line.startswith("error: ")]) == 4
    assert all(line.count("\n") == 0 for line in view.told)
    assert view.calls == [
        "begin", "abandon", "begin", "One", "abandon", "begin", "abandon", "begin", "Yes.", "end"
    ]  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), MemoryError(), OSError(5)])
def test_any_failure_gives_the_view_back(playback: Playback, words, error: Exception) -> None:
    """A view left open would leave a terminal without its cursor."""
    playback.says("One", error)
    view = Typist("Hi")
    with contextlib.suppress(type(error)):
        command.talk(conversation(words), view)
    assert view.calls == ["begin", "One", "abandon"]


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(playback: Playback, words) -> None:
    playback.says("One, ", "two, ", "three")
    playback.says("Yes.")
    playback.between = lambda piece: os.kill(os.getpid(), signal.SIGINT) if piece == 1 else None
    view = Typist("Count.", "Hi")
    before = signal.getsignal(signal.SIGINT)
    command.talk(conversation(words), view)
    assert signal.getsignal(signal.SIGINT) is before
    assert view.answers[0].stopped
    assert view.answers[0].reply.answer == "One, two,"
    assert playback.prompts[1] == prompt("系：", "用：Count.", "助：One, two,", "用：Hi")


def test_a_second_ctrl_c_leaves(playback: Playback, words) -> None:
    playback.says("One, ", "two, ", "three")

    def twice(piece: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    playback.between = twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        command.talk(conversation(words), Typist("Count."))
    assert signal.getsignal(signal.SIGINT) is before


# --- through pipes


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("scripted"), template=True)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    env = {**os.environ, "XDG_CACHE_HOME": cache, "PANGU_JAX_NATIVE": "0", "PYTHONUTF8": "1"}
    return {name: value for name, value in env.items() if name != "JAX_COMPILATION_CACHE_DIR"}


def argv(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "infer", "chat", "--model", str(folder), *flags]


def piped(
    folder: Path, data: bytes, env: dict[str, str], *flags: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        argv(folder, *flags), cwd=ROOT, input=data, env=env, capture_output=True, timeout=120
    )


@pytest.mark.slow
def test_only_answers_on_stdout(scripted: Path, environment: dict[str, str]) -> None:
    lines = "Hi\n\n/think fast\nGrüße 你好\n/xyzzy\none\\\ntwo\n/reset\nlast, without a newline"
    done = piped(scripted, lines.encode(), environment)
    assert done.returncode == 0
    assert done.stdout.decode() == f"{SPOKEN}{ESCAPE}\n" * 4
    remarks = done.stderr.decode().splitlines()
    assert remarks == [
        "(thinking: fast)",
        "error: unknown command '/xyzzy'; see /help",
        "(forgotten)",
    ]


@pytest.mark.slow
def test_in_order_continued_and_as_the_model_says(tmp_path: Path, environment) -> None:
    folder = write_random(tmp_path / "random")
    done = piped(folder, "Hi 你好\none\\\ntwo\n".encode(), environment, "--max-new-tokens=24")
    model, words = pangu_jax.load(folder), Tokenizer.load(folder)
    talk = Conversation(model, words, Sampling(max_new_tokens=24))
    answers: list[Any] = [list(talk.ask(text))[-1].reply.answer for text in ("Hi 你好", "one\ntwo")]
    assert answers[0] != answers[1]
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == "\n".join(answers).splitlines()


def test_nothing_to_say(scripted: Path, environment: dict[str, str]) -> None:
    done = piped(scripted, b"", environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_is_no_text_is_one_error_line(scripted: Path, environment: dict[str, str]) -> None:
    for utf8 in ("1", "0"):
        env = {**environment, "PYTHONUTF8": utf8, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        done = piped(scripted, b"\xff\xfe\nHi\n", env)
        assert done.returncode in (0, 2)
        err = done.stderr.decode()
        assert "Traceback" not in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_answers_come_while_stdin_is_open(scripted: Path, environment: dict[str, str]) -> None:
    with talking(scripted, environment) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(2):
            process.stdin.write(b"Hi\n")
            process.stdin.flush()
            assert process.stdout.readline().decode() == f"{SPOKEN}{ESCAPE}\n"
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_reader_that_goes_away(scripted: Path, environment: dict[str, str]) -> None:
    with talking(scripted, environment) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"Hi\nHi\n")
        process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr
        assert process.stderr.read() == b""


def test_ctrl_c_in_a_pipe_stops_the_answer(scripted: Path, environment: dict[str, str]) -> None:
    with talking(scripted, environment, "--logit-bias", "15:-1000") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"Hi\n/think fast\n")
        process.stdin.close()
        assert process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.wait(60) == 0
        assert process.stderr.read() == b"(thinking: fast)\n"


def test_ctrl_c_while_waiting_leaves(scripted: Path, environment: dict[str, str]) -> None:
    with talking(scripted, environment) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        answer = process.stdout.readline().decode()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert answer + process.stdout.read().decode() == f"{SPOKEN}{ESCAPE}\n"
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


class talking:
    """A chat with pipes that stay open; ended whatever happens."""

    def __init__(self, folder: Path, env: dict[str, str], *flags: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            argv(folder, *flags), cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:
            pass


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--logit-bias", "1024:1"], "outside the vocabulary of 1024"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--stop", ""], "stop must be a list of strings that are not empty"),
    ],
)
def test_bad_settings_are_one_line(scripted: Path, flags, complaint, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command.loading, "model", lambda _: pytest.fail("the model was loaded"))
    monkeypatch.setattr("infer.door.prepare_jax", lambda: None)
    assert door.main(["chat", "--model", str(scripted), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err
