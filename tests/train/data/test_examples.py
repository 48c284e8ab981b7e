"""Examples of records: the published template, by hand; what is learnt, and complaints."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import Tokenizer
from train import pretrain, sft
from train.data import examples, records
from train.data.examples import Encode, Example, Learn

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

given_records = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TOKENIZER = Tokenizer.load(NANO)
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
DOCUMENTS, CONVERSATIONS = examples.documents(TOKENIZER), examples.conversations(TOKENIZER)


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


def stretches(ids: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
    """Every stretch of what is chosen, after all that stands before it."""
    start = None
    for place, is_chosen in enumerate([*chosen.tolist(), False]):
        if is_chosen and start is None:
            start = place
        elif not is_chosen and start is not None:
            yield ids[:start].tolist(), ids[start:place].tolist()
            start = None


def learnt(example: Example) -> Iterator[tuple[list[int], list[int]]]:
    """Every stretch that is learnt, after all that stands before it."""
    return stretches(example.ids, example.learn)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def read(file: Path, encode: Encode, *lines: Any) -> list[Example]:
    """The examples of a file of these lines."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [each for record in records.read(file) for each in examples.of(record, encode)]


def refused(file: Path, encode: Encode, *lines: Any) -> str:
    """The one line that names the file and the second of these lines, which is bad."""
    with pytest.raises(InputError) as caught:
        read(file, encode, *lines)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 2: ")
    assert message.isprintable()
    return message


def talk(line: dict[str, Any], learn: Learn = "assistants") -> list[Example]:
    return list(examples.conversations(TOKENIZER, learn)(line))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return message if thinking is None else {**message, "thinking": thinking}


GOOD_TEXT = {"text": "a"}
GOOD_TALK = {"messages": [user("a"), assistant("b")]}

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
talks = st.builds(
    lambda messages, last: [*messages, last], st.lists(prompts | answers, max_size=6), answers
)
thinks = st.sampled_from([None, "slow", "fast", "auto"])
tools = st.none() | st.lists(
    st.fixed_dictionaries({"name": texts, "description": texts}), max_size=2
)


@given(messages=talks, think=thinks, tools=tools)
@given_records
def test_what_is_learnt_is_what_assistants_say_after_what_generation_sees(
    messages: list[Any], think: Any, tools: Any
) -> None:
    found = talk({"messages": messages, "think": think, "tools": tools})
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


def test_a_problem_of_tasks() -> None:
    line = {"messages": [user("What is 2 + 3?"), assistant("5", "2+3=5")], "think": "slow"}
    (slow,) = talk(line)
    assert written(slow) == (
        f"{SYSTEM}[unused9]用户：What is 2 + 3?[unused10]"
        "[unused9]助手：{[unused16]2+3=5[unused17]5[unused10]}"
    )
    line = {"messages": [user("What is 2 + 3?"), assistant("5", "")], "think": "fast"}
    (fast,) = talk(line)
    assert written(fast) == (
        f"{SYSTEM}[unused9]用户：What is 2 + 3? /no_think[unused10]"
        "[unused9]助手：{[unused16][unused17]5[unused10]}"
    )


@pytest.mark.parametrize("think", [None, "slow"])
def test_turns_without_thoughts_are_one_example(think: Any) -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    (example,) = talk({"messages": messages, "think": think})
    assert written(example) == (
        f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手：{{Ho[unused10]}}"
        "[unused9]用户：And?[unused10][unused9]助手：{No.[unused10]}"
    )


def test_a_fast_answer_is_remembered_without_its_empty_thought() -> None:
    """As `infer.conversation` remembers it."""
    messages = [user("Hi"), assistant("Ho", ""), user("And?"), assistant("No.", "")]
    first, second = talk({"messages": messages})
    hi = f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手："
    assert written(first) == f"{hi}{{[unused16][unused17]Ho[unused10]}}"
    assert written(second) == (
        f"{hi}Ho[unused10][unused9]用户：And?[unused10]"
        "[unused9]助手：{[unused16][unused17]No.[unused10]}"
    )


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_a_thought_is_learnt_and_then_forgotten(key: str) -> None:
    """Every turn is an example of its own, as every prompt is another text."""
    answers = [{**assistant(text), key: thought} for text, thought in (("Ho", "hm"), ("No.", "so"))]
    messages = [user("Hi"), answers[0], user("And?"), answers[1]]
    first, second = talk({"messages": messages})
    hi = f"{SYSTEM}[unused9]用户：Hi[unused10][unused9]助手："
    assert written(first) == f"{hi}{{[unused16]hm[unused17]Ho[unused10]}}"
    assert written(second) == (
        f"{hi}[unused16][unused17]Ho[unused10]"
        "[unused9]用户：And?[unused10][unused9]助手：{[unused16]so[unused17]No.[unused10]}"
    )


