"""Outputs taken apart: an independent reference, every way of cutting, and golden examples."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_jax.text import chat, parse
from pangu_jax.text.markers import PUBLISHED, Markers
from pangu_jax.text.parse import Event, Parser, Reply, Restart, Text, ToolCall
from tests.limits import no_longer_than

NAMED = Markers(
    think_start="<think>",
    think_end="</think>",
    tool_start="<|tool_call_start|>",
    tool_end="<|tool_call_end|>",
)
MODES = ("fast", "slow", "auto", None)
MARKERS = [PUBLISHED, NAMED]


# --- the reference --------------------------------------------------------------------------------


def reference(text: str, think: str | None, m: Markers) -> Reply:
    """The parse of a whole text, with split and partition alone.

    As published: thinking before the first end marker, after the last start marker in it; the
    answer after the last end marker, up to the end of the turn. Own choices: an end marker that
    nothing follows is ignored; without an end marker there is only thinking where it was begun or
    asked for, else only an answer; a tool call may stand alone.
    """
    text = text.split(m.turn_end)[0]
    thought, *rest = text.split(m.think_end)
    if rest:
        said = [piece for piece in rest if piece.strip()]
        thinking = thought.split(m.think_start)[-1].strip()
        return answered(thinking, said[-1] if said else "", m)
    before, tool, _ = text.partition(m.tool_start)
    thinks = m.think_start in before or (think == "slow" and before.strip())
    if tool and not thinks:
        return answered("", text, m)
    if m.think_start in text or think == "slow":
        return Reply(text.split(m.think_start)[-1].strip(), truncated=True)
    return answered("", text, m)


def answered(thinking: str, answer: str, m: Markers) -> Reply:
    """A reply whose answer is taken apart into content and tool blocks.

    A start marker within a block ends the block; if there is nothing in it, it was just said twice.
    """
    content, *blocks = answer.split(m.tool_start)
    calls: list[ToolCall] = []
    broken: list[str] = []
    for last, block in enumerate(blocks, 1 - len(blocks)):
        payload, end, _ = block.partition(m.tool_end)
        if not end and last < 0 and not payload.strip():
            continue
        found = block_calls(payload)
        calls += found
        broken += [] if found else [payload]
    return Reply(thinking, content.strip(), tuple(calls), tuple(broken))


def block_calls(payload: str) -> list[ToolCall]:
    """The calls of a block, none if it is not one."""
    name, bar, old = payload.partition("|")
    value, arguments = loaded(payload), loaded(old)
    named = all(c.isalnum() or c in "_.-" for c in name.strip()) and name.strip()
    if value is None and bar and named and isinstance(arguments, dict):
        return [ToolCall(name.strip(), arguments)]
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = loaded(arguments)
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(item["name"], arguments))
    return calls


def loaded(text: str) -> Any:
    """The JSON value of a text, None if it is not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


# --- streaming ------------------------------------------------------------------------------------


def fold(parts: tuple[str, str, list[ToolCall]], events: Iterable[Event]) -> tuple[Any, Any, Any]:
    """What a reader of the events has: thinking, answer, tool calls."""
    thinking, answer, calls = parts
    for event in events:
        if isinstance(event, ToolCall):
            calls = [*calls, event]
        elif isinstance(event, Restart):
            thinking = "" if event.part == "thinking" else thinking
            answer, calls = ("", []) if event.part == "answer" else (answer, calls)
        elif event.part == "thinking":
            thinking += event.text
        else:
            answer += event.text
    return thinking, answer, calls


def streamed(pieces: Iterable[str], think: Any = None, markers: Markers = PUBLISHED) -> Reply:
    """The reply to pieces; its events must tell the same, at every step."""
    parser = Parser(think, markers)
    had: tuple[Any, Any, Any] = ("", "", [])

    def check(events: list[Event]) -> None:
        nonlocal had
        now = fold(had, events)
        reply = parser.reply
        assert now == (reply.thinking, reply.answer, [*reply.tool_calls])
        assert all(event.text for event in events if isinstance(event, Text))
        again = {event.part for event in events if isinstance(event, Restart)}
        assert now[0].startswith(had[0]) or "thinking" in again
        assert now[1].startswith(had[1]) or "answer" in again
        assert now[2][: len(had[2])] == had[2] or "answer" in again
        had = now

    for piece in pieces:
        check(parser.push(piece))
    check(parser.finish())
    assert parser.finish() == []
    assert parser.push("more") == []
    return parser.reply


