"""A chat in a real terminal: what is on the screen, which keys do what, how it is left."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from infer import door, terminal
from infer.conversation import Answer, Forgotten
from infer.terminal import Pipe
from pangu_jax.text.parse import Reply, Restart, Text, ToolCall
from tests.infer.test_conversation import SPOKEN, write_scripted

ROOT = Path(__file__).parent.parent.parent
CTRL_C, CTRL_D, ENTER, UP, ALT_ENTER = "\x03", "\x04", "\r", "\x1b[A", "\x1b\r"
PROMPT = "\x1b[?2004h"  # of pastes in brackets: the line editor is there
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A program that runs in a pseudo-terminal of 24 lines."""

    def __init__(self, argv: list[str], env: dict[str, str], columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, *argv],
            cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._seen = 0
        self._raw = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What came since the last call, up to this text."""
        deadline = time.monotonic() + seconds
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._more(deadline), f"no {text!r} in {self.shown[self._seen :]!r}"
        start, self._seen = self._seen, at + len(text)
        return self.shown[start : self._seen]

    def exit_code(self, seconds: float = 60) -> int:
        """How the program ends; reads what it still says."""
        deadline = time.monotonic() + seconds
        while self._more(deadline):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 1))

    def _more(self, deadline: float) -> bool:
        if not select.select([self.master], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            return False
        self._raw += data
        self.shown = self._raw.decode(errors="replace")
        return bool(data)


def screen(shown: str) -> list[str]:
    """The lines that are left to read, as far as rich moves the cursor."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b", shown):
        number = int(re.sub(r"\D", "", token) or 1) if token.startswith("\x1b") else 0
        if token == "\n":
            row += 1
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b[") and token.endswith("A"):
            row = max(row - number, 0)
        elif token.startswith("\x1b[") and token.endswith("K"):
            lines[row] = ""
        elif not token.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + token + line[column + 1 :], column + 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("scripted"), template=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def env(cache: str, tmp_path: Path) -> dict[str, str]:
    unwanted = ("JAX_COMPILATION_CACHE_DIR", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    found = {name: value for name, value in os.environ.items() if name not in unwanted}
    found |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": cache, "PANGU_JAX_NATIVE": "0"}
    found |= {"TERM": "xterm", "PYTHONUTF8": "1"}
    return {**found, "PROMPT_TOOLKIT_NO_CPR": "1"}


def chat(folder: Path, env: dict[str, str], *flags: str) -> Terminal:
    return Terminal(["-m", "infer", "chat", "--model", str(folder), *flags], env)


# --- a whole chat


@pytest.mark.slow
def test_a_chat_from_the_first_prompt_to_the_last(folder: Path, env, tmp_path: Path) -> None:
    with chat(folder, env) as chats:
        assert "Ctrl-C stops an answer" in chats.until(PROMPT)
        chats.type("Hi" + ENTER)
        shown = chats.until(PROMPT)
        assert "▸ thought for" in shown
        assert SPOKEN in shown.split("▸ thought for")[1]
        assert f"{SPOKEN}\x1b[31m" not in shown
        assert f"{SPOKEN}\ufffd[31m" in shown
        assert "19 tokens, " in shown
        chats.type("never sent" + CTRL_C + "/thought" + ENTER)
        assert "Let me think." in chats.until(PROMPT)
        for message in ("\x1b[200~one\ntwo\x1b[201~", f"three\\{ENTER}four{ALT_ENTER}five"):
            chats.type(message + ENTER)
            assert chats.until(PROMPT).count("tokens/s") == 1
        chats.type(CTRL_D)
        assert chats.exit_code() == 0
        assert screen(chats.shown)[-2:] == ["bye", ""]
        assert chats.shown.count("tokens/s") == 3
        assert "Traceback" not in chats.shown
        assert not is_raw(chats)
    history = tmp_path / ".local" / "state" / "pangu_jax" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    typed = [line for line in history.read_text().splitlines() if line.startswith("+")]
    assert typed == ["+Hi", "+/thought", "+one", "+two", "+three", "+four", "+five"]
    with chat(folder, env) as again:
        again.until(PROMPT)
        again.type(UP)
        again.until("five")
        again.type(UP * 3)
        again.until("one")
        again.type(CTRL_C)
        time.sleep(0.2)
        again.type(CTRL_C)
        again.until("bye")
        assert again.exit_code() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(folder: Path, env) -> None:
    with chat(folder, env, "--logit-bias", "15:-1000") as chats:
        chats.until(PROMPT)
        chats.type("Hi" + ENTER)
        chats.until(SPOKEN)
        chats.type(CTRL_C)
        chats.until("(stopped)", 10)
        chats.until("tokens/s", 10)
        chats.until(PROMPT, 10)
        chats.type("Hi" + ENTER)
        chats.until(SPOKEN)
        chats.type(CTRL_C)
        time.sleep(0.05)  # two signals at once are one
        chats.type(CTRL_C)
        chats.until("bye", 10)
        assert chats.exit_code() == 0
        assert "Traceback" not in chats.shown
        assert not is_raw(chats)


def is_raw(chats: Terminal) -> bool:
    """Whether the terminal was left without echo."""
    return not termios.tcgetattr(chats.master)[3] & termios.ECHO


@pytest.mark.slow
def test_answers_piped_to_a_terminal_cannot_command_it(folder: Path, env) -> None:
    code = f"""
        import subprocess, sys
        argv = [sys.executable, "-m", "infer", "chat", "--model", {str(folder)!r}]
        sys.exit(subprocess.run(argv, input=b"Hi\\n").returncode)
    """
    with Terminal(["-c", textwrap.dedent(code)], env) as piped:
        assert piped.exit_code() == 0
        assert SPOKEN in piped.shown
        assert f"{SPOKEN}\x1b[31m" not in piped.shown


@pytest.mark.slow
def test_generated_text_cannot_command_the_terminal(folder: Path, env) -> None:
    argv = ["-m", "infer", "generate", "--model", str(folder), "--chat", "--prompt", "Hi"]
    with Terminal(argv, env) as generate:
        assert generate.exit_code() == 0
        assert SPOKEN in generate.shown
        assert f"{SPOKEN}\x1b[31m" not in generate.shown


# --- the screen alone


def play(env: dict[str, str], *lines: str, columns: int = 80) -> Terminal:
    """A finished program that played these lines of Python on a Screen."""
    code = """
        import sys, time
        from infer.conversation import Answer, Forgotten
        from infer.terminal import Screen
        from pangu_jax.text.parse import Reply, Restart, Text, ToolCall

        def think(text): screen.show(Text("thinking", text)); time.sleep(0.1)
        def say(text): screen.show(Text("answer", text))
        def end(tokens=3, stopped=False, reason="stop", **reply):
            screen.end(Answer(Reply(**reply), stopped, 9, tokens, 12.345, reason))
        screen = Screen(None)
    """
    argv = ["-c", "\n".join([textwrap.dedent(code), *lines])]
    with Terminal(argv, env, columns) as played:
        assert played.exit_code() == 0, played.shown
    return played


def left(played: Terminal) -> list[str]:
    """The lines on the screen that are not empty."""
    return [line for line in screen(played.shown) if line]


def test_thinking_is_dim_and_folded_when_it_is_done(env: dict[str, str]) -> None:
    played = play(
        env,
        "screen.begin()",
        *(f"think('Thought {i}.\\n')" for i in range(9)),
        "say('Four')",
        "say('teen.\\nYes.')",
        "end()",
    )
    before, after = played.shown.split("▸ thought for")
    assert "\x1b[2mThought 8." in before
    assert "Thought" not in after
    lines = left(played)
    assert re.fullmatch(r"▸ thought for \d+\.\d s; /thought shows it", lines[0])
    assert lines[1:] == ["Fourteen.", "Yes.", "3 tokens, 12.3 tokens/s"]
    assert -1 < played.shown.rfind(HIDE) < played.shown.rfind(SHOW)


def test_only_the_last_lines_of_thinking_are_shown(env: dict[str, str]) -> None:
    text = "".join(f"{i} " for i in range(400))
    played = play(env, "screen.begin()", f"think({text!r})", "time.sleep(0.3)", columns=40)
    lines = left(played)
    assert len(lines) <= terminal.SPINNER_LINES + 1
    assert lines[-1].endswith("399")
    assert max(map(len, lines)) <= 40


def test_an_answer_without_thinking_has_nothing_to_fold(env: dict[str, str]) -> None:
    played = play(env, "screen.begin()", "say('Hi')", "end()")
    assert left(played) == ["Hi", "3 tokens, 12.3 tokens/s"]


def test_how_answers_ended(env: dict[str, str]) -> None:
    endings = {
        "end(stopped=True)": "(stopped)",
        "end(reason='length')": "(cut off",
        "end(truncated=True)": "(the thinking did not end",
        "end(broken=('{',))": "(a tool call that cannot be read: {)",
    }
    plays = [line for end in endings for line in ("screen.begin()", "think('Hm')", end)]
    lines = left(play(env, *plays))
    assert len(lines) == 3 * len(endings)
    for i, remark in enumerate(endings.values()):
        assert lines[3 * i].startswith("▸ thought for")
        assert lines[3 * i + 1].startswith(remark)
        assert lines[3 * i + 2] == "3 tokens, 12.3 tokens/s"


def test_other_events(env: dict[str, str]) -> None:
    played = play(
        env,
        "screen.begin()",
        "screen.show(Forgotten(2))",
        "say('This is a draft.')",
        "screen.show(Restart('answer'))",
        "say('Done.')",
        "screen.show(ToolCall('f', {'x': 1}))",
        "end()",
        "screen.farewell()",
    )
    assert left(played) == [
        "(the oldest 2 messages no longer fit and are forgotten)",
        "This is a draft.",
        "(that was not the answer yet)",
        "Done.",
        "call f({'x': 1})",
        "3 tokens, 12.3 tokens/s",
        "bye",
    ]


def test_what_breaks_off_leaves_the_cursor(env: dict[str, str]) -> None:
    played = play(env, "screen.begin()", "think('Hm')", "screen.abandon()", "screen.tell('oh')")
    assert left(played)[-1] == "oh"
    assert -1 < played.shown.rfind(HIDE) < played.shown.rfind(SHOW)


HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\x7fe\x08f\x00g"


def test_no_part_of_an_answer_can_command_the_terminal(env: dict[str, str]) -> None:
    played = play(
        env,
        "screen.begin()",
        f"think({HOSTILE!r})",
        f"say({HOSTILE!r})",
        f"screen.show(ToolCall({HOSTILE!r}, {{'x': {HOSTILE!r}}}))",
        f"end(broken=({HOSTILE!r},))",
        f"screen.tell({HOSTILE!r})",
        f"screen.welcome([{HOSTILE!r}, {HOSTILE!r}])",
    )
    for forbidden in ("\x1b]0;", "\x1b[2J", "\x9b", "\x7f", "\x08", "\x07", "\x00"):
        assert forbidden not in played.shown
    assert "a\ufffd]0;title\ufffdb\ufffd[2Jc\ufffd31md\ufffde\ufffdf\ufffdg" in played.shown


def test_an_answer_is_shown_as_it_is(env: dict[str, str]) -> None:
    texts = ["[bold]no markup[/bold] [/]", "你好 ü", "if x:", "    y  # z", "1:100:3", "a:smile:b"]
    plays = [f"screen.begin(); say({text!r}); screen.abandon()" for text in texts]
    played = play(env, *plays, *(f"screen.tell({text!r})" for text in texts))
    assert left(played) == texts * 2


@pytest.mark.slow
def test_long_thoughts_do_not_slow_down(env: dict[str, str]) -> None:
    """A slow model thinks for tens of thousands of tokens; each update must stay cheap."""
    played = play(
        env,
        "screen.begin()",
        "for i in range(8000): screen._thinking += 'some words of a thought, '",
        "start = time.perf_counter()",
        "for i in range(20): screen.show(Text('thinking', 'more '))",
        "spent = time.perf_counter() - start",
        "screen.abandon()",
        "print(f'spent {spent / 20 * 1000:.0f} ms')",
    )
    (spent,) = re.findall(r"spent (\d+) ms", played.shown)
    assert int(spent) < 15


# --- parts


@pytest.mark.parametrize("char", [*map(chr, range(32)), *map(chr, range(127, 160))])
def test_control_characters_are_not_printable(char: str) -> None:
    assert terminal.printable(f"a{char}b") == (f"a{char}b" if char in "\n\t" else "a\ufffdb")


def test_everything_else_is_printable() -> None:
    text = "Grüße, 你好 🙂\u200d e\u0301 \u00a0"
    assert terminal.printable(text) == text


def test_interrupts_call_stop_then_raise() -> None:
    calls: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with door.interrupts(lambda: calls.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        assert calls == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert calls == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_terminations_call_stop_and_nothing_else() -> None:
    """However often: who sends SIGTERM again only asks again. Ctrl-C is left as it was."""
    calls: list[int] = []
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with door.terminations(lambda: calls.append(1)):
        assert signal.getsignal(signal.SIGINT) is interrupt
        for count in (1, 2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [1] * count
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ends_within_terminations_leaves_the_signal_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="lost"), door.terminations(lambda: None):
        raise ValueError("lost")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("code", [door.INTERRUPTED, door.TERMINATED, 0, 2])
def test_a_program_ends_with_the_code_of_its_command(code: int, env: dict[str, str]) -> None:
    """Asked to stop it does not wait for threads that compile; what it said is there."""
    program = f"""
        import threading, time
        from infer import door

        def main():
            if {code} in (door.INTERRUPTED, door.TERMINATED):
                threading.Thread(target=time.sleep, args=(600,)).start()
            print("done")
            return {code}

        door.leave(main)
    """
    argv = [sys.executable, "-c", textwrap.dedent(program)]
    found = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == code, found.stderr
    assert found.stdout == "done\n"


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ("", []),
        ("one\ntwo\n", ["one", "two"]),
        ("one\n\ntwo", ["one", "", "two"]),
        ("one\\\n  two\\\n\nthree\n", ["one\n  two\n", "three"]),
        ("one\\", ["one"]),
        ("one\\\n", ["one"]),
        ("C:\\path\\file\n", ["C:\\path\\file"]),
        ("Grüße 你好\n", ["Grüße 你好"]),
    ],
)
def test_messages_of_a_pipe(monkeypatch, data: str, messages: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(data))
    pipe, found = Pipe(), []
    while (text := pipe.read()) is not None:
        found.append(text)
    assert [text.rstrip("\n") for text in found] == [text.rstrip("\n") for text in messages]


def test_a_pipe_gives_answers_alone(capsys) -> None:
    def answered(*events: Any, **reply: Any) -> tuple[str, str]:
        pipe = Pipe()
        pipe.welcome(["Hello."])
        pipe.begin()
        for event in events:
            pipe.show(event)
        pipe.end(Answer(Reply(**reply), False, 1, 1, 1.0, "stop"))
        pipe.farewell()
        return tuple(capsys.readouterr())

    thought = Text("thinking", "Hm.")
    assert answered(thought, Text("answer", "Yes"), Text("answer", ".")) == ("Yes.\n", "")
    assert answered(Restart("thinking"), Text("answer", "Yes.")) == ("Yes.\n", "")
    assert answered() == ("\n", "")
    out, err = answered(thought, truncated=True)
    assert out == "\n"
    assert "the thinking did not end" in err
    out, err = answered(Forgotten(4), Text("answer", "Yes."))
    assert out == "Yes.\n"
    assert "the oldest 4 messages" in err
    out, err = answered(ToolCall("f", {"x": 1}))
    assert "f" in err, "a tool call is lost without a word"


def test_history_is_the_owners_alone(monkeypatch, tmp_path: Path) -> None:
    from infer import chat as command

    monkeypatch.setenv("HOME", str(tmp_path))
    file = command._history()
    assert file == tmp_path / ".local" / "state" / "pangu_jax" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert command._history() == file
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert command._history() is None
