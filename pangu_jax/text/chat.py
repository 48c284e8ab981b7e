"""Messages to prompt: the chat template, the thinking switches, and exactly one BOS.

A message is a dict: "role" (system, user, assistant, tool or function) and "content", a string, a
list of {"type": "text", "text": ...} or None. An assistant's may also have "thinking" (or
"reasoning_content") and "tool_calls".

The published template ships in two forms that differ in `<s>`: "hf" leaves BOS to the tokenizer,
"vllm" writes it before every system turn. `encode` gives the same ids for both.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pangu_jax import strict
from pangu_jax.errors import InputError
from pangu_jax.text.markers import PUBLISHED, Markers
from pangu_jax.text.tokenizer import Tokenizer

Think = Literal["fast", "slow", "auto"]
Message = Mapping[str, Any]

BOS = "<s>"
TITLES = {
    "system": "系统：",
    "user": "用户：",
    "assistant": "助手：",
    "tool": "工具：",
    "function": "方法：",
}
SUFFIX = {"fast": " /no_think", "auto": " /auto_think"}
META = {"fast": "META_PROMPT: system 1", "slow": "META_PROMPT: system 2"}

# Own choice: how tools are defined is not on record, only how they are called.
TOOLS = (
    "你可以使用以下工具，每行一个。需要时以 JSON 列表调用："
    '[{"name": "工具名", "arguments": {"参数名": "值"}}]'
)


@dataclasses.dataclass(frozen=True)
class FolderTemplate:
    """The Jinja template of a model folder, which is run in a sandbox."""

    source: str
    bos: str = BOS
    eos: str = PUBLISHED.turn_end

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FolderTemplate | None":
        """The tokenizer's own template, if its folder has one."""
        if tokenizer.chat_template is None:
            return None
        spell = lambda id: tokenizer.token(id) if id is not None else ""
        return cls(tokenizer.chat_template, spell(tokenizer.bos_id), spell(tokenizer.eos_id))


Template = Literal["hf", "vllm"] | FolderTemplate


