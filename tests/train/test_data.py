"""Examples from JSON lines: the published template, by hand; a bad line is one line."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer import files
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import Tokenizer
from train import data
from train.packing import Example

NANO = configs_folder() / "tokenizers" / "nano"
BOS, END = 1, 15
SPECIALS = ["<unk>", "<s>", "</s>", "<|User|>:", "<|Bot|>:", *(f"[unused{i}]" for i in range(34))]
IDS = {text: id for id, text in enumerate(SPECIALS)}

TITLES = {"system": "系统", "user": "用户", "assistant": "助手", "tool": "工具", "function": "方法"}
SWITCHES = {None: "", "slow": "", "fast": " /no_think", "auto": " /auto_think"}
TOOLS = (
    "你可以使用以下工具，每行一个。需要时以 JSON 列表调用："
    '[{"name": "工具名", "arguments": {"参数名": "值"}}]'
)

given_files = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TOKENIZER = Tokenizer.load(NANO)
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))


def ids_of(text: str) -> list[int]:
    """Token ids: SentencePiece's, each run between special tokens by itself."""
    found: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, SPECIALS))})", text):
        found += [IDS[part]] if part in IDS else PIECES.encode(part)
    return found


def spoken(message: dict[str, Any]) -> str:
    """What an assistant says, as the models write it."""
    text = message.get("content") or ""
    if message.get("thinking") is not None:
        text = f"[unused16]{message['thinking']}[unused17]{text}"
    calls = [{k: call[k] for k in ("name", "arguments")} for call in message.get("tool_calls", ())]
    if calls:
        text += f"[unused11]{json.dumps(calls, ensure_ascii=False)}[unused12]"
    return text


def prompt_of(
    messages: list[dict[str, Any]], think: str | None = None, tools: list[Any] | None = None
) -> str:
    """What generation sees after these messages: of earlier thoughts, that there were some."""
    # A thought that is over leaves its markers; an empty one (a fast answer) leaves nothing.
    left = lambda thought: "" if thought else None
    messages = [{**m, "thinking": left(m.get("thinking"))} for m in messages]
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] += SWITCHES[think]
            break
    # As in the published template, before nothing at all there is no system turn either.
    if (messages or tools) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": ""})
    if tools:
        lines = "\n".join([TOOLS, *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
        before = messages[0]["content"]
        messages[0]["content"] = f"{before}\n\n{lines}" if before else lines
    said = "".join(f"[unused9]{TITLES[m['role']]}：{spoken(m)}[unused10]" for m in messages)
    return f"{said}[unused9]助手："


def cut(prompt: str, said: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of what is said there, made of both together. Without any `<s>` but
    the first.
    """
    before, whole = (
        [BOS, *(i for i in ids_of(text) if i != BOS)] for text in (prompt, prompt + said)
    )
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    # A token across the border, which a prompt never ends with: as after any other character.
    other = ids_of("\x01")
    assert ids_of("\x01" + said)[: len(other)] == other
    return before, [i for i in ids_of("\x01" + said)[len(other) :] if i != BOS]


def turns(
    messages: list[dict[str, Any]], think: str | None = None, tools: list[Any] | None = None
) -> list[tuple[list[int], list[int]]]:
    """The prompt of every assistant's message, and what is said there."""
    return [
        cut(prompt_of(messages[:i], think, tools), f"{spoken(message)}[unused10]")
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def learnt(example: Example) -> Iterator[tuple[list[int], list[int]]]:
    """Every stretch that is learnt, after all that stands before it."""
    ids, learn = example.ids.tolist(), example.learn.tolist()
    start = None
    for place, is_learnt in enumerate([*learn, False]):
        if is_learnt and start is None:
            start = place
        elif not is_learnt and start is not None:
            yield ids[:start], ids[start:place]
            start = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def write(file: Path, *lines: Any) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def conversations(file: Path, *lines: Any, tokenizer: Tokenizer = TOKENIZER) -> list[Example]:
    write(file, *lines)
    return list(data.conversations(file, tokenizer))


def documents(file: Path, length: int, *lines: Any) -> list[Example]:
    write(file, *lines)
    return list(data.documents(file, TOKENIZER, length))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return message if thinking is None else {**message, "thinking": thinking}


# --- conversations

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=12)
special = st.sampled_from(
    ["[unused16]", "[unused10]", "<s>", "</s>", "<|Bot|>:", "[unused40]", "<0x41>", '"', " "]
)
said = st.lists(texts | special, max_size=3).map("".join)
prompts = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "tool", "function", "system"]), "content": said}
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": said},
    optional={
        "thinking": said,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"name": texts, "arguments": st.dictionaries(texts, texts | st.integers())}
            ),
            max_size=2,
        ),
    },
)
tools = st.none() | st.lists(
    st.fixed_dictionaries({"name": texts, "description": texts}), max_size=2
)