def cut(text: str, sizes: Iterable[int]) -> Iterator[str]:
    """The text in pieces of these sizes, and the rest."""
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size
    yield text[at:]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["f", "天气", 'a"b', "[{", ""]) | st.text(max_size=4)
CALLS = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "arguments": st.dictionaries(st.text(max_size=4), JSON, max_size=3) | JSON,
        "parameters": st.dictionaries(st.text(max_size=4), JSON, max_size=3),
        "x": JSON,
    },
)
AS_STRING = CALLS.map(lambda call: {**call, "arguments": json.dumps(call.get("arguments"))})
PAYLOADS = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    st.lists(CALLS | AS_STRING, max_size=3) | CALLS | JSON,
    st.booleans(),
    st.sampled_from([None, 1]),
) | st.builds(
    lambda name, arguments: f"{name}|{json.dumps(arguments)}",
    NAMES,
    st.dictionaries(st.text(max_size=3), JSON, max_size=2),
)


def texts(m: Markers) -> st.SearchStrategy[str]:
    """Outputs made of markers, parts of markers, words, white space and JSON, whole and broken."""
    marks = [m.think_start, m.think_end, m.tool_start, m.tool_end, m.turn_end]
    parts = [mark[:size] for mark in marks for size in (1, 4, -2, -1)] + [
        mark[3:] for mark in marks
    ]
    words = [
        "a",
        "答案",
        " ",
        "\n",
        "  \n",
        "\u3000",
        "\x1f",
        "，",
        "6]",
        "|",
        '[{"name": "f"}]',
        "[{",
    ]
    words += ['{"name":', "{}", '"', "NaN", "\\", "é😀", "[unused9]", m.turn_start]
    block = PAYLOADS.map(lambda payload: f"{m.tool_start}{payload}{m.tool_end}")
    normal = st.tuples(st.sampled_from(words), st.sampled_from(words), block | st.just("")).map(
        lambda three: f"{m.think_start}{three[0]}{m.think_end}{three[1]}{three[2]}{m.turn_end}"
    )
    piece = st.one_of(
        st.sampled_from(marks),
        st.sampled_from(marks[:4]),
        st.sampled_from(parts),
        st.sampled_from(words),
        PAYLOADS,
        PAYLOADS.flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end])),
        block,
        normal,
        st.text(max_size=3),
    )
    return st.lists(piece, max_size=10).map("".join)