def render(
    messages: Sequence[Message],
    template: Template = "hf",
    add_generation_prompt: bool = True,
    think: Think | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    meta_prompt: bool = False,
    markers: Markers = PUBLISHED,
) -> str:
    """The prompt text of a conversation.

    think: how to answer the last user message: "fast" appends ` /no_think`, "auto" ` /auto_think`;
        "slow" and None leave it as it is (slow is what the published 7B and 72B do by default)
    tools: definitions, as JSON schemas or OpenAI's {"type": "function", "function": ...}
    meta_prompt: switch by the paper's `META_PROMPT: system 1` (fast) and `2` (slow), on a line
        before the user's text (own choice), instead of the released suffixes
    Raises InputError for what is not a conversation, CheckpointError when a folder's template
    fails.
    """
    plain = [_Plain.of(message, i, markers) for i, message in enumerate(messages)]
    if think is not None:
        _switch(plain, check_think(think), meta_prompt)
    if isinstance(template, FolderTemplate):
        return _render_folder(plain, template, add_generation_prompt, tools)
    if template not in ("hf", "vllm"):
        raise InputError(f"unknown template {strict.describe(template)}; use hf or vllm")
    if tools:
        _define(plain, tools)
    if plain and plain[0].role != "system":
        plain.insert(0, _Plain("system", ""))
    bos = BOS if template == "vllm" else ""
    text = [
        f"{bos if m.role == 'system' else ''}{markers.turn_start}{TITLES[m.role]}"
        f"{m.whole}{markers.turn_end}"
        for m in plain
        if m.role in TITLES
    ]
    if add_generation_prompt:
        text.append(f"{markers.turn_start}{TITLES['assistant']}")
    return "".join(text)


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: Template | None = None,
    add_generation_prompt: bool = True,
    think: Think | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    meta_prompt: bool = False,
    markers: Markers = PUBLISHED,
) -> list[int]:
    """The prompt's token ids, with exactly one BOS: the first id, whatever the template writes.

    template: None is the folder's own, or "hf" where it has none
    Arguments and errors otherwise as for `render`.
    """
    template = template or FolderTemplate.of(tokenizer) or "hf"
    text = render(
        messages,
        template,
        add_generation_prompt,
        think,
        tools,
        meta_prompt=meta_prompt,
        markers=markers,
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_id
    return ids if bos is None else [bos, *(id for id in ids if id != bos)]


def thinking_mode(messages: Sequence[Message]) -> Think | None:
    """How the conversation itself asks for its last user message to be answered, None if it does
    not say: by a suffix of that message, or by a META_PROMPT line in it or in the system message.
    """
    plain = [_Plain.of(message, i, PUBLISHED) for i, message in enumerate(messages)]
    users = [m.content for m in plain if m.role == "user"]
    last = users[-1] if users else ""
    for mode, suffix in SUFFIX.items():
        if last.rstrip().endswith(suffix.strip()):
            return check_think(mode)
    for text in [last, *(m.content for m in plain[:1] if m.role == "system")]:
        for mode, line in META.items():
            if re.search(rf"^{re.escape(line)}\b", text, re.MULTILINE):
                return check_think(mode)
    return None


def check_think(think: str) -> Think:
    """The thinking mode of that name. Raises InputError."""
    if think not in ("fast", "slow", "auto"):
        raise InputError(f"unknown thinking mode {strict.describe(think)}; use fast, slow or auto")
    return think


@dataclasses.dataclass
class _Plain:
    """A message as text; `calls` is what follows the content in it."""

    role: str
    content: str
    calls: str = ""
    raw: Message = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> str:
        return self.content + self.calls

    @classmethod
    def of(cls, message: Message, index: int, markers: Markers) -> "_Plain":
        where = f"message {index + 1}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} must be an object with a role and a content")
        content = _text(message.get("content"), where)
        thinking = message.get("thinking", message.get("reasoning_content"))
        if thinking is not None and message["role"] == "assistant":
            thinking = _text(thinking, f"{where}: thinking")
            content = f"{markers.think_start}{thinking}{markers.think_end}{content}"
        calls = message.get("tool_calls") or []
        written = ""
        if calls and message["role"] == "assistant":
            payload = json.dumps(_calls(calls, where), ensure_ascii=False)
            written = f"{markers.tool_start}{payload}{markers.tool_end}"
        return cls(message["role"], content, written, message)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = [part for part in content if isinstance(part, Mapping)]
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise InputError(f"{where}: content must be text (these models read nothing else)")


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as the models write them: a list of names and arguments."""
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where}: tool_calls must be a list")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a tool call needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                name = strict.shorten(function["name"])
                raise InputError(f"{where}: the arguments of {name} are not JSON") from None
        found.append({"name": function["name"], "arguments": arguments})
    return found


def _switch(plain: list[_Plain], think: Think, meta_prompt: bool) -> None:
    """Marks the last user message with the thinking mode."""
    users = [message for message in plain if message.role == "user"]
    if not users:
        return
    last = users[-1]
    if meta_prompt:
        last.content = f"{META[think]}\n{last.content}" if think in META else last.content
    elif (suffix := SUFFIX.get(think, "")) and not last.content.endswith(suffix):
        last.content += suffix


def _define(plain: list[_Plain], tools: Sequence[Mapping[str, Any]]) -> None:
    """Puts the definitions at the end of the system message."""
    lines = [TOOLS]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("a tool needs a function with a name")
        lines.append(json.dumps(function, ensure_ascii=False))
    if not plain or plain[0].role != "system":
        plain.insert(0, _Plain("system", ""))
    plain[0].content += ("\n\n" if plain[0].content else "") + "\n".join(lines)


def _render_folder(
    plain: list[_Plain],
    template: FolderTemplate,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    """A folder's own template; what it does not know of goes into the contents."""
    from pangu_jax.text import jinja

    if tools and "tools" not in template.source:
        _define(plain, tools)
    knows_calls = "tool_calls" in template.source
    messages = [
        {**m.raw, "role": m.role, "content": m.content if knows_calls else m.whole} for m in plain
    ]
    return jinja.render(
        template.source,
        {
            "messages": messages,
            "tools": [*tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": template.bos,
            "eos_token": template.eos,
        },
    )