@given(
    messages=st.lists(prompts | answers, max_size=6),
    last=answers,
    think=st.sampled_from([None, "slow", "fast", "auto"]),
    tools=tools,
)
@given_files
def test_what_is_learnt_is_what_assistants_say_after_what_generation_sees(
    file: Path, messages: list[Any], last: Any, think: Any, tools: Any
) -> None:
    messages = [*messages, last]
    found = conversations(file, {"messages": messages, "think": think, "tools": tools})
    parts = [list(learnt(example)) for example in found]
    assert all(parts)
    expected = turns(messages, think, tools)
    assert [turn for part in parts for turn in part] == expected
    for example, part in zip(found, parts, strict=True):
        assert example.ids.dtype == np.int32
        assert example.learn.dtype == bool
        assert part[-1][0] + part[-1][1] == example.ids.tolist()
        assert example.ids.tolist().count(BOS) == 1
        assert example.ids[-1] == END
    # Another example begins only where the prompt does not go on from what is there.
    number = 0
    for example, part in zip(found, parts[:-1], strict=False):
        number += len(part)
        following = expected[number][0]
        assert following[: example.ids.size] != example.ids.tolist()


def written(example: Example) -> str:
    """The text of an example, what is learnt in braces."""
    text, done = "", 0
    for before, said in learnt(example):
        start, whole = len(TOKENIZER.decode(before)), TOKENIZER.decode(before + said)
        text += f"{whole[done:start]}{{{whole[start:]}}}"
        done = len(whole)
    return text


SYSTEM = "<s>[unused9]系统：[unused10]"


def test_a_problem_of_tasks(file: Path) -> None:
    line = {"messages": [user("What is 2 + 3?"), assistant("5", "2+3=5")], "think": "slow"}
    (slow,) = conversations(file, line)
    assert written(slow) == (
        f"{SYSTEM}[unused9]用户：What is 2 + 3?[unused10]"
        "[unused9]助手：{[unused16]2+3=5[unused17]5[unused10]}"
    )
    line = {"messages": [user("What is 2 + 3?"), assistant("5", "")], "think": "fast"}
    (fast,) = conversations(file, line)
    assert written(fast) == (
        f"{SYSTEM}[unused9]用户：What is 2 + 3? /no_think[unused10]"
        "[unused9]助手：{[unused16][unused17]5[unused10]}"
    )


@pytest.mark.parametrize("think", [None, "slow"])
def test_turns_without_thoughts_are_one_example(file: Path, think: Any) -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    (example,) = conversations(file, {"messages": messages, "think": think})
    assert written(example) == (
        f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手：{{Ho[unused10]}}"
        "[unused9]用户：And?[unused10][unused9]助手：{No.[unused10]}"
    )


def test_a_fast_answer_is_remembered_without_its_empty_thought(file: Path) -> None:
    """As `infer.conversation` remembers it."""
    messages = [user("Hi"), assistant("Ho", ""), user("And?"), assistant("No.", "")]
    first, second = conversations(file, {"messages": messages})
    hi = f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手："
    assert written(first) == f"{hi}{{[unused16][unused17]Ho[unused10]}}"
    assert written(second) == (
        f"{hi}Ho[unused10][unused9]用户：And?[unused10]"
        "[unused9]助手：{[unused16][unused17]No.[unused10]}"
    )


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_a_thought_is_learnt_and_then_forgotten(file: Path, key: str) -> None:
    """Every turn is an example of its own, as every prompt is another text."""
    answers = [{**assistant(text), key: thought} for text, thought in (("Ho", "hm"), ("No.", "so"))]
    messages = [user("Hi"), answers[0], user("And?"), answers[1]]
    first, second = conversations(file, {"messages": messages})
    hi = f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手："
    assert written(first) == f"{hi}{{[unused16]hm[unused17]Ho[unused10]}}"
    assert written(second) == (
        f"{hi}[unused16][unused17]Ho[unused10]"
        "[unused9]用户：And?[unused10][unused9]助手：{[unused16]so[unused17]No.[unused10]}"
    )


