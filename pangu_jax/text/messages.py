"""Messages of a conversation, checked: what every template writes is made of these."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pangu_jax import strict
from pangu_jax.errors import InputError
from pangu_jax.text.markers import Markers

Message = Mapping[str, Any]

# Own choice: how tools are defined is not on record, only how they are called.
TOOLS = (
    "你可以使用以下工具，每行一个。需要时以 JSON 列表调用："
    '[{"name": "工具名", "arguments": {"参数名": "值"}}]'
)


@dataclasses.dataclass
class Plain:
    """One message, its parts apart.

    calls: [{"name": ..., "arguments": {...}}]
    names: "name" and "tool_call_id", where a template wants them
    """

    role: str
    content: str
    thinking: str | None = None
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def text(self, markers: Markers, thinking: bool = True, calls: bool = True) -> str:
        """The content, with the thinking and the calls written into it as the models do."""
        written = self.content
        if thinking and self.thinking is not None:
            written = f"{markers.think_start}{self.thinking}{markers.think_end}{written}"
        if calls and self.calls:
            payload = json.dumps(self.calls, ensure_ascii=False)
            written += f"{markers.tool_start}{payload}{markers.tool_end}"
        return written


def read(messages: Any) -> list[Plain]:
    """The messages of a conversation. Raises InputError, naming the message by its number."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError("the messages must be a list")
    return [_plain(message, f"message {i}") for i, message in enumerate(messages, 1)]


def definitions(tools: Any) -> list[str]:
    """The JSON of every tool: its schema, or the function of OpenAI's form. Raises InputError."""
    if tools is not None and not isinstance(tools, list | tuple):
        raise InputError("the tools must be a list")
    lines = []
    for tool in tools or ():
        name, function = _function(tool, "a tool")
        lines.append(_json(function, f"a tool: {name}"))
    return lines


def define(plain: list[Plain], lines: list[str]) -> None:
    """Puts the definitions at the end of the system message, which is added where there is none."""
    if not plain or plain[0].role != "system":
        plain.insert(0, Plain("system", ""))
    plain[0].content += ("\n\n" if plain[0].content else "") + "\n".join([TOOLS, *lines])


def _plain(message: Any, where: str) -> Plain:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"{where} must be an object with a role")
    plain = Plain(message["role"], _text(message.get("content"), where))
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            plain.names[key] = message[key]
    if plain.role == "assistant":
        thoughts = (message.get("thinking"), message.get("reasoning_content"))
        for thinking in thoughts[::-1]:
            if thinking is not None:
                plain.thinking = _text(thinking, f"{where}: thinking")
        plain.calls = _calls(message.get("tool_calls"), where)
    return plain


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
    """Tool calls as the models write them: names and arguments, not strings of JSON in JSON."""
    if calls is not None and not isinstance(calls, list | tuple):
        raise InputError(f"{where}: tool_calls must be a list")
    found = []
    for call in calls or ():
        name, function = _function(call, f"{where}: a tool call")
        what = f"{where}: the arguments of {name}"
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form; some clients send "" for none
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise InputError(f"{what} are not JSON") from None
        if not isinstance(arguments, Mapping):
            raise InputError(f"{what} must be an object")
        _json(arguments, what)
        found.append({"name": function["name"], "arguments": arguments})
    return found


def _function(value: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    """A function, itself or wrapped as OpenAI does, and its name for a complaint."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{what} needs a function with a name")
    return strict.shorten(function["name"]), function


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{what} cannot be written as JSON") from None
