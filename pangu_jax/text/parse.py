"""What a model wrote, taken apart as it comes: thinking, answer, tool calls.

The output of the published models is `[unused16]{thinking}[unused17]{answer}[unused10]`, with tool
calls `[unused11][{"name": ..., "arguments": {...}}][unused12]` after the answer's text. The parser
works on text, special tokens spelt out, and gives the same message however the text is cut.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from pangu_jax.text.chat import Think
from pangu_jax.text.markers import PUBLISHED, Markers


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function the model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole output, taken apart.

    thinking: what stands after the last start marker and before the first end marker of thinking
    answer: what stands after the last end marker of thinking that anything follows, up to the
        first tool call or the end of the turn; both without white space around
    tool_calls: every call of every block
    broken: tool blocks that are not calls, as they were written
    truncated: the thinking never ended, so there is no answer
    """

    thinking: str = ""
    answer: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    broken: tuple[str, ...] = ()
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """More of a part."""

    part: Literal["thinking", "answer"]
    text: str


@dataclasses.dataclass(frozen=True)
class Restart:
    """What was given of a part so far was not it: a marker came twice, or late. An answer that
    begins anew takes the tool calls before it back, too.
    """

    part: Literal["thinking", "answer"]


Event = Text | Restart | ToolCall


def parse(text: str, think: Think | None = None, markers: Markers = PUBLISHED) -> Reply:
    """A whole output, taken apart; arguments as for `Parser`."""
    parser = Parser(think, markers)
    parser.push(text)
    parser.finish()
    return parser.reply


class Parser:
    """The streaming form of `parse`: push text, get events; `reply` is what is known so far.

    think: the mode that was asked for. It decides what text without any marker is: thinking that
        was cut off when "slow", else the answer.
    """

    def __init__(self, think: Think | None = None, markers: Markers = PUBLISHED) -> None:
        self._markers = markers
        self._scanner = _Scanner(
            [
                markers.think_start,
                markers.think_end,
                markers.tool_start,
                markers.tool_end,
                markers.turn_end,
            ]
        )
        self._unmarked: Literal["thinking", "answer"] = "thinking" if think == "slow" else "answer"
        self._parts = {"thinking": _Stripped(), "answer": _Stripped()}
        self._state: Literal["open", "thinking", "answer", "tool", "between", "done"] = "open"
        self._cut = False
        self._payload = ""
        self._second: _Stripped | None = None  # an answer after one more end marker
        self._calls: list[ToolCall] = []
        self._broken: list[str] = []

    @property
    def reply(self) -> Reply:
        """The reply as far as it has come."""
        return Reply(
            self._parts["thinking"].text,
            self._parts["answer"].text,
            tuple(self._calls),
            tuple(self._broken),
            self.thinking,
        )

    @property
    def thinking(self) -> bool:
        """Whether the text that comes now belongs to the thinking, or the end cut it off."""
        if self._state == "done":
            return self._cut
        unmarked = self._state == "open" and self._unmarked == "thinking"
        return unmarked or self._state == "thinking"

    def push(self, text: str) -> list[Event]:
        """The events of more text."""
        return [event for item in self._scanner.push(text) for event in self._item(*item)]

    def finish(self) -> list[Event]:
        """The events of the end: held-back text, and a tool call that was never closed."""
        return [
            *(event for item in self._scanner.finish() for event in self._item(*item)),
            *self._end_turn(),
        ]

    def _item(self, text: str, is_marker: bool) -> Iterator[Event]:
        m = self._markers
        if self._state == "done":
            return
        if not is_marker:
            yield from self._text(text)
        elif text == m.turn_end:
            yield from self._end_turn()
        elif text == m.think_start and self._state in ("open", "thinking"):
            yield from self._restart(self._unmarked if self._state == "open" else "thinking")
            self._state = "thinking"
        elif text == m.think_end:
            yield from self._end_thinking()
        elif text == m.tool_start and self._opens_tool():
            if self._second is not None:
                yield from self._restart("answer")
            self._state, self._payload = "tool", ""
        elif text == m.tool_end and self._state in ("tool", "between"):
            if self._state == "tool":
                yield from self._close_tool()
        else:
            yield from self._text(text)

    def _opens_tool(self) -> bool:
        """A call may follow the answer or stand alone; within the thinking it is only a thought."""
        if self._state == "open" and self._unmarked == "thinking":
            return not self._parts["thinking"].text
        return self._state != "thinking"

    def _text(self, text: str) -> Iterator[Event]:
        if self._state == "tool":
            self._payload += text
        elif self._second is not None:
            if more := self._second.add(text):
                second = self._second
                yield from self._restart("answer")
                self._parts["answer"] = second
                yield Text("answer", more)
        elif self._state != "between":
            part = self._unmarked if self._state == "open" else self._state
            assert part in ("thinking", "answer")
            if more := self._parts[part].add(text):
                yield Text(part, more)

    def _end_thinking(self) -> Iterator[Event]:
        if self._state == "open" and self._unmarked == "answer":
            # It was thinking all along; only its start marker is missing.
            thought = self._parts["answer"].text
            yield from self._restart("answer")
            if more := self._parts["thinking"].add(thought):
                yield Text("thinking", more)
        elif self._state not in ("open", "thinking"):
            # The answer begins anew, unless nothing comes: then the marker was just said twice.
            if self._state == "tool":
                yield from self._close_tool()
            self._second = _Stripped()
        self._state = "answer"

    def _restart(self, part: Literal["thinking", "answer"]) -> Iterator[Event]:
        if self._parts[part].text or (part == "answer" and (self._calls or self._broken)):
            yield Restart(part)
        self._parts[part] = _Stripped()
        if part == "answer":
            self._calls, self._broken, self._second = [], [], None

    def _close_tool(self) -> Iterator[Event]:
        self._state = "between"
        calls = read_calls(self._payload)
        if calls is None:
            self._broken.append(self._payload)
        else:
            self._calls += calls
            yield from calls

    def _end_turn(self) -> Iterator[Event]:
        if self._state == "tool":
            yield from self._close_tool()
        self._cut, self._state = self.thinking, "done"


