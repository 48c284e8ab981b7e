"""The `chat` command: a conversation in the terminal, or through a pipe."""

import os
import sys
from pathlib import Path

import jax

from infer import door, inputs, loading
from infer.commands import Chat
from infer.conversation import Answer, Conversation
from infer.terminal import Pipe, Screen
from pangu_jax import strict
from pangu_jax.checkpoint import hf
from pangu_jax.errors import InputError, PanguError
from pangu_jax.text.chat import check_think

HELP = """\
/think fast|slow|auto   how to answer from now on; /think default asks for nothing, /think tells
/system TEXT            set the system message; /system - removes it, /system alone tells
/thought                show the last answer's thinking
/reset                  forget the conversation
/quit                   leave (so do Ctrl-D and Ctrl-C)
Enter sends; Alt-Enter, or a backslash before Enter, starts a new line.
Ctrl-C stops an answer. A space before / makes it a message like any other."""
COMMANDS = ("/think", "/system", "/thought", "/reset", "/help", "/quit", "/exit")


def run(command: Chat) -> int:
    """Talks until the user leaves or stdin ends."""
    folder = Path(command.model)
    config, _ = hf.read_config(folder)
    tokenizer = loading.tokenizer(folder, config)
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer.model there; a chat needs one")
    if sys.stdin is None or sys.stdout is None:
        raise InputError("a chat needs stdin and stdout; one of them is closed")
    sampling = loading.settings(command, folder, max_new_tokens=config.max_positions)
    inputs.check_sampling(sampling, config, tokenizer)
    seen = sys.stdin.isatty() and sys.stdout.isatty()
    model, seconds = loading.model(command)
    conversation = Conversation(model, tokenizer, sampling, command.think, command.system)
    view = Screen(_history()) if seen else Pipe()
    view.welcome(
        [
            f"{folder.resolve().name}: {config.num_parameters / 1e6:,.1f} M parameters, "
            f"{model.dtype}, on {jax.devices()[0].device_kind}; loaded in {seconds:.1f} s",
            "Enter sends, Ctrl-C stops an answer, Ctrl-D leaves, /help lists more.",
        ]
    )
    try:
        talk(conversation, view)
    except KeyboardInterrupt:
        view.abandon()
    view.farewell()
    return 0


def talk(conversation: Conversation, view: Screen | Pipe) -> None:
    """Messages in, answers out, until there are no more messages."""
    last: Answer | None = None
    while (text := view.read()) is not None:
        if not text.strip():
            continue
        try:
            if text.startswith("/") and text.split()[0] not in ("/no_think", "/auto_think"):
                if text.split()[0] in ("/quit", "/exit"):
                    return
                view.tell(_obey(text.strip(), conversation, last))
            else:
                last = _answer(text, conversation, view)
        except PanguError as error:
            view.tell(f"error: {error}")


def _answer(text: str, conversation: Conversation, view: Screen | Pipe) -> Answer:
    view.begin()
    try:
        with door.interrupts(conversation.stop):
            for event in conversation.ask(text):
                if isinstance(event, Answer):
                    view.end(event)
                    return event
                view.show(event)
    except BaseException:
        view.abandon()
        raise
    raise AssertionError("an answer always ends")


def _obey(text: str, conversation: Conversation, last: Answer | None) -> str:
    """What a /command has to say. Raises InputError."""
    name, rest = [*text.split(maxsplit=1), ""][:2]
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "(forgotten)"
    if name == "/thought":
        thought = last.reply.thinking if last else ""
        return thought or "(no thinking to show)"
    if name == "/think":
        if rest:
            conversation.think = None if rest == "default" else check_think(rest)
        return f"(thinking: {conversation.think or 'the model decides, nothing is asked for'})"
    if name == "/system":
        if rest:
            conversation.system = None if rest == "-" else rest
        return f"(system message: {conversation.system or 'none'})"
    raise InputError(
        f"unknown command {strict.shorten(name)}{strict.suggest(name, COMMANDS)}; see /help"
    )


def _history() -> Path | None:
    """The file of what was typed before, its owner's alone; None where there is no home."""
    try:
        file = Path.home() / ".local" / "state" / "pangu_jax" / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)
    except (OSError, RuntimeError):
        return None
    return file if os.access(file, os.W_OK) else None
