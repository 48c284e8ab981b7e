"""What a model wrote, taken apart as it comes: thinking, answer, tool calls.

The output of the published models is `[unused16]{thinking}[unused17]{answer}[unused10]`, with tool
calls `[unused11][{"name": ..., "arguments": {...}}][unused12]` after the answer's text. The parser
works on text, special tokens spelt out, and gives the same message however the text is cut.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from pangu_jax.text.markers import PUBLISHED, Markers, Think


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
    truncated: the thinking never ended, so there is no answer; while text still comes, that it goes
        on
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
    begins anew takes the tool calls and broken blocks before it back, too.
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
        self._payload: list[str] = []
        # All that came since the last start marker, as long as an end marker may make it a thought.
        self._before: list[str] | None = []
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
        if is_marker and text == m.think_start:
            if self._before is not None:
                self._before = []
        elif self._before is not None and not (is_marker and text == m.think_end):
            self._before.append(text)
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
            if self._state == "tool" and "".join(self._payload).strip():
                yield from self._close_tool()
            self._state, self._payload = "tool", []
        elif text == m.tool_end and self._state in ("tool", "between"):
            if self._state == "tool":
                yield from self._close_tool()
        else:
            yield from self._text(text)

    def _opens_tool(self) -> bool:
        """A call may follow the answer or stand alone; within the thinking it is only a thought."""
        if self._state == "open" and self._unmarked == "thinking":
            return not self._parts["thinking"]
        return self._state != "thinking"

    def _text(self, text: str) -> Iterator[Event]:
        if self._state == "tool":
            self._payload.append(text)
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
        if self._before is not None:
            if not self.thinking:
                # It was thinking all along; only its start marker is missing.
                yield from self._restart("answer")
                if more := self._parts["thinking"].add("".join(self._before)):
                    yield Text("thinking", more)
            self._before = None
        else:
            # The answer begins anew, unless nothing comes: then the marker was just said twice.
            if self._state == "tool":
                yield from self._close_tool()
            self._second = _Stripped()
        self._state = "answer"

    def _restart(self, part: Literal["thinking", "answer"]) -> Iterator[Event]:
        if self._parts[part] or (part == "answer" and (self._calls or self._broken)):
            yield Restart(part)
        self._parts[part] = _Stripped()
        if part == "answer":
            self._calls, self._broken, self._second = [], [], None

    def _close_tool(self) -> Iterator[Event]:
        self._state = "between"
        payload = "".join(self._payload)
        calls = read_calls(payload)
        if calls is None:
            self._broken.append(payload)
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
    value = _read_json(payload)
    if value is None:
        old = _old_call(payload)
        return [old] if old else None
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = _call(item)
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _call(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _read_json(arguments)
    return ToolCall(item["name"], arguments) if isinstance(arguments, dict) else None


def _old_call(payload: str) -> ToolCall | None:
    name, _, arguments = payload.partition("|")
    value = _read_json(arguments)
    if not re.fullmatch(r"[\w.-]+", name.strip()) or not isinstance(value, dict):
        return None
    return ToolCall(name.strip(), value)


def _read_json(text: str) -> Any:
    """The value of JSON text that can be written as JSON again; None for any other text."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value


class _Stripped:
    """Text without white space around, as it comes."""

    def __init__(self) -> None:
        self._committed: list[str] = []
        self._held: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._committed)

    def __bool__(self) -> bool:
        return bool(self._committed)

    def add(self, more: str) -> str:
        """What is certain to belong to the stripped text now."""
        if not self._committed:
            more = more.lstrip()
        certain = more.rstrip()
        if certain:
            self._held.append(certain)
            certain, self._held = "".join(self._held), []
            self._committed.append(certain)
        if space := more[len(more.rstrip()) :]:
            self._held.append(space)
        return certain


class _Scanner:
    """Cuts a stream of text into markers, none of which begins another, and what is between."""

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