def test_a_switch_that_moves_on_makes_an_example_of_every_turn(file: Path) -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    first, second = conversations(file, {"messages": messages, "think": "fast"})
    hi = f"{SYSTEM}[unused9]用户：Hi"
    assert written(first) == f"{hi} /no_think[unused10][unused9]助手：{{Ho[unused10]}}"
    # The first answer is no longer asked for in that way, nor learnt again.
    assert written(second) == (
        f"{hi}[unused10][unused9]助手：Ho[unused10]"
        "[unused9]用户：And? /no_think[unused10][unused9]助手：{No.[unused10]}"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, text) for text in ("x", " x", "  x", "\nx", "你", "：", '"', '"x"', '" x', "")),
        # Whatever comes after a special token gets a space, also where that is dropped.
        ("x<s>y", "x y"),
        ('"<s>x', '" x'),
        ("x<s>", "x"),
        ("<s>", ""),
    ],
)
def test_an_answer_is_learnt_as_it_is(file: Path, text: str, shown: str) -> None:
    """No space before it and no `<s>` in it, whatever tokens it could share with the prompt."""
    (example,) = conversations(file, {"messages": [user("a"), assistant(text)]})
    prompt = "[unused9]系统：[unused10][unused9]用户：a[unused10][unused9]助手："
    ((before, _),) = learnt(example)
    assert before == [BOS, *ids_of(prompt)]
    assert written(example) == f"<s>{prompt}{{{shown}[unused10]}}"
    assert example.ids.tolist().count(BOS) == 1


@pytest.mark.parametrize("end", [":", ": "])
def test_a_template_of_its_own(file: Path, end: str) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}END{{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistantEND{% endif %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=source.replace("END", end))
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    first, second = conversations(file, {"messages": messages}, tokenizer=tokenizer)
    assert written(first) == f"<s>user{end}Hi\nassistant{end}{{Ho[unused10]}}"
    before = f"<s>user{end}Hi\nassistant{end}Ho\nuser{end}And?\n"
    assert written(second) == f"{before}assistant{end}{{No.[unused10]}}"


def test_a_template_that_complains_names_the_line(file: Path) -> None:
    source = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=source)
    write(file, GOOD_TALK, {"messages": [user("a"), user("b"), assistant("c")]})
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: chat template: .*alternate"):
        list(data.conversations(file, tokenizer))


def test_a_switch_that_the_text_has_already_wins(file: Path) -> None:
    messages = [user("Hi /auto_think "), assistant("Ho", "")]
    (example,) = conversations(file, {"messages": messages, "think": "fast"})
    assert list(learnt(example)) == turns(messages)


def test_an_assistant_may_be_the_first_and_several_may_follow(file: Path) -> None:
    messages = [assistant("Hello"), assistant("again"), user("Hi"), assistant("Ho")]
    first, others = conversations(file, {"messages": messages})
    assert written(first) == "<s>[unused9]助手：{Hello[unused10]}"
    talk = "{again[unused10]}[unused9]用户：Hi[unused10][unused9]助手：{Ho[unused10]}"
    assert written(others) == f"{SYSTEM}[unused9]助手：Hello[unused10][unused9]助手：{talk}"
    system = {"role": "system", "content": "Be brief."}
    (example,) = conversations(file, {"messages": [system, *messages]})
    assert written(example) == (
        "<s>[unused9]系统：Be brief.[unused10][unused9]助手：{Hello[unused10]}"
        f"[unused9]助手：{talk}"
    )


def test_openai_forms_are_the_same_examples(file: Path) -> None:
    call = {"name": "look", "arguments": {"at": "天空"}}
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    own = [user("Hi"), {**assistant("", "hm"), "tool_calls": [call]}]
    other = [
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "look", "arguments": json.dumps(call["arguments"])},
                }
            ],
        },
    ]
    tool = {"name": "look", "parameters": {"type": "object"}}
    found = conversations(
        file,
        {"messages": own, "tools": [tool]},
        {"messages": other, "tools": [{"type": "function", "function": tool}]},
    )
    assert [list(learnt(example)) for example in found] == [turns(own, None, [tool])] * 2


def test_other_fields_say_nothing(file: Path) -> None:
    messages = [user("Hi"), assistant("Ho", "")]
    extra = {"task": "add", "difficulty": 1, "id": [None], "messages": messages}
    a, b = conversations(file, {"messages": messages}, extra)
    assert a.ids.tolist() == b.ids.tolist()


# --- documents


@given(texts=st.lists(said, min_size=1, max_size=4), length=st.integers(2, 9))
@given_files
def test_documents_are_cut_and_nothing_is_lost(file: Path, texts: list[str], length: int) -> None:
    pieces = documents(file, length, *({"text": text, "source": 5} for text in texts))
    for text in texts:
        expected = [BOS, *ids_of(text), END]
        got: list[int] = []
        while len(got) < len(expected):
            piece = pieces.pop(0)
            assert piece.ids[:1].tolist() == (got or expected)[-1 if got else 0 :][:1]
            got = got[:-1] + piece.ids.tolist()
            assert piece.ids.size == length or len(got) == len(expected)
            assert piece.learn.all()
            assert piece.learn.shape == piece.ids.shape
            assert (piece.ids.dtype, piece.learn.dtype) == (np.int32, bool)
        assert got == expected
    assert not pieces