def read_calls(payload: str) -> list[ToolCall] | None:
    """The calls of a tool block; None if it is broken.

    A block is a JSON list of {"name", "arguments"} (or "parameters"), or one such object, or, in
    old releases, `name|{json}`.
    """
    try:
        value = json.loads(payload, parse_constant=_refuse)
        items = value if isinstance(value, list) else [value]
        calls = [_call(item) for item in items]
    except (ValueError, RecursionError):
        calls = [_old_call(payload)]
    return [call for call in calls if call] if calls and all(calls) else None


def _call(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    return ToolCall(item["name"], arguments) if isinstance(arguments, dict) else None


def _old_call(payload: str) -> ToolCall | None:
    name, bar, arguments = payload.partition("|")
    try:
        value = json.loads(arguments, parse_constant=_refuse) if bar else None
    except (ValueError, RecursionError):
        return None
    return ToolCall(name.strip(), value) if name.strip() and isinstance(value, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class _Stripped:
    """Text without white space around, as it comes."""

    def __init__(self) -> None:
        self._committed: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        return "".join(self._committed)

    def add(self, more: str) -> str:
        """What is certain to belong to the stripped text now."""
        whole = self._held + more
        if not self._committed:
            whole = whole.lstrip()
        certain = whole.rstrip()
        self._held = whole[len(certain) :]
        if certain:
            self._committed.append(certain)
        return certain


class _Scanner:
    """Cuts a stream of text into markers and what is between them."""

    def __init__(self, markers: list[str]) -> None:
        self._markers = markers
        self._pattern = re.compile("|".join(map(re.escape, markers)))
        self._buffer = ""

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces of text and markers (True), all but an ending that may become a marker."""
        self._buffer += text
        at = 0
        for match in self._pattern.finditer(self._buffer):
            if match.start() > at:
                yield self._buffer[at : match.start()], False
            yield match[0], True
            at = match.end()
        rest = self._buffer[at:]
        held = self._held(rest)
        self._buffer = rest[len(rest) - held :]
        if len(rest) > held:
            yield rest[: len(rest) - held], False

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What was held back."""
        rest, self._buffer = self._buffer, ""
        if rest:
            yield rest, False

    def _held(self, rest: str) -> int:
        """Length of the longest end of `rest` with which a marker begins."""
        longest = max(map(len, self._markers)) - 1
        for size in range(min(longest, len(rest)), 0, -1):
            if any(marker.startswith(rest[-size:]) for marker in self._markers):
                return size
        return 0
