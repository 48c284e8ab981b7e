"""What a chat looks like: in a terminal, and in a pipe."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text as Styled

from infer.conversation import Answer, Forgotten
from infer.progress import printable, safe
from pangu_jax.errors import InputError
from pangu_jax.text.parse import Event, Restart, Text, ToolCall

SPINNER_LINES = 6  # of thinking that are shown while it goes on
CONTINUED = "\\"


class Pipe:
    """Answers on stdout and nothing else; every line of stdin is a message.

    Answers come as they are made: text that turns out not to be the answer yet stays, and the
    answer follows on a new line.
    """

    def __init__(self) -> None:
        self._given = False

    def read(self) -> str | None:
        """The next message; None at the end. A backslash at a line's end continues it."""
        lines: list[str] = []
        try:
            for line in sys.stdin:
                line = line.rstrip("\n")
                lines.append(line.removesuffix(CONTINUED))
                if not line.endswith(CONTINUED):
                    break
        except UnicodeDecodeError:
            raise InputError("stdin: not UTF-8 text") from None
        return "\n".join(lines) if lines else None

    def welcome(self, lines: list[str]) -> None:
        """Nothing: nobody is there."""

    def tell(self, line: str) -> None:
        """A remark, on stderr."""
        print(safe(line, sys.stderr), file=sys.stderr)

    def begin(self) -> None:
        """An answer begins."""
        self._given = False

    def show(self, event: Event | Forgotten) -> None:
        """The answer's text as it comes."""
        if isinstance(event, Text) and event.part == "answer":
            sys.stdout.write(safe(event.text, sys.stdout))
            sys.stdout.flush()
            self._given = True
        elif isinstance(event, Restart) and event.part == "answer" and self._given:
            sys.stdout.write("\n")
        elif isinstance(event, ToolCall):
            self.tell(f"call {event.name}({event.arguments})")
        elif isinstance(event, Forgotten):
            self.tell(f"the oldest {event.messages} messages no longer fit and are forgotten")

    def end(self, answer: Answer) -> None:
        """The answer is over."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._given = False
        for block in answer.reply.broken:
            self.tell(f"a tool call that cannot be read: {block}")
        if answer.reply.truncated and not answer.stopped:
            self.tell("the thinking did not end; try --think fast or --thinking-budget")

    def abandon(self) -> None:
        """The answer broke off."""
        if self._given:
            sys.stdout.write("\n")

    def farewell(self) -> None:
        """Nothing."""


class Screen:
    """A terminal: thinking is dimmed, and folded into one line when it is done."""

    def __init__(self, history: Path | None) -> None:
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._session = _session(history)
        self._live: Live | None = None
        self._thinking = ""
        self._said = False
        self._since = 0.0
        self._spinner = Spinner("dots", style="dim")
        self._given = False

    def read(self) -> str | None:
        """What the user typed; None when they leave."""
        try:
            return self._session.prompt([("class:mark", "› ")])
        except EOFError:
            return None

    def welcome(self, lines: list[str]) -> None:
        """The first lines."""
        self._console.print(printable(lines[0]), style="bold", markup=False)
        for line in lines[1:]:
            self.tell(line)
        self._console.print()

    def tell(self, line: str) -> None:
        """A remark."""
        self._console.print(printable(line), style="dim", markup=False)

    def begin(self) -> None:
        """An answer begins: a spinner until there is something to read."""
        self._thinking, self._given, self._said = "", False, False
        self._spinner = Spinner("dots", style="dim")
        self._live = Live(
            self._waiting(), console=self._console, transient=True, refresh_per_second=12
        )
        self._live.start()

    def show(self, event: Event | Forgotten) -> None:
        """More of the answer."""
        if isinstance(event, Text) and event.part == "thinking":
            if not self._thinking:
                self._since = time.perf_counter()
            self._thinking += printable(event.text)
            if self._live:
                self._live.update(self._waiting())
        elif isinstance(event, Text):
            self._stop_waiting()
            self._console.print(printable(event.text), end="", markup=False)
            self._given = self._said = True
        elif isinstance(event, ToolCall):
            self._stop_waiting()
            self._newline()
            self._said = True
            self.tell(f"call {event.name}({event.arguments})")
        elif isinstance(event, Forgotten):
            self._stop_waiting()
            self.tell(f"(the oldest {event.messages} messages no longer fit and are forgotten)")
            self.begin()
        elif event.part == "thinking":
            self._thinking = ""
        elif self._given:
            self._newline()
            self.tell("(that was not the answer yet)")

    def end(self, answer: Answer) -> None:
        """The answer is over: what it took."""
        self._stop_waiting()
        self._newline()
        reply = answer.reply
        if answer.stopped:
            self.tell("(stopped)")
        elif reply.truncated:
            self.tell("(the thinking did not end; try /think fast or --thinking-budget)")
        elif answer.finish_reason == "length":
            self.tell("(cut off: --max-new-tokens, or no room for more)")
        elif not self._said and not reply.broken:
            self.tell("(an empty answer)")
        for block in reply.broken:
            self.tell(f"(a tool call that cannot be read: {block})")
        rate = f", {answer.rate:.1f} tokens/s" if answer.tokens > 1 else ""
        self.tell(f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}{rate}")
        self._console.print()

    def abandon(self) -> None:
        """The answer broke off."""
        self._stop_waiting()
        self._newline()

    def farewell(self) -> None:
        """The last line."""
        self.tell("bye")

    def _waiting(self) -> Table:
        """A spinner, and the last lines of the thinking."""
        grid = Table.grid(padding=(0, 1))
        if not self._thinking:
            grid.add_row(self._spinner, "")
            return grid
        width = max(self._console.width - 4, 10)
        tail = Styled(self._thinking[-SPINNER_LINES * width :], style="dim")
        lines = tail.wrap(self._console, width)[-SPINNER_LINES:]
        grid.add_row(self._spinner, Styled("thinking", style="dim italic"))
        for line in lines:
            grid.add_row("", line)
        return grid

    def _stop_waiting(self) -> None:
        """Folds the thinking away, once."""
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._thinking:
            seconds = time.perf_counter() - self._since
            self.tell(f"▸ thought for {seconds:.1f} s; /thought shows it")

    def _newline(self) -> None:
        if self._given:
            self._console.print()
            self._given = False


def _session(history: Path | None):
    """A line editor: Enter sends, Alt-Enter or a backslash at the end makes a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("enter")
    def _(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(CONTINUED):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError)

    return PromptSession(
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        multiline=True,
        key_bindings=keys,
        prompt_continuation="  ",
        style=Style.from_dict({"mark": "bold ansigreen"}),
    )