# --- lines

GOOD_TEXT = {"text": "a"}
GOOD_TALK = {"messages": [user("a"), assistant("b")]}
READERS = {
    "documents": (lambda path: data.documents(path, TOKENIZER, 8), GOOD_TEXT),
    "conversations": (lambda path: data.conversations(path, TOKENIZER), GOOD_TALK),
}


def refused(reader: str, file: Path, where: str = "") -> str:
    """The one line that names the file (and the place in it)."""
    with pytest.raises(InputError) as caught:
        list(READERS[reader][0](file))
    message = str(caught.value)
    assert re.match(re.escape(f"{file}{where}") + r"( \d+)?: ", message)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


NOT_JSON = [
    (b"{", "not valid JSON"),
    (b"\0", "not valid JSON"),
    (b'{"text": "a\0b"}', "not valid JSON"),
    (b"text", "not valid JSON"),
    (b"{'text': 'a'}", "not valid JSON"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    (b'{"text": "a",}', "not valid JSON"),
    (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
    ('{"text": "ä"}'.encode("utf-16"), "not UTF-8"),
    (b"[]", "must be a JSON object, not list"),
    (b"5", "must be a JSON object, not int"),
    (b"null", "must be a JSON object"),
    (b'{"text": "a", "text": "b"}', "'text' appears twice"),
    (b'{"text": "a", "x": {"b": 1, "b": 1}}', "'b' appears twice"),
    (b'{"text": "a", "messages": [NaN]}', "NaN"),
    (b'{"text": 1e999}', "Infinity"),
    (b'{"x": -Infinity}', "Infinity"),
    (b'{"x": ' + b"9" * 5000 + b"}", "number too long"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"x": ' + b"[" * 50 + b"]" * 50 + b"}", "nested too deeply"),
    (b'{"x":' * 200_000, "nested too deeply"),
    (b'{"text": "\\ud800", "messages": ["\\ud800"]}', "lone surrogate"),
    (b'{"text": "a", "\\udfff": 5}', "lone surrogate"),
    (b"{}", "text|messages"),
    (b'{"Text": "a", "message": []}', "text|messages"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("line", "complaint"), NOT_JSON)
def test_a_line_that_is_no_object_is_named(
    file: Path, reader: str, line: bytes, complaint: str
) -> None:
    good = json.dumps(READERS[reader][1]).encode()
    for end in (b"\n", b"\r\n", b""):
        file.write_bytes(good + b"\n  \n" + line + end + (good if end else b""))
        message = refused(reader, file, ", line 3")
        assert any(part in message for part in complaint.split("|"))


@pytest.mark.parametrize("text", [None, 5, 1.5, True, [], ["a"], {}, {"text": "a"}])
def test_a_text_must_be_a_string(file: Path, text: Any) -> None:
    write(file, GOOD_TEXT, {"text": text})
    assert '"text" must be a string' in refused("documents", file, ", line 2")


BAD_TALKS = [
    ({"messages": None}, "messages must be a list"),
    ({"messages": "Hi"}, "messages must be a list"),
    ({"messages": {"role": "assistant"}}, "messages must be a list"),
    ({"messages": []}, "no message of an assistant"),
    ({"messages": [user("a")]}, "no message of an assistant"),
    ({"messages": [user("a"), {"role": "Assistant"}]}, "did you mean assistant?"),
    ({"messages": [*GOOD_TALK["messages"], {"role": "usr"}]}, "message 3: unknown role 'usr'; did"),
    ({"messages": [{"role": "\x1b"}, assistant("b")]}, "message 1: unknown role '\\x1b'"),
    ({"messages": [{"role": ""}, assistant("b")]}, "message 1: unknown role ''"),
    ({"messages": [5]}, "messages[0] must be an object, not 5"),
    ({"messages": [user("a"), {"content": "b"}]}, "message 2 must be an object with a role"),
    ({"messages": [user("a"), {"role": ["assistant"]}]}, "message 2 must be an object with a role"),
    ({"messages": [user("a"), {"role": "assistant", "content": 5}]}, "message 2: content must be"),
    ({"messages": [{"role": "user", "content": {}}, assistant("b")]}, "message 1: content must"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]}, "message 1"),
    ({"messages": [user("a"), {**assistant("b"), "thinking": 5}]}, "message 2: thinking"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": {}}]}, "tool_calls must be a list"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": [{}]}]}, "function with a name"),
    ({"messages": [assistant("\ud800")]}, "lone surrogate"),
    ({"messages": [user("\udfff"), assistant("b")]}, "lone surrogate"),
    *(
        ({**GOOD_TALK, "think": think}, "think must be one of fast, slow, auto; not ")
        for think in ("hard", "", "a\nb", ["fast"], False, 0, {"fast": "slow"})
    ),
    *(({**GOOD_TALK, "tools": tools}, "tools must be a list") for tools in ({}, "x", 5, False)),
    ({**GOOD_TALK, "tools": [{"name": "f"}, 5]}, "tools[1] must be an object, not 5"),
    ({**GOOD_TALK, "tools": [{}]}, "function with a name"),
    ({**GOOD_TALK, "tools": [{"name": ["f"]}]}, "function with a name"),
    ({**GOOD_TALK, "tools": [{"function": 5}]}, "function with a name"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_TALKS)
