"""Messages to prompts: the published template, thinking, tools, bad input and exactly one BOS."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_jax.errors import CheckpointError, InputError
from pangu_jax.text import chat, markers
from pangu_jax.text.chat import FolderTemplate
from pangu_jax.text.markers import Markers
from pangu_jax.text.messages import TOOLS
from pangu_jax.text.tokenizer import Tokenizer
from tests import spm

Messages = list[dict[str, Any]]

CASES = Path(__file__).parents[2] / "oracle" / "chat" / "cases.json"
ASK = "[unused9]助手："
EMPTY = "[unused9]系统：[unused10]"

# The published template as Jinja, in both conventions.
JINJA = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{% if messages %}BOS[unused9]系统：[unused10]{% endif %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}BOS[unused9]系统：{{ message['content'] }}[unused10]"
    "{% elif message['role'] == 'user' %}[unused9]用户：{{ message['content'] }}[unused10]"
    "{% elif message['role'] == 'assistant' %}[unused9]助手：{{ message['content'] }}[unused10]"
    "{% elif message['role'] == 'tool' %}[unused9]工具：{{ message['content'] }}[unused10]"
    "{% elif message['role'] == 'function' %}[unused9]方法：{{ message['content'] }}[unused10]"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)
JINJA_FORMS = {
    "hf": JINJA.replace("BOS", ""),
    "vllm": JINJA.replace("BOS", "<s>"),
    "bos_token": JINJA.replace("BOS", "{{ bos_token }}"),
}


def say(*pairs: tuple[str, Any]) -> Messages:
    return [{"role": role, "content": content} for role, content in pairs]


def user(text: Any) -> Messages:
    return say(("user", text))


def turns(*contents: str) -> str:
    """A prompt whose turns hold this: system, user, assistant, user, ..."""
    names = ["系统", *["用户", "助手"] * len(contents)]
    pairs = zip(names, contents, strict=False)
    return "".join(f"[unused9]{name}：{content}[unused10]" for name, content in pairs)


# --- the published template -----------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(CASES.read_text(encoding="utf-8")))
def test_prompts_of_the_published_templates(case: dict[str, Any]) -> None:
    text = chat.render(case["messages"], case["template"], case["add_generation_prompt"])
    assert text.encode() == case["text"].encode()


def test_hf_with_a_generation_prompt_is_the_default() -> None:
    assert chat.render(user("Hello")) == turns("", "Hello") + ASK


@pytest.mark.parametrize("template", ["hf", "vllm"])
def test_no_messages_are_a_generation_prompt_or_nothing(template: Any) -> None:
    assert chat.render([], template) == ASK
    assert chat.render([], template, add_generation_prompt=False) == ""


def test_titles_end_in_a_full_width_colon() -> None:
    text = chat.render(say(*((role, "") for role in chat.TITLES)))
    titles = ["系统", "用户", "助手", "工具", "方法"]
    assert text == "".join(f"[unused9]{title}\uff1a[unused10]" for title in titles) + ASK
    assert ":" not in text


def test_function_and_tool_turns_stand_in_their_order() -> None:
    messages = say(("system", "s"), ("tool", "t"), ("function", "f"), ("tool", "u"))
    assert chat.render(messages, add_generation_prompt=False) == (
        "[unused9]系统：s[unused10][unused9]工具：t[unused10]"
        "[unused9]方法：f[unused10][unused9]工具：u[unused10]"
    )


@pytest.mark.parametrize("role", ["developer", "System", "", "用户"])
def test_other_roles_emit_nothing(role: str) -> None:
    other = (role, "not shown")
    assert chat.render(say(("system", "s"), other, ("user", "u"))) == turns("s", "u") + ASK
    assert chat.render(say(other)) == EMPTY + ASK
    assert chat.render(say(other, ("system", "s"))) == EMPTY + turns("s") + ASK


def test_a_later_system_message_is_like_any_other() -> None:
    messages = say(("user", "u"), ("system", "late"), ("user", "v"))
    late = "[unused9]系统：late[unused10][unused9]用户：v[unused10]"
    assert chat.render(messages, "hf") == turns("", "u") + late + ASK
    assert chat.render(messages, "vllm") == f"<s>{turns('', 'u')}<s>{late}{ASK}"


@pytest.mark.parametrize("content", [" \n两 边\u3000\n ", "\r\n", "<b>&amp;'\"", "{{ x }}{% y %}"])
def test_nothing_is_trimmed_or_escaped(content: str) -> None:
    messages = say(("system", content), ("user", content), ("assistant", content))
    text = turns(content, content, content)
    assert chat.render(messages, add_generation_prompt=False) == text
    template = FolderTemplate(JINJA_FORMS["hf"])
    assert chat.render(messages, template, add_generation_prompt=False) == text


def test_content_may_be_parts_or_nothing() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat.render(user(parts)) == turns("", "a b") + ASK
    for content in (None, [], ""):
        assert chat.render(user(content)) == turns("", "") + ASK


def test_turns_are_written_with_the_given_markers() -> None:
    named = Markers("<t>", "</t>", "<think>", "</think>", "<call>", "</call>")
    message = {"role": "assistant", "content": "c", "thinking": "t", "tool_calls": [{"name": "f"}]}
    assert chat.render([message], markers=named) == (
        "<t>系统：</t><t>助手：<think>t</think>c"
        '<call>[{"name": "f", "arguments": {}}]</call></t><t>助手：'
    )


# --- thinking switches ----------------------------------------------------------------------------

TALK = say(("user", "first"), ("assistant", "reply"), ("user", "last"), ("tool", "result"))


@pytest.mark.parametrize(
    ("think", "suffix"),
    [("fast", " /no_think"), ("auto", " /auto_think"), ("slow", ""), (None, "")],
)
def test_a_switch_marks_the_last_user_message_alone(think: Any, suffix: str) -> None:
    text = turns("", "first", "reply", f"last{suffix}") + "[unused9]工具：result[unused10]" + ASK
    assert chat.render(TALK, think=think) == text
    # What is there already is not written again.
    assert chat.render(user(f"hi{suffix}"), think=think) == turns("", f"hi{suffix}") + ASK


@pytest.mark.parametrize("text", ["/no_think", "hi /no_think ", "hi\n/no_think", "hi /no_think\n"])
def test_a_switch_that_is_detected_is_not_doubled(text: str) -> None:
    assert chat.thinking_mode(user(text)) == "fast"
    assert chat.render(user(text), think="fast").count("/no_think") == 1


@pytest.mark.parametrize(("think", "line"), [("fast", "system 1"), ("slow", "system 2")])
def test_meta_prompts(think: Any, line: str) -> None:
    asked = f"META_PROMPT: {line}\nlast"
    text = turns("", "first", "reply", asked) + "[unused9]工具：result[unused10]" + ASK
    assert chat.render(TALK, think=think, meta_prompt=True) == text
    assert chat.render(TALK, meta_prompt=True) == chat.render(TALK)
    # What is there already is not written again.
    assert chat.render(user(asked), think=think, meta_prompt=True) == turns("", asked) + ASK


@pytest.mark.parametrize("think", ["fast", "slow", "auto", None])
def test_without_a_user_there_is_nothing_to_switch(think: Any) -> None:
    messages = say(("system", "s"), ("assistant", "a"))
    for meta_prompt in (False, think in chat.META):
        text = chat.render(messages, think=think, meta_prompt=meta_prompt)
        assert text == chat.render(messages)


@pytest.mark.parametrize("think", ["fast", "slow", "auto"])
@pytest.mark.parametrize("content", ["hi", "", [{"type": "text", "text": "hi"}]])
def test_a_switch_is_also_a_folder_templates(think: Any, content: Any) -> None:
    folder = FolderTemplate(JINJA_FORMS["vllm"])
    assert chat.render(user(content), folder, think=think) == chat.render(
        user(content), "vllm", think=think
    )


@pytest.mark.parametrize(
    ("messages", "mode"),
    [
        ([], None),
        (user("hi"), None),
        (user("hi /no_think"), "fast"),
        (user("hi /auto_think"), "auto"),
        (user("hi /no_think please"), None),
        (say(("user", "a /no_think"), ("assistant", "b"), ("user", "c")), None),
        (say(("user", "a"), ("assistant", "b /no_think")), None),
        (say(("system", "s /no_think"), ("user", "a")), None),
        (user("META_PROMPT: system 1\nhi"), "fast"),
        (user("META_PROMPT: system 2\nhi"), "slow"),
        (user("META_PROMPT: system 12\nhi"), None),
        (user("what is META_PROMPT: system 1"), None),
        (say(("system", "Be brief.\nMETA_PROMPT: system 2"), ("user", "a")), "slow"),
        (say(("system", "META_PROMPT: system 2"), ("user", "a /no_think")), "fast"),
        (say(("system", "META_PROMPT: system 2")), "slow"),
        (say(("user", "a"), ("system", "META_PROMPT: system 2")), None),
        (user([{"type": "text", "text": "hi"}, {"type": "text", "text": " /no_think"}]), "fast"),
    ],
)
def test_what_a_conversation_itself_asks_for(messages: Messages, mode: str | None) -> None:
    assert chat.thinking_mode(messages) == mode


def test_the_meta_prompt_has_no_form_for_auto() -> None:
    with pytest.raises(InputError, match="no form for auto"):
        chat.render(user("hi"), think="auto", meta_prompt=True)


def test_a_switch_of_the_message_wins() -> None:
    said = user("hi /auto_think")
    assert chat.render(said, think="fast") == chat.render(said)


@pytest.mark.parametrize(
    ("think", "meta_prompt"),
    [("fast", False), ("slow", False), ("auto", False), ("fast", True), ("slow", True)],
)
def test_a_switch_is_detected_again(think: Any, meta_prompt: bool) -> None:
    silent = think == "slow" and not meta_prompt
    text = chat.render(user("hi"), think=think, meta_prompt=meta_prompt)
    content = text.partition("用户：")[2].partition("[unused10]")[0]
    assert chat.thinking_mode(user(content)) == (None if silent else think)


# --- thinking and tool calls of the assistant -----------------------------------------------------


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_thinking_stands_before_the_content(key: str) -> None:
    message = {"role": "assistant", "content": "a", key: "t"}
    whole = "[unused16]t[unused17]a"
    assert chat.render([message]) == f"{EMPTY}[unused9]助手：{whole}[unused10]{ASK}"
    assert chat.render([message], FolderTemplate(JINJA_FORMS["hf"])) == chat.render([message])
    message[key] = ""
    assert "助手：[unused16][unused17]a[unused10]" in chat.render([message])
    # Only an assistant thinks.
    assert chat.render([{**message, "role": "user", key: "t"}]) == turns("", "a") + ASK


@pytest.mark.parametrize("content", [None, "", "Let me see."])
@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "天气", "arguments": '{"q": "北京"}'}},
        {"function": {"name": "天气", "arguments": {"q": "北京"}}},
        {"name": "天气", "arguments": '{"q":"\\u5317\\u4eac"}'},
        {"name": "天气", "arguments": {"q": "北京"}},
    ],
)
def test_tool_calls_are_written_as_the_models_write_them(call: Any, content: str | None) -> None:
    written = '[unused11][{"name": "天气", "arguments": {"q": "北京"}}][unused12]'
    message = {"role": "assistant", "content": content, "tool_calls": [call]}
    whole = (content or "") + written
    assert chat.render([message]) == f"{EMPTY}[unused9]助手：{whole}[unused10]{ASK}"
    assert chat.render([message], FolderTemplate(JINJA_FORMS["hf"])) == chat.render([message])


def test_all_calls_are_one_list_after_the_thinking_and_the_content() -> None:
    calls = [{"name": "f"}, {"name": "g", "arguments": {"x": [1, {"y": None}]}}]
    message = {"role": "assistant", "content": "c", "thinking": "t", "tool_calls": calls}
    written = (
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": [1, {"y": null}]}}]'
    )
    assert f"助手：[unused16]t[unused17]c[unused11]{written}[unused12][unused10]" in chat.render(
        [message]
    )


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_block(calls: Any) -> None:
    message = {"role": "assistant", "content": "c", "tool_calls": calls}
    assert chat.render([message]) == chat.render(say(("assistant", "c")))


def test_a_folder_template_that_knows_calls_writes_them_itself() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}{% endfor %}"
    )
    message = {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f"}}]}
    assert chat.render([message], FolderTemplate(source)) == "c<f>"


def test_a_folder_template_that_knows_thinking_gets_it_once() -> None:
    source = (
        "{% for m in messages %}<think>{{ m.reasoning_content }}</think>{{ m.content }}{% endfor %}"
    )
    message = {"role": "assistant", "content": "c", "reasoning_content": "unique"}
    assert chat.render([message], FolderTemplate(source)).count("unique") == 1


# --- tool definitions -----------------------------------------------------------------------------

WEATHER = {"name": "weather", "description": "天气", "parameters": {"type": "object"}}
LINE = '{"name": "weather", "description": "天气", "parameters": {"type": "object"}}'
DEFINED = f"{TOOLS}\n{LINE}"


@pytest.mark.parametrize("tool", [WEATHER, {"type": "function", "function": WEATHER}])
@pytest.mark.parametrize("template", ["hf", "vllm"])
def test_tools_are_defined_in_the_first_system_turn(tool: Any, template: Any) -> None:
    bos = "<s>" if template == "vllm" else ""
    with_system = say(("system", "Be brief."), ("user", "u"))
    defined = bos + turns("Be brief.\n\n" + DEFINED, "u") + ASK
    assert chat.render(with_system, template, tools=[tool]) == defined
    alone = bos + turns(DEFINED, "u") + ASK
    assert chat.render(user("u"), template, tools=[tool]) == alone
    assert chat.render(say(("system", ""), ("user", "u")), template, tools=[tool]) == alone
    two = chat.render(user("u"), template, tools=[tool, {"name": "b"}])
    assert two == bos + turns(f'{DEFINED}\n{{"name": "b"}}', "u") + ASK


def test_tools_do_not_go_into_a_later_system_turn() -> None:
    text = chat.render(say(("user", "u"), ("system", "late")), tools=[WEATHER])
    assert text == f"{turns(DEFINED, 'u')}[unused9]系统：late[unused10]{ASK}"


@pytest.mark.parametrize("tools", [None, [], ()])
def test_no_tools_change_nothing(tools: Any) -> None:
    assert chat.render(TALK, tools=tools) == chat.render(TALK)


def test_a_folder_template_that_knows_tools_gets_them() -> None:
    source = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}" + JINJA_FORMS["hf"]
    text = chat.render(user("u"), FolderTemplate(source), tools=[WEATHER, {"name": "b"}])
    assert text == "weather;b;" + turns("", "u") + ASK
    assert chat.render(user("u"), FolderTemplate(source)) == turns("", "u") + ASK


@pytest.mark.parametrize("messages", [user("u"), say(("system", "s"), ("user", "u")), []])
def test_a_folder_template_that_does_not_know_tools_finds_them_in_the_system_message(
    messages: Messages,
) -> None:
    folder = FolderTemplate(JINJA_FORMS["hf"])
    assert chat.render(messages, folder, tools=[WEATHER]) == chat.render(messages, tools=[WEATHER])


def test_the_messages_stay_as_they_are() -> None:
    messages: Messages = [
        *say(("system", "s"), ("user", [{"type": "text", "text": "u"}])),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]},
        *user("v"),
    ]
    before = copy.deepcopy(messages)
    for template in ("hf", FolderTemplate(JINJA_FORMS["hf"])):
        for meta_prompt in (False, True):
            chat.render(messages, template, think="fast", tools=[WEATHER], meta_prompt=meta_prompt)
    assert messages == before


# --- bad input ------------------------------------------------------------------------------------


def _unchecked() -> Any:
    """The module as a user has it: without the run-time type checks of the suite."""
    spec = importlib.util.spec_from_file_location("unchecked_chat", chat.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


UNCHECKED = _unchecked()


def refused(*arguments: Any, **options: Any) -> str:
    """The one line with which this is refused."""
    with pytest.raises(InputError) as caught:
        UNCHECKED.render(*arguments, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert len(message) < 200
    return message


@pytest.mark.parametrize(
    "message", ["hello", None, 5, ["user", "hi"], {}, {"content": "x"}, {"role": None}, {"role": 1}]
)
def test_what_is_not_a_message_is_refused(message: Any) -> None:
    complaint = "message 2 must be an object with a role"
    assert refused([*user("hi"), message]) == complaint
    assert refused([*user("hi"), message], UNCHECKED.FolderTemplate("")) == complaint


@pytest.mark.parametrize("messages", [None, 5, "hello", {"role": "user", "content": "hi"}])
def test_what_is_not_a_list_of_messages_is_refused(messages: Any) -> None:
    refused(messages)


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    "content",
    [
        *(5, 1.5, True, b"bytes", {"text": "x"}, {"type": "text", "text": "x"}, ["x"], [None]),
        *([IMAGE], [{"type": "text", "text": "x"}, IMAGE], [{"type": "text"}], [{"text": "x"}]),
        [{"type": "text", "text": 5}],
    ],
    ids=str,
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "function", "other"])
def test_content_that_is_not_text_is_refused(role: str, content: Any) -> None:
    assert refused(say(("user", "hi"), (role, content))).startswith("message 2: content must be")


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_thinking_that_is_not_text_is_refused(key: str) -> None:
    line = refused([{"role": "assistant", "content": "", key: 5}])
    assert line.startswith("message 1: thinking: content must be text")


@pytest.mark.parametrize(
    ("calls", "complaint"),
    [
        ("f", "tool_calls must be a list"),
        ({"name": "f"}, "tool_calls must be a list"),
        (5, "tool_calls must be a list"),
        (["f"], "needs a function with a name"),
        ([None], "needs a function with a name"),
        ([{}], "needs a function with a name"),
        ([{"name": 5}], "needs a function with a name"),
        ([{"function": "f"}], "needs a function with a name"),
        ([{"function": {"arguments": {}}}], "needs a function with a name"),
        ([{"name": "f"}, {}], "needs a function with a name"),
        ([{"name": "f", "arguments": "{"}], "the arguments of 'f' are not JSON"),
        ([{"name": "f\n" * 99, "arguments": "x"}], r"the arguments of 'f\x0af"),
        ([{"name": "f", "arguments": "[" * 100_000}], "the arguments of 'f' are not JSON"),
        ([{"name": "f", "arguments": "1" * 5000}], "the arguments of 'f' are not JSON"),
        ([{"name": "f", "arguments": {"x": {1, 2}}}], "arguments of 'f'"),
        ([{"name": "f", "arguments": {"x": b""}}], "arguments of 'f'"),
        ([{"name": "f", "arguments": 5}], "arguments of 'f'"),
        ([{"name": "f", "arguments": "5"}], "arguments of 'f'"),
        ([{"name": "f", "arguments": '{"x": NaN}'}], "arguments of 'f'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_tool_calls_are_refused(calls: Any, complaint: str) -> None:
    line = refused([*user("hi"), {"role": "assistant", "content": "", "tool_calls": calls}])
    assert line.startswith("message 2: ")
    assert complaint in line


@pytest.mark.parametrize(
    "tool",
    [
        *("weather", None, 5, [], {}, {"name": 5}, {"description": "d"}),
        *({"function": None}, {"type": "function", "function": {"description": "d"}}),
        *({"name": "f", "parameters": {1, 2}}, {"name": "f", "parameters": [b""]}),
    ],
    ids=str,
)
def test_bad_tools_are_refused(tool: Any) -> None:
    assert "a tool" in refused(user("hi"), tools=[WEATHER, tool])


@pytest.mark.parametrize("tool", ["weather", 5, {}, {"name": "f", "parameters": {1, 2}}], ids=str)
def test_bad_tools_are_refused_before_a_folder_template_sees_them(tool: Any) -> None:
    assert "a tool" in refused(user("hi"), UNCHECKED.FolderTemplate("{{ tools }}"), tools=[tool])


@pytest.mark.parametrize("template", ["HF", "", "jinja\n2", None, 5, ["hf"], b"hf"])
def test_unknown_templates_are_refused(template: Any) -> None:
    line = refused(user("hi"), template)
    assert line.startswith("unknown template")
    assert line.endswith("use hf or vllm")


@pytest.mark.parametrize("think", ["no", "", "Fast", 5, True, ["fast"]])
def test_unknown_thinking_modes_are_refused(think: Any) -> None:
    for messages in (user("hi"), []):
        line = refused(messages, think=think)
        assert line.startswith("unknown thinking mode")
        assert line.endswith("use fast, slow or auto")


def test_a_template_that_fails_is_a_checkpoint_error() -> None:
    for source in ("{% if %}", "{{ raise_exception('no such role') }}", "{{ x.y.z }}"):
        with pytest.raises(CheckpointError, match="chat template") as caught:
            chat.render(user("hi"), FolderTemplate(source))
        assert len(str(caught.value).splitlines()) == 1


# --- ids ------------------------------------------------------------------------------------------


def folder_with(folder: Path, template: str | None = None, file: bool = False) -> Tokenizer:
    """A tokenizer with the published special strings; its template in one file or the other."""
    config: dict[str, Any] = {
        "additional_special_tokens": list(spm.SPECIALS),
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    if template is not None and not file:
        config["chat_template"] = template
    spm.write(folder, "bpe", tokenizer_config=config)
    if template is not None and file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return folder_with(tmp_path_factory.mktemp("plain"))


LATE = say(("user", "你好"), ("system", "late"), ("user", " b\n"))
QUOTED = say(("system", "<s>"), ("user", "what is <s>?<s>"), ("assistant", "<s> begins"))
TALKS = [[], user("Hello world"), TALK, LATE, QUOTED]


@pytest.mark.parametrize("messages", TALKS)
def test_ids_begin_with_the_only_bos(tokenizer: Tokenizer, messages: Messages) -> None:
    ids = chat.encode(tokenizer, messages, "hf")
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert chat.encode(tokenizer, messages, "vllm") == ids
    assert chat.encode(tokenizer, messages) == ids
    text = chat.render(messages)
    assert ids[1:] == [id for id in tokenizer.encode(text, add_special_tokens=False) if id != 1]
    assert tokenizer.decode(ids) == f"<s>{text}" or "<s>" in text


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("form", JINJA_FORMS)
def test_a_folders_own_template_gives_the_same_ids(
    tmp_path: Path, tokenizer: Tokenizer, form: str, file: bool
) -> None:
    own = folder_with(tmp_path, JINJA_FORMS[form], file)
    for messages in TALKS:
        ids = chat.encode(tokenizer, messages, "hf", think="fast")
        assert chat.encode(own, messages, think="fast") == ids
        assert chat.encode(own, messages, "vllm", think="fast") == ids


def test_a_folders_own_template_is_the_one_that_is_used(tmp_path: Path) -> None:
    own = folder_with(tmp_path, "{{ bos_token }}{{ eos_token }}{{ messages | length }}")
    ids = chat.encode(own, user("hi"))
    assert own.decode(ids) == "<s>[unused10]1"
    assert ids.count(1) == 1
    assert chat.encode(own, user("hi"), "hf") != ids


def test_turn_markers_become_single_ids(tokenizer: Tokenizer) -> None:
    start, end = (tokenizer.id(text) for text in ("[unused9]", "[unused10]"))
    ids = chat.encode(tokenizer, user("Hello"))
    assert [id for id in ids if id in (1, start, end)] == [1, start, end, start, end, start]


def test_arguments_reach_the_template(tokenizer: Tokenizer) -> None:
    message = {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [{"name": "f"}]}
    named = Markers(think_start="<think>", think_end="</think>")
    options: dict[str, Any] = dict(think="fast", meta_prompt=True, tools=[WEATHER], markers=named)
    ids = chat.encode(tokenizer, [*user("u"), message], "hf", False, **options)
    text = chat.render([*user("u"), message], "hf", False, **options)
    assert tokenizer.decode(ids) == "<s>" + text
    assert "<think>t</think>" in text


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    for template in ("hf", FolderTemplate(JINJA_FORMS["hf"])):
        with pytest.raises(InputError, match="lone surrogate"):
            chat.encode(tokenizer, user("\ud800"), template)


def test_without_a_bos_in_the_vocabulary_there_is_none(tmp_path: Path) -> None:
    config = {"additional_special_tokens": list(spm.SPECIALS)}
    tokenizer = Tokenizer.load(spm.write(tmp_path, "no bos", tokenizer_config=config))
    ids = chat.encode(tokenizer, user("hi"), "hf")
    assert ids == tokenizer.encode(chat.render(user("hi")))
    assert chat.encode(tokenizer, user("hi"), "vllm") == ids


CONTENTS = st.sampled_from(["<s>", "</s>", "[unused9]", "系统："]) | st.text(max_size=4)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from([*chat.TITLES, "other"]),
            "content": st.lists(CONTENTS, max_size=3).map("".join),
        }
    ),
    max_size=5,
)


@given(MESSAGES, st.booleans(), st.sampled_from(["fast", "slow", "auto", None]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_conversation_has_one_bos_and_comes_back(
    tokenizer: Tokenizer, messages: Messages, prompt: bool, think: Any
) -> None:
    text = chat.render(messages, "hf", prompt, think)
    ids = chat.encode(tokenizer, messages, "hf", prompt, think)
    assert ids == chat.encode(tokenizer, messages, "vllm", prompt, think)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert tokenizer.decode(ids) == f"<s>{text}" or "<s>" in text


# --- the markers of a vocabulary ------------------------------------------------------------------


def test_named_markers_are_those_of_a_vocabulary_that_has_both(tmp_path: Path) -> None:
    def of(name: str, *tokens: str) -> Markers:
        config = {"additional_special_tokens": [*spm.SPECIALS, *tokens]}
        return markers.of(
            Tokenizer.load(spm.write(tmp_path / name, "bpe", tokenizer_config=config))
        )

    think = dict(think_start="<think>", think_end="</think>")
    call = dict(tool_start="<|tool_call_start|>", tool_end="<|tool_call_end|>")
    assert of("none") == markers.PUBLISHED
    assert of("half", "<think>", "<|tool_call_end|>") == markers.PUBLISHED
    assert of("think", *think.values()) == Markers(**think)
    assert of("call", *call.values()) == Markers(**call)
    assert of("both", *think.values(), *call.values()) == Markers(**think, **call)