def test_a_switch_that_moves_on_makes_an_example_of_every_turn() -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    first, second = talk({"messages": messages, "think": "fast"})
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
def test_an_answer_is_learnt_as_it_is(text: str, shown: str) -> None:
    """No space before it and no `<s>` in it, whatever tokens it could share with the prompt."""
    (example,) = talk({"messages": [user("a"), assistant(text)]})
    prompt = "[unused9]系统：[unused10][unused9]用户：a[unused10][unused9]助手："
    ((before, _),) = learnt(example)
    assert before == [BOS, *ids_of(prompt)]
    assert written(example) == f"<s>{prompt}{{{shown}[unused10]}}"
    assert example.ids.tolist().count(BOS) == 1


@pytest.mark.parametrize("end", [":", ": "])
def test_a_template_of_its_own(end: str) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}END{{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistantEND{% endif %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=source.replace("END", end))
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    first, second = examples.conversations(tokenizer)({"messages": messages})
    assert written(first) == f"<s>user{end}Hi\nassistant{end}{{Ho[unused10]}}"
    before = f"<s>user{end}Hi\nassistant{end}Ho\nuser{end}And?\n"
    assert written(second) == f"{before}assistant{end}{{No.[unused10]}}"


def test_a_template_that_complains_names_the_line(file: Path) -> None:
    source = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=source)
    wrong = {"messages": [user("a"), user("b"), assistant("c")]}
    message = refused(file, examples.conversations(tokenizer), GOOD_TALK, wrong)
    assert re.search(r": chat template: .*alternate", message)


def test_a_switch_that_the_text_has_already_wins() -> None:
    messages = [user("Hi /auto_think "), assistant("Ho", "")]
    (example,) = talk({"messages": messages, "think": "fast"})
    assert list(learnt(example)) == turns(messages)


def test_an_assistant_may_be_the_first_and_several_may_follow() -> None:
    messages = [assistant("Hello"), assistant("again"), user("Hi"), assistant("Ho")]
    first, others = talk({"messages": messages})
    assert written(first) == "<s>[unused9]助手：{Hello[unused10]}"
    rest = "{again[unused10]}[unused9]用户：Hi[unused10][unused9]助手：{Ho[unused10]}"
    assert written(others) == f"{SYSTEM}[unused9]助手：Hello[unused10][unused9]助手：{rest}"
    system = {"role": "system", "content": "Be brief."}
    (example,) = talk({"messages": [system, *messages]})
    assert written(example) == (
        "<s>[unused9]系统：Be brief.[unused10][unused9]助手：{Hello[unused10]}"
        f"[unused9]助手：{rest}"
    )


def test_openai_forms_are_the_same_examples() -> None:
    call = {"name": "look", "arguments": {"at": "天空"}}
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    own = [user("Hi"), {**assistant("", "hm"), "tool_calls": [call]}]
    function = {"name": "look", "arguments": json.dumps(call["arguments"])}
    other = [
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
    ]
    tool = {"name": "look", "parameters": {"type": "object"}}
    expected = turns(own, None, [tool])
    for line in (
        {"messages": own, "tools": [tool]},
        {"messages": other, "tools": [{"type": "function", "function": tool}]},
    ):
        (example,) = talk(line)
        assert list(learnt(example)) == expected


def test_other_fields_say_nothing() -> None:
    messages = [user("Hi"), assistant("Ho", "")]
    extra = {"task": "add", "difficulty": 1, "id": [None], "text": 5, "messages": messages}
    (a,), (b,) = talk({"messages": messages}), talk(extra)
    assert a.ids.tolist() == b.ids.tolist()


def test_fields_without_a_value_say_nothing() -> None:
    """In a column of a table every message has every field."""
    messages = [user("Hi"), assistant("Ho", "hm"), user("And?"), assistant("No.")]
    nothing = dict.fromkeys(("thinking", "reasoning_content", "tool_calls", "name", "learn"))
    full = [{**nothing, **message} for message in messages]
    found = talk({"messages": full, "think": None, "tools": None})
    assert [turn for example in found for turn in learnt(example)] == turns(messages)


# --- whose tokens are learnt


@given(messages=talks, think=thinks, marks=st.lists(st.none() | st.booleans(), min_size=7))
@pytest.mark.parametrize("learn", ["assistants", "last", "all"])
@given_records
def test_messages_say_what_is_learnt_where_the_run_does_not(
    learn: Learn, messages: list[Any], think: Any, marks: list[bool | None]
) -> None:
    """`last` is the last turn, and `all` the prompts too; what a message says of itself wins."""
    marked = [
        {**message, "learn": mark} if message["role"] == "assistant" else message
        for message, mark in zip(messages, marks, strict=False)
    ]
    expected = turns(messages, think)
    marks_of_turns = [each.get("learn") for each in marked if each["role"] == "assistant"]
    last = len(expected) - 1
    chosen = [
        (learn != "last" or i == last) if mark is None else mark
        for i, mark in enumerate(marks_of_turns)
    ]
    found = talk({"messages": marked, "think": think}, learn)
    assert all(example.learn.any() for example in found)
    if learn == "all":
        left_out = [turn for e in found for turn in stretches(e.ids, ~e.learn)]
        assert left_out == [turn for turn, kept in zip(expected, chosen, strict=True) if not kept]
    else:
        kept = [turn for example in found for turn in learnt(example)]
        assert kept == [turn for turn, kept in zip(expected, chosen, strict=True) if kept]


@pytest.mark.parametrize("learn", ["assistants", "last", "all"])
def test_what_is_learnt_changes_no_token(learn: Learn) -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    (example,) = talk({"messages": messages}, learn)
    (plain,) = talk({"messages": messages})
    assert example.ids.tolist() == plain.ids.tolist()
    counts = {"assistants": sum(len(said) for _, said in turns(messages))}
    counts |= {"last": len(turns(messages)[-1][1]), "all": example.ids.size}
    assert example.learn.sum() == counts[learn]


def test_an_example_of_which_nothing_is_learnt_is_left_out() -> None:
    messages = [user("Hi"), assistant("Ho", "hm"), user("And?"), assistant("No.", "so")]
    assert len(talk({"messages": messages})) == 2
    (last,) = talk({"messages": messages}, "last")
    assert list(learnt(last)) == turns(messages)[1:]
    silent = [{**message, "learn": False} for message in messages]
    assert talk({"messages": silent}) == []
    assert talk({"messages": silent}, "last") == []


def test_only_of_an_assistants_message_learn_says_something() -> None:
    messages = [{**user("Hi"), "learn": True}, assistant("Ho"), {**user("And?"), "learn": "yes"}]
    (example,) = talk({"messages": messages})
    assert list(learnt(example)) == turns([user("Hi"), assistant("Ho")])


# --- documents


@given(text=said)
@given_records
def test_a_document_is_one_example_between_begin_and_end(text: str) -> None:
    (example,) = DOCUMENTS({"text": text, "source": 5})
    assert example.ids.tolist() == [BOS, *ids_of(text), END]
    assert (example.ids.dtype, example.learn.dtype) == (np.int32, bool)
    assert example.learn.shape == example.ids.shape
    assert example.learn.all()


@pytest.mark.parametrize(
    ("roles", "first", "last"),
    [({}, [], []), ({"bos": 7}, [7], []), ({"eos": 8}, [], [8]), ({"bos": 7, "eos": 8}, [7], [8])],
)
def test_a_document_has_the_ends_that_the_tokenizer_has(
    roles: dict[str, int], first: list[int], last: list[int]
) -> None:
    tokenizer = dataclasses.replace(TOKENIZER, roles=roles)
    (example,) = examples.documents(tokenizer)({"text": "Hi you"})
    assert example.ids.tolist() == [*first, *ids_of("Hi you"), *last]


# --- both


@pytest.mark.parametrize("learn", ["assistants", "last", "all"])
def test_pretraining_reads_conversations_among_documents(file: Path, learn: Learn) -> None:
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    lines = [{"text": "One"}, {"messages": messages, "text": "not this"}, {"text": "Two"}]
    found = read(file, pretrain.READER.encode(TOKENIZER, learn), *lines)
    (expected,) = talk(lines[1], learn)
    one, example, two = found
    for document, text in ((one, "One"), (two, "Two")):
        assert document.ids.tolist() == [BOS, *ids_of(text), END]
        assert document.learn.all()
    assert example.ids.tolist() == expected.ids.tolist()
    assert example.learn.tolist() == expected.learn.tolist()


def test_pretraining_names_what_is_neither(file: Path) -> None:
    encode = pretrain.READER.encode(TOKENIZER, "assistants")
    assert '"text" must be a string' in refused(file, encode, GOOD_TEXT, {"title": "a"})
    assert "messages must be a list" in refused(file, encode, GOOD_TALK, {"messages": None})


def test_fine_tuning_reads_conversations_only(file: Path) -> None:
    encode = sft.READER.encode(TOKENIZER, "last")
    messages = [user("Hi"), assistant("Ho"), user("And?"), assistant("No.")]
    (example,) = encode({"messages": messages})
    assert list(learnt(example)) == turns(messages)[1:]
    assert 'needs "messages"' in refused(file, encode, GOOD_TALK, GOOD_TEXT)


# --- complaints


def test_a_record_that_is_none_is_the_complaint_it_is(file: Path) -> None:
    file.write_text('{"text": "a"}\n{"text":\n')
    first, second = records.read(file)
    assert len(examples.of(first, DOCUMENTS)) == 1
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: not valid JSON"):
        examples.of(second, DOCUMENTS)


@pytest.mark.parametrize("text", [None, 5, 1.5, True, [], ["a"], {}, {"text": "a"}])
def test_a_text_must_be_a_string(file: Path, text: Any) -> None:
    assert '"text" must be a string' in refused(file, DOCUMENTS, GOOD_TEXT, {"text": text})


@pytest.mark.parametrize("line", [{}, {"Text": "a", "message": []}])
def test_a_record_of_other_fields_is_named(file: Path, line: Any) -> None:
    assert '"text" must be a string, not null' in refused(file, DOCUMENTS, GOOD_TEXT, line)
    assert 'needs "messages"' in refused(file, CONVERSATIONS, GOOD_TALK, line)


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
    *(
        (
            {"messages": [user("a"), {**assistant("b"), "learn": learn}]},
            f"message 2: learn must be true or false, not {shown}",
        )
        for learn, shown in (("no", '"no"'), (0, "0"), (1.0, "1.0"), ([], "[]"), ({}, "{}"))
    ),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_TALKS)
def test_a_conversation_that_is_none_is_named(file: Path, line: Any, complaint: str) -> None:
    assert complaint in refused(file, CONVERSATIONS, GOOD_TALK, line, GOOD_TALK)


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
@given_records
def test_any_json_is_a_conversation_or_a_complaint(file: Path, line: Any) -> None:
    try:
        first, *found = read(file, CONVERSATIONS, GOOD_TALK, line)
    except InputError:
        refused(file, CONVERSATIONS, GOOD_TALK, line)
        return
    assert list(learnt(first)) == turns(GOOD_TALK["messages"])
    for example in found:
        assert example.ids[0] == BOS
        assert not example.learn[0]
        assert example.learn[-1]
        assert example.ids[-1] == END


@given(line=st.fixed_dictionaries({"text": values}, optional={"x": values}) | values)
@given_records
def test_any_json_is_a_document_or_a_complaint(file: Path, line: Any) -> None:
    try:
        _, example = read(file, DOCUMENTS, GOOD_TEXT, line)
    except InputError:
        refused(file, DOCUMENTS, GOOD_TEXT, line)
        return
    assert example.ids.tolist() == [BOS, *ids_of(line["text"]), END]