@pytest.mark.parametrize("markers", MARKERS, ids=["published", "named"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_parse_is_that_of_the_reference_however_it_is_cut(
    markers: Markers, data: st.DataObject
) -> None:
    text = data.draw(texts(markers))
    sizes = data.draw(st.lists(st.integers(0, 12), max_size=20))
    think: Any = data.draw(st.sampled_from(MODES))
    whole = reference(text, think, markers)
    assert parse.parse(text, think, markers) == whole
    assert streamed(cut(text, sizes), think, markers) == whole
    assert streamed(text, think, markers) == whole


@pytest.mark.parametrize("think", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_markers_in_any_order(count: int, think: Any) -> None:
    """Every short sequence of markers, with something, nothing and white space between."""
    marks = ["[unused16]", "[unused17]", "[unused11]", "[unused12]"]
    for chosen in itertools.product(marks, repeat=count):
        for words in ("abcde", [""] * 5, ["", " ", "x", " ", ""], [" a ", "", "\n", "b", " "]):
            text = words[0] + "".join(map("".join, zip(chosen, words[1:], strict=False)))
            assert streamed([text], think) == reference(text, think, PUBLISHED), text


# --- golden examples ------------------------------------------------------------------------------

S, E, CALL, DONE, END = "[unused16]", "[unused17]", "[unused11]", "[unused12]", "[unused10]"
F = ToolCall("f", {"x": 1})
F_JSON = '{"name":"f","arguments":{"x":1}}'
F_BLOCK = f"{CALL}[{F_JSON}]{DONE}"


@dataclasses.dataclass
class Golden:
    """An output, its parse in slow mode, and in the other modes if it differs there."""

    text: str
    slow: Reply
    fast: Reply | None = None


GOLDEN = {
    "nothing": Golden("", Reply(truncated=True), Reply()),
    "slow": Golden(f"{S} t\n{E}\n\na {END}", Reply("t", "a")),
    "fast": Golden(f"{S}{E}你好{END}", Reply("", "你好")),
    "no answer": Golden(f"{S}t{E}{END}", Reply("t")),
    "missing start": Golden(f"t t{E}a{END}", Reply("t t", "a")),
    "missing end": Golden(f"{S}t \n{END}", Reply("t", truncated=True)),
    "missing end, text before": Golden(f"b{S}t", Reply("t", truncated=True)),
    "no markers": Golden(" a\nb ", Reply("a\nb", truncated=True), Reply("", "a\nb")),
    "no markers but the turn's": Golden(f"a{END}", Reply("a", truncated=True), Reply("", "a")),
    "double start": Golden(f"{S}t{S}u{E}a{END}", Reply("u", "a")),
    "adjacent starts": Golden(f"{S}{S}u{E}a{END}", Reply("u", "a")),
    "start in the answer": Golden(f"{S}t{E}a{S}b{END}", Reply("t", f"a{S}b")),
    "adjacent ends": Golden(f"{S}t{E}{E}a{END}", Reply("t", "a")),
    "double end": Golden(f"{S}t{E}a{E}b{END}", Reply("t", "b")),
    "two thoughts": Golden(f"{S}t{E}a{S}u{E}b{END}", Reply("t", "b")),
    "double end and nothing": Golden(f"{S}t{E}a{E} {END}", Reply("t", "a")),
    "three ends, then nothing": Golden(f"{S}t{E}a{E}\n{E}", Reply("t", "a")),
    "end of turn in thinking": Golden(f"{S}t{END}{E}a", Reply("t", truncated=True)),
    "after the end of turn": Golden(f"{S}t{E}a{END}b{E}c{F_BLOCK}", Reply("t", "a")),
    "parts of markers": Golden("[unused1[unused16]t[unused17]6][un", Reply("t", "6][un")),
    "call alone": Golden(F_BLOCK + END, Reply(tool_calls=(F,))),
    "call after the thinking": Golden(f"{S}t{E}{F_BLOCK}", Reply("t", "", (F,))),
    "call after the answer": Golden(f"{S}t{E}a\n{F_BLOCK}{END}", Reply("t", "a", (F,))),
    "call after an answer alone": Golden(
        f"a{F_BLOCK}", Reply(f"a{F_BLOCK}", truncated=True), Reply("", "a", (F,))
    ),
    "call within the thinking": Golden(f"{S}t{F_BLOCK}u{E}a", Reply(f"t{F_BLOCK}u", "a")),
    "call that was thinking": Golden(f"{F_BLOCK}{E}a", Reply(F_BLOCK, "a")),
    "call before the thinking": Golden(f"{F_BLOCK}{S}t{E}a", Reply("t", "a")),
    "call, then an answer anew": Golden(f"{E}a{F_BLOCK}{E}b", Reply("", "b")),
    "call, then an end marker": Golden(f"{E}a{F_BLOCK}{E}{END}", Reply("", "a", (F,))),
    "text after a call": Golden(f"{E}a{F_BLOCK}b{END}", Reply("", "a", (F,))),
    "two blocks": Golden(f"{E}a{F_BLOCK}b{F_BLOCK}", Reply("", "a", (F, F))),
    "two calls": Golden(f"{CALL}[{F_JSON},{F_JSON}]{DONE}", Reply(tool_calls=(F, F))),
    "call outside a list": Golden(f"{CALL} {F_JSON}\n{DONE}", Reply(tool_calls=(F,))),
    "parameters": Golden(
        f'{CALL}[{{"name":"f","parameters":{{"x":1}}}}]{DONE}', Reply(tool_calls=(F,))
    ),
    "no arguments": Golden(f'{CALL}[{{"name":"f"}}]{DONE}', Reply(tool_calls=(ToolCall("f", {}),))),
    "string arguments": Golden(
        f'{CALL}[{{"name":"f","arguments":"{{\\"x\\":1}}"}}]{DONE}', Reply(tool_calls=(F,))
    ),
    "old call": Golden(f'{CALL}f|{{"x":1}}{DONE}', Reply(tool_calls=(F,))),
    "nested JSON": Golden(
        f'{CALL}[{{"name":"查","arguments":{{"x]":[{{"é":"\\"}}]\\u00e9😀"}}]}}}}]{DONE}',
        Reply(tool_calls=(ToolCall("查", {"x]": [{"é": '"}]é😀'}]}),)),
    ),
    "unclosed call": Golden(f"{E}a{CALL}[{F_JSON}]", Reply("", "a", (F,))),
    "unclosed call, end of turn": Golden(f"{E}{CALL}[{F_JSON}]{END}", Reply("", "", (F,))),
    "unclosed broken call": Golden(f"{E}a{CALL}[{F_JSON}", Reply("", "a", (), (f"[{F_JSON}",))),
    "call begun anew": Golden(f"{E}{CALL}[{{{F_BLOCK}", Reply("", "", (F,), ("[{",))),
    "broken call": Golden(f"{E}{CALL}[{{]{DONE}", Reply("", "", (), ("[{]",))),
    "broken and good": Golden(f"{E}{CALL} x{DONE}{F_BLOCK}", Reply("", "", (F,), (" x",))),
    "empty block": Golden(f"{E}{CALL}{DONE}", Reply("", "", (), ("",))),
    "empty list": Golden(f"{E}{CALL}[]{DONE}", Reply("", "", (), ("[]",))),
    "one bad call of two": Golden(f"{CALL}[{F_JSON},1]{DONE}", Reply(broken=(f"[{F_JSON},1]",))),
    "stray closing marker": Golden(f"{E}a{DONE}b", Reply("", f"a{DONE}b")),
}


@pytest.mark.parametrize("think", MODES)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(name: str, think: Any) -> None:
    golden = GOLDEN[name]
    reply = golden.slow if think == "slow" else golden.fast or golden.slow
    assert parse.parse(golden.text, think) == reply
    assert streamed(golden.text, think) == reply
    assert reference(golden.text, think, PUBLISHED) == reply


# As short as they can be and still share their beginnings: there are many ways to cut in three.
SHORT = Markers("[9]", "[10]", "[16]", "[17]", "[11]", "[12]")


@pytest.mark.parametrize(
    ("name", "think"),
    [(name, "slow") for name in GOLDEN] + [(name, "fast") for name in GOLDEN if GOLDEN[name].fast],
)
def test_golden_outputs_in_three_pieces(name: str, think: Any) -> None:
    text = GOLDEN[name].text.replace("unused", "").replace('"arguments":{"x":1}', '"parameters":{}')
    whole = parse.parse(text, think, SHORT)
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        parser = Parser(think, SHORT)
        pieces = (text[:first], text[first:second], text[second:])
        events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
        assert parser.reply == whole
        assert fold(("", "", []), events) == (whole.thinking, whole.answer, [*whole.tool_calls])


BAD_PAYLOADS = [
    *("null", "5", '"f"', "{}", "[{}]", "[null]", '[["f"]]', '{"name": 5}', '{"name": null}'),
    *('{"name": "f", "arguments": null}', '{"name": "f", "arguments": []}', "f", "|{}", " |{}"),
    *('{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": "[]"}', "f|", "f|x", "f|[]"),
    *('{"name": "f", "arguments": {"x": NaN}}', 'f|{"x": Infinity}', "[{'name': 'f'}]"),
    *('{"name": "f", "arguments": "{\\"x\\": -Infinity}"}', '[{"name": "f"}', "\x00", "\ud800"),
    *('{"name": "f"} {"name": "g"}', f'{{"name": "f", "arguments": {{"x": {"1" * 5000}}}}}'),
]


@pytest.mark.parametrize("payload", BAD_PAYLOADS, ids=lambda text: ascii(text)[:40])
def test_broken_blocks_are_kept_as_they_were_written(payload: str) -> None:
    reply = Reply("", "a", (), (payload,))
    assert parse.parse(f"{E}a{CALL}{payload}{DONE}") == reply
    assert parse.parse(f"{E}a{CALL}{payload}") == reply
    assert parse.read_calls(payload) is None


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_broken(number: str) -> None:
    """They could not be written as JSON again."""
    assert parse.read_calls(f'{{"name": "f", "arguments": {{"x": {number}}}}}') is None


DEEP = 100_000
NESTED = [
    "[" * DEEP,
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP,
    f'[{{"name":"f","arguments":{"[" * DEEP}{"]" * DEEP}}}]',
    f'[{{"name":"f","arguments":{{"x":{"[" * DEEP}{"]" * DEEP}}}}}]',
    f'[{{"name":"f","arguments":"{"[" * DEEP}"}}]',
    f'f|{{"x":{"[" * DEEP}{"]" * DEEP}}}',
]


@pytest.mark.parametrize("payload", NESTED, ids=lambda text: text[:30])
def test_nesting_too_deep_is_broken(payload: str) -> None:
    assert parse.parse(f"a{CALL}{payload}{DONE}") == Reply("", "a", (), (payload,))


def test_moderate_nesting_is_a_call() -> None:
    value: Any = {}
    for _ in range(100):
        value = {"a": [value]}
    payload = json.dumps([{"name": "f", "arguments": value}])
    assert streamed(f"{CALL}{payload}{DONE}").tool_calls == (ToolCall("f", value),)


# --- what a reader of a stream relies on ----------------------------------------------------------


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = Parser("slow")
    assert parser.push(S) == []
    assert parser.push(" t") == [Text("thinking", "t")]
    assert parser.push(" ") == []
    assert parser.push("u[") == [Text("thinking", " u")]
    assert parser.push("x") == [Text("thinking", "[x")]
    assert parser.push("[unused1") == []
    assert parser.push("7]a") == [Text("answer", "a")]
    assert parser.push(CALL + "[" + F_JSON) == []
    assert parser.push("]" + DONE) == [F]
    assert parser.push(E) == []
    assert parser.push(" ") == []
    assert parser.push("b[unused") == [Restart("answer"), Text("answer", "b")]
    assert parser.finish() == [Text("answer", "[unused")]
    assert parser.reply == Reply("t u[x", "b[unused")


def test_a_missing_start_marker_takes_the_answer_back() -> None:
    parser = Parser()
    assert parser.push("t") == [Text("answer", "t")]
    assert parser.push(E) == [Restart("answer"), Text("thinking", "t")]
    parser = Parser("slow")
    assert parser.push("t") == [Text("thinking", "t")]
    assert parser.push(S) == [Restart("thinking")]


def test_it_is_known_whether_the_model_thinks() -> None:
    for think in MODES:
        parser = Parser(think)
        assert parser.thinking == (think == "slow")
        states = []
        for piece in (S, "t", E, "a", CALL, "[]", DONE, END, S):
            parser.push(piece)
            states.append(parser.thinking)
        assert states == [True, True] + [False] * 7
    cut_off = Parser()
    cut_off.push(f"{S}t{END}a")
    assert cut_off.thinking
    assert cut_off.reply == Reply("t", truncated=True)


WORDS = st.sampled_from(["a", "，", "[unused1", "{", "\n", " "]) | st.text(max_size=3)
OBJECTS = st.dictionaries(st.text(max_size=3), JSON, max_size=3)


@given(
    WORDS.map(str.strip),
    WORDS.map(str.strip),
    st.lists(st.builds(ToolCall, st.text(max_size=3), OBJECTS), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_what_the_template_writes_is_read_again(
    thinking: str, content: str, calls: list[ToolCall]
) -> None:
    message = {
        "role": "assistant",
        "content": content,
        "thinking": thinking,
        "tool_calls": [dataclasses.asdict(call) for call in calls],
    }
    text = chat.render([message], add_generation_prompt=False).partition("助手：")[2]
    reply = Reply(thinking, content, tuple(calls))
    assert streamed(text) == reply


# --- long outputs ---------------------------------------------------------------------------------


def _unchecked() -> Any:
    """The module as a user has it: the run-time type checks of the suite take most of the time."""
    spec = importlib.util.spec_from_file_location("unchecked_parse", parse.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


UNCHECKED = _unchecked()
MEGABYTE = 10**6
LONG = {
    "words": f"{S}{'想一想 [un ' * 50_000}{E}{'word [x] ' * 50_000}",
    "white space in the thinking": f"{S}a{' ' * MEGABYTE}b{E}c",
    "white space in the answer": f"{S}a{E}b{chr(10) * MEGABYTE}c",
    "arguments": f'{E}{CALL}[{{"name":"f","arguments":{{"x":"{"y" * MEGABYTE}"}}}}]{DONE}',
    "unclosed arguments": f"{E}{CALL}{'[unused ' * (MEGABYTE // 8)}",
    "starts": f"{S}t" * (MEGABYTE // 11),
    "ends": f"{E}a" * (MEGABYTE // 11),
    "ends of nothing": f"a{E}b" + f"{E} " * (MEGABYTE // 11),
    "calls in the thinking": f"a{CALL}" * (MEGABYTE // 11),
    "calls": f"{E}{CALL}[]{DONE}" + f"{CALL}[]{DONE}" * (MEGABYTE // 22),
    "closing markers": f"{E}{DONE}" * (MEGABYTE // 20),
}


SMALL_PIECES = ["words", "white space in the answer", "arguments", "calls in the thinking"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 4096) for name in LONG),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in SMALL_PIECES),
    ],
)
def test_long_outputs_are_quick(name: str, size: int) -> None:
    text = LONG[name]
    parser = UNCHECKED.Parser("slow")
    with no_longer_than(20):  # four times a slow machine's; anything quadratic takes minutes
        for at in range(0, len(text), size):
            parser.push(text[at : at + size])
        parser.finish()
    whole = reference(text, "slow", PUBLISHED)
    assert dataclasses.asdict(parser.reply) == dataclasses.asdict(whole)