def test_a_conversation_that_is_none_is_named(file: Path, line: Any, complaint: str) -> None:
    write(file, GOOD_TALK, line, GOOD_TALK)
    assert complaint in refused("conversations", file, ", line 2")


nothing = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(
    nothing | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "x"]) | values
odd_messages = st.dictionaries(
    st.sampled_from(["content", "thinking", "reasoning_content", "tool_calls", "name"]),
    values | st.text(max_size=5),
)
odd_messages = st.builds(lambda role, rest: {"role": role, **rest}, roles, odd_messages)
odd_talks = st.builds(
    lambda messages, rest: {"messages": messages, **rest},
    values | st.lists(odd_messages, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "think": st.none() | st.text(max_size=4) | st.sampled_from(["fast", "slow", "auto"]),
            "tools": st.lists(st.dictionaries(st.just("name"), values), max_size=2),
            "text": values,
        },
    ),
)


@given(line=odd_talks | values)
@given_files
def test_any_json_is_a_conversation_or_a_complaint(file: Path, line: Any) -> None:
    write(file, GOOD_TALK, line)
    try:
        first, *found = data.conversations(file, TOKENIZER)
    except InputError:
        refused("conversations", file, ", line 2")
        return
    assert list(learnt(first)) == turns(GOOD_TALK["messages"])
    for example in found:
        assert example.ids[0] == BOS
        assert not example.learn[0]
        assert example.learn[-1]
        assert example.ids[-1] == END


@given(line=st.fixed_dictionaries({"text": values}, optional={"x": values}) | values)
@given_files
def test_any_json_is_a_document_or_a_complaint(file: Path, line: Any) -> None:
    write(file, GOOD_TEXT, line)
    try:
        _, *found = data.documents(file, TOKENIZER, 8)
    except InputError:
        refused("documents", file, ", line 2")
        return
    first, *rest = found
    ids = [*first.ids, *(id for piece in rest for id in piece.ids[1:])]
    assert ids == [BOS, *ids_of(line["text"]), END]


@given(content=st.binary(max_size=60))
@given_files
@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_are_a_complaint(file: Path, reader: str, content: bytes) -> None:
    file.write_bytes(content + b"x")
    place = re.match(r", line (\d+): ", refused(reader, file, ", line").removeprefix(str(file)))
    assert place
    assert 1 <= int(place[1]) <= content.count(b"\n") + 1


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ends", [("\n", "\n"), ("\r\n", "\r\n"), ("\n", ""), ("\n \n\n", "\n\n")])
def test_line_ends_and_empty_lines(file: Path, reader: str, ends: tuple[str, str]) -> None:
    read, good = READERS[reader]
    text = json.dumps(good)
    file.write_bytes(f"{text}{ends[0]}{text}{ends[1]}".encode())
    assert len(list(read(file))) == 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n"])
def test_an_empty_file_holds_nothing(file: Path, reader: str, content: bytes) -> None:
    file.write_bytes(content)
    assert list(READERS[reader][0](file)) == []


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_named(tmp_path: Path, reader: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.jsonl", tmp_path, tmp_path / "pipe"):
        refused(reader, path)


@pytest.mark.parametrize("reader", READERS)
def test_a_line_without_end_is_not_read(file: Path, reader: str, monkeypatch) -> None:
    read, good = READERS[reader]
    text = json.dumps(good) + "\n"
    monkeypatch.setattr(files, "MAX_LINE_BYTES", len(text))
    file.write_text(text * 2)
    assert len(list(read(file))) == 2
    file.write_text(text + " " + text)
    assert "longer than" in refused(reader, file, ", line 2")
