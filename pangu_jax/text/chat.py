"""Messages to prompt: the chat template, the thinking switches, and exactly one BOS.

A message is a dict: "role" (system, user, assistant, tool or function) and "content", a string, a
list of {"type": "text", "text": ...} or None. An assistant's may also have "thinking" (or
"reasoning_content") and "tool_calls". Special tokens that a text spells out are special tokens, as
with the published template: escape what comes from people you do not trust.

The published template ships in two forms that differ in `<s>`: "hf" leaves BOS to the tokenizer,
"vllm" writes it before every system turn. `encode` gives the same ids for both.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pangu_jax import strict
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text import messages as conversation
from pangu_jax.text.markers import PUBLISHED, Markers, Think
from pangu_jax.text.messages import Message, Plain
from pangu_jax.text.tokenizer import Tokenizer

BOS = "<s>"
TITLES = {
    "system": "系统：",
    "user": "用户：",
    "assistant": "助手：",
    "tool": "工具：",
    "function": "方法：",
}
SUFFIX: Mapping[Think, str] = {"fast": " /no_think", "auto": " /auto_think"}
META: Mapping[Think, str] = {"fast": "META_PROMPT: system 1", "slow": "META_PROMPT: system 2"}


@dataclasses.dataclass(frozen=True)
class FolderTemplate:
    """The Jinja template of a model folder, which is run in a sandbox."""

    source: str
    bos: str = BOS
    eos: str = PUBLISHED.turn_end

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FolderTemplate | None":
        """The tokenizer's own template, if it has one that `render` does not know anyway."""
        if tokenizer.chat_template in (None, _written_out()):
            return None
        bos, eos = (
            "" if id is None else tokenizer.token(id) for id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(tokenizer.chat_template, bos, eos)

    def knows(self, name: str) -> bool:
        """Whether the template speaks of a variable or field of that name."""
        code = re.sub(r"\{#.*?#\}", "", self.source, flags=re.DOTALL)
        return re.search(rf"\b{name}\b", code) is not None


Template = Literal["hf", "vllm"] | FolderTemplate


@functools.cache
def _written_out() -> str:
    """The published template in Jinja, as the tokenizers of this project carry it: a template is a
    program in a process of its own, and this one need not be run.
    """
    file = configs_folder() / "tokenizers" / "chat_template.jinja"
    return strict.read_text(file)


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
        "slow" and None leave it as it is (slow is what the published 7B and 72B do by default). A
        switch that the message has already wins
    tools: definitions, as JSON schemas or OpenAI's {"type": "function", "function": ...}
    meta_prompt: switch by the paper's `META_PROMPT: system 1` (fast) and `2` (slow), on a line
        before the user's text (own choice), instead of the released suffixes
    Raises InputError for what is not a conversation, CheckpointError when a folder's template
    fails.
    """
    plain = conversation.read(messages)
    lines = conversation.definitions(tools)
    if think is not None:
        _switch(plain, check_think(think), meta_prompt)
    if isinstance(template, FolderTemplate):
        if lines and not template.knows("tools"):
            conversation.define(plain, lines)
        return _render_folder(plain, template, add_generation_prompt, tools, markers)
    if template not in ("hf", "vllm"):
        raise InputError(f"unknown template {strict.describe(template)}; use hf or vllm")
    if lines:
        conversation.define(plain, lines)
    if plain and plain[0].role != "system":
        plain.insert(0, Plain("system", ""))
    bos = BOS if template == "vllm" else ""
    text = [
        f"{bos if m.role == 'system' else ''}{markers.turn_start}{TITLES[m.role]}"
        f"{m.text(markers)}{markers.turn_end}"
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
    begun: str = "",
) -> list[int]:
    """The prompt's token ids, with exactly one BOS: the first id, whatever the template writes.

    Every other BOS is dropped, one that a message spells out, too.

    template: None is the folder's own, or "hf" where it has none
    begun: what of the answer is there already, after the prompt
    Arguments and errors otherwise as for `render`.
    """
    if template is None:
        template = FolderTemplate.of(tokenizer) or "hf"
    text = render(
        messages,
        "hf" if template == "vllm" else template,
        add_generation_prompt,
        think,
        tools,
        meta_prompt=meta_prompt,
        markers=markers,
    )
    ids = tokenizer.encode(text + begun, add_special_tokens=False)
    bos = tokenizer.bos_id
    return ids if bos is None else [bos, *(id for id in ids if id != bos)]


def thinking_mode(messages: Sequence[Message]) -> Think | None:
    """How the conversation itself asks for its last user message to be answered, None if it does
    not say: by a suffix of that message, or by a META_PROMPT line in it or in the system message.
    """
    plain = conversation.read(messages)
    users = [m.content for m in plain if m.role == "user"]
    if users and (mode := _said(users[-1])):
        return mode
    return _said_meta(plain[0].content) if plain and plain[0].role == "system" else None


def check_think(think: str) -> Think:
    """The thinking mode of that name. Raises InputError."""
    for mode in get_args(Think):
        if think == mode:
            return mode
    raise InputError(f"unknown thinking mode {strict.describe(think)}; use fast, slow or auto")


def _said(text: str) -> Think | None:
    """The mode that a user's text asks for."""
    for mode, suffix in SUFFIX.items():
        if text.rstrip().endswith(suffix.strip()):
            return mode
    return _said_meta(text)


def _said_meta(text: str) -> Think | None:
    for mode, line in META.items():
        if re.search(rf"^{re.escape(line)}\b", text, re.MULTILINE):
            return mode
    return None


def _switch(plain: list[Plain], think: Think, meta_prompt: bool) -> None:
    """Marks the last user message with the thinking mode."""
    if meta_prompt and think not in META:
        raise InputError("the paper's META_PROMPT has no form for auto; use fast or slow")
    for message in reversed(plain):
        if message.role == "user":
            if _said(message.content) is None:
                before = f"{META[think]}\n" if meta_prompt else ""
                after = "" if meta_prompt else SUFFIX.get(think, "")
                message.content = f"{before}{message.content}{after}"
            return


def _render_folder(
    plain: list[Plain],
    template: FolderTemplate,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    markers: Markers,
) -> str:
    """A folder's own template; what it does not know of goes into the contents."""
    from pangu_jax.text import jinja

    thoughts, calls = template.knows("reasoning_content"), template.knows("tool_calls")
    said = []
    for m in plain:
        content = m.text(markers, thinking=not thoughts, calls=not calls)
        message: dict[str, Any] = {**m.names, "role": m.role, "content": content}
        if thoughts and m.thinking is not None:
            message["reasoning_content"] = m.thinking
        if calls and m.calls:
            message["tool_calls"] = [{"type": "function", "function": c} for c in m.calls]
        said.append(message)
    return jinja.render(
        template.source,
        {
            "messages": said,
            "tools": [*tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": template.bos,
            "eos_token": template.eos,
        },
    )
