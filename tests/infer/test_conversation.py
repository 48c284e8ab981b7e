"""A conversation without a terminal: what an answer tells, what is remembered and forgotten."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infer
import pangu_jax
from infer import generation, inputs
from infer.conversation import Answer, Conversation, Forgotten
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text import chat, tokenizer
from pangu_jax.text.parse import Restart, Text, ToolCall
from pangu_jax.text.tokenizer import Tokenizer
from tests import folders

RAW = {**folders.DENSE, "vocab_size": 1024, "eos_token_id": 15}
THOUGHT, SPOKEN, ESCAPE = "Let me think.", "The answer is", "\x1b[31m"
SCRIPT = (
    "[unused16]", "▁", "L", "et", "▁m", "e", "▁th", "ink", ".", "[unused17]",
    "▁The", "▁answer", "▁is", "<0x1B>", "[", "3", "1", "m", "[unused10]",
)  # fmt: skip


def write_random(folder: Path, template: bool = False, **raw: Any) -> Path:
    """A folder with random weights and the nano tokenizer, its chat template only if asked for."""
    folders.write(folder, {**RAW, **raw})
    return _with_tokenizer(folder, template)


def write_scripted(folder: Path, template: bool = False, **raw: Any) -> Path:
    """A folder whose greedy answer to every message is SCRIPT: every token calls for the next.

    Without token 15, the end, the answer's tokens go round and round.
    """
    shape = {**RAW, "hidden_size": 64, "max_position_embeddings": 16384, **raw}
    tensors = folders.random_tensors(shape)
    for name in tensors:
        if "o_proj" in name or "down_proj" in name or name == "lm_head.weight":
            tensors[name] = np.zeros_like(tensors[name])
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
    _with_tokenizer(folder, template)
    known = Tokenizer.load(folder)
    ids = [known.id(text) for text in ("：", *SCRIPT)]
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    for before, after in itertools.pairwise(ids):
        head[after] += embed[before]
    head[known.id("▁The")] += embed[known.id("m")] / 2
    folders.write(folder, shape, tensors)
    return folder


def _with_tokenizer(folder: Path, template: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.write_preset("nano", folder)
    if not template:  # rendering one takes a process
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["chat_template"]
        file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Pangu:
    return pangu_jax.load(folder)


class Playback:
    """Takes the place of the model: says what it was given, remembers what it was asked."""

    def __init__(self, words: Tokenizer) -> None:
        self.words = words
        self.answers: list[list[str | Exception]] = []
        self.prompts: list[str] = []
        self.between: Callable[[int], None] = lambda piece: None

    def says(self, *pieces: str | Exception) -> None:
        """The next answer, in these pieces."""
        self.answers.append(list(pieces))

    def stream(
        self, model: Any, prompt: list[int], sampling: Any, *, tokenizer: Any, told: Any
    ) -> Iterator[str | Completion]:
        """As `infer.stream`."""
        inputs.check_prompt(model.config, prompt)
        self.prompts.append(self.words.decode(prompt).removeprefix("<s>"))
        pieces = self.answers.pop(0)
        for i, piece in enumerate(pieces):
            if isinstance(piece, Exception):
                raise piece
            told(i + 1)
            self.between(i)
            yield piece
        yield Completion([15] * len(pieces), [0.0] * len(pieces), "stop", "".join(map(str, pieces)))


@pytest.fixture
def playback(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Playback:
    found = Playback(words)
    monkeypatch.setattr(generation, "stream", found.stream)
    return found


@pytest.fixture
def talk(words: Tokenizer) -> Conversation:
    return conversation(words)


def conversation(words: Tokenizer, positions: int = 4096, **settings: Any) -> Conversation:
    """One whose model is only a shape."""
    config = pangu_jax.ModelConfig(
        vocab_size=1024, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        rope_theta=1e4, max_positions=positions, intermediate_size=8,
    )  # fmt: skip
    return Conversation(pangu_jax.abstract(config), words, Sampling(), **settings)


def ask(talk: Conversation, text: str) -> tuple[list[Any], Answer]:
    """The events and the answer."""
    *events, answer = talk.ask(text)
    assert isinstance(answer, Answer)
    return events, answer


def said(events: list[Any], part: str) -> str:
    return "".join(each.text for each in events if isinstance(each, Text) and each.part == part)


def prompt(*turns: str) -> str:
    """The published template, written out."""
    titles = {"系": "系统：", "用": "用户：", "助": "助手："}
    marked = [f"[unused9]{titles[turn[0]]}{turn[2:]}" for turn in turns]
    return "[unused10]".join([*marked, "[unused9]助手："])


# --- an answer


def test_an_answer_comes_in_events_then_whole(playback: Playback, talk: Conversation) -> None:
    playback.says("[unu", "sed16]Hm", "m. [unused17]", "Four", "teen.", " [unused10]")
    events, answer = ask(talk, "7+7?")
    assert said(events, "thinking") == "Hmm."
    assert said(events, "answer") == "Fourteen."
    assert not [each for each in events if isinstance(each, Restart)]
    assert (answer.reply.thinking, answer.reply.answer) == ("Hmm.", "Fourteen.")
    assert not answer.stopped
    assert not answer.reply.truncated
    assert answer.finish_reason == "stop"
    assert answer.tokens == 6
    assert answer.rate > 0
    assert answer.prompt_tokens == len(chat.encode(talk.tokenizer, [user("7+7?")]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_answer_comes_as_it_is_made(playback: Playback, talk: Conversation) -> None:
    playback.says("One, ", "two, ", "three.")
    events = talk.ask("Count.")
    made: list[int] = []
    playback.between = made.append
    assert next(events) == Text("answer", "One,")
    assert made == [0]
    assert next(events) == Text("answer", " two,")
    assert made == [0, 1]


def test_one_token_has_no_rate(playback: Playback, talk: Conversation) -> None:
    playback.says("[unused10]")
    _, answer = ask(talk, "Say nothing.")
    assert (answer.tokens, answer.rate, answer.reply.answer) == (1, 0.0, "")


def test_a_tool_call_is_an_event(playback: Playback, talk: Conversation) -> None:
    playback.says('I look. [unused11][{"name": "f", "arguments": {"x": 1}}]', "[unused12]")
    events, answer = ask(talk, "Look.")
    assert [each for each in events if isinstance(each, ToolCall)] == [ToolCall("f", {"x": 1})]
    assert answer.reply.tool_calls == (ToolCall("f", {"x": 1}),)


def test_settings_and_tokenizer_reach_the_model(words: Tokenizer, monkeypatch) -> None:
    seen: list[Any] = []

    def stream(model: Any, prompt: Any, sampling: Any, *, tokenizer: Any, told: Any):
        seen.extend([sampling, tokenizer])
        yield Completion([15], [0.0], "length", "")

    monkeypatch.setattr(generation, "stream", stream)
    talk = conversation(words)
    talk.sampling = Sampling(temperature=0.5, seed=3)
    _, answer = ask(talk, "Hi")
    assert seen == [talk.sampling, words]
    assert answer.finish_reason == "length"


# --- what is remembered


def test_turns_add_up_and_thoughts_are_folded(playback: Playback, talk: Conversation) -> None:
    playback.says("[unused16]Long drafts.[unused17]Hello![unused10]")
    playback.says("Fine.")
    playback.says("Bye.")
    ask(talk, "Hi")
    ask(talk, "How are you?")
    ask(talk, "Bye")
    first = ("系：", "用：Hi", "助：[unused16][unused17]Hello!")
    assert playback.prompts[0] == prompt("系：", "用：Hi")
    assert playback.prompts[1] == prompt(*first, "用：How are you?")
    assert playback.prompts[2] == prompt(*first, "用：How are you?", "助：Fine.", "用：Bye")


def test_reset_forgets_what_was_said_and_nothing_else(playback: Playback, words) -> None:
    talk = conversation(words, think="fast", system="Be brief.")
    playback.says("Hello!")
    playback.says("Hello!")
    ask(talk, "Hi")
    talk.reset()
    ask(talk, "Hi")
    assert playback.prompts == [prompt("系：Be brief.", "用：Hi /no_think")] * 2


def test_stopped_in_the_answer(playback: Playback, talk: Conversation) -> None:
    playback.says("[unused16]Hm.[unused17]One, ", "two, ", "three", "four")
    playback.between = lambda piece: talk.stop() if piece == 1 else None
    events, answer = ask(talk, "Count.")
    assert answer.stopped
    assert answer.finish_reason == "stopped"
    assert said(events, "answer") == answer.reply.answer == "One, two,"
    assert answer.tokens == 2
    assert not answer.reply.truncated
    playback.between = lambda piece: None
    playback.says("Three.")
    _, answer = ask(talk, "Go on.")
    assert not answer.stopped
    shown = "助：[unused16][unused17]One, two,"
    assert playback.prompts[1] == prompt("系：", "用：Count.", shown, "用：Go on.")


def test_stopped_in_the_thought_leaves_a_conversation_that_goes_on(
    playback: Playback, talk: Conversation
) -> None:
    playback.says("[unused16]Hm", "m", "m")
    playback.between = lambda piece: talk.stop() if piece == 1 else None
    events, answer = ask(talk, "Think.")
    assert answer.stopped
    assert answer.reply.truncated
    assert said(events, "thinking") == answer.reply.thinking == "Hmm"
    assert answer.reply.answer == ""
    playback.between = lambda piece: None
    playback.says("Hello!")
    ask(talk, "Hi")
    assert "Hmm" not in playback.prompts[1]
    assert playback.prompts[1].endswith("[unused9]用户：Hi[unused10][unused9]助手：")


def test_a_stop_between_answers_is_no_stop(playback: Playback, talk: Conversation) -> None:
    playback.says("One, ", "two.")
    talk.stop()
    _, answer = ask(talk, "Count.")
    assert (answer.reply.answer, answer.stopped) == ("One, two.", False)


def test_an_answer_that_fails_leaves_no_trace(playback: Playback, talk: Conversation) -> None:
    playback.says("Hello!")
    playback.says("I am", InputError("no"))
    playback.says("Here.")
    ask(talk, "Hi")
    with pytest.raises(InputError):
        ask(talk, "Who are you?")
    ask(talk, "Where are you?")
    assert playback.prompts[2] == prompt("系：", "用：Hi", "助：Hello!", "用：Where are you?")


# --- what no longer fits


def test_the_oldest_exchanges_are_forgotten(playback: Playback, words: Tokenizer) -> None:
    talk = conversation(words, positions=160, system="Be brief.")
    forgotten, turns = 0, [f"Question {i}" for i in range(12)]
    for text in turns:
        playback.says("Answer.")
        events, answer = ask(talk, text)
        gone = [each for each in events if isinstance(each, Forgotten)]
        forgotten += sum(each.messages for each in gone)
        assert answer.prompt_tokens <= 160 - 160 // 4
        assert events.index(Text("answer", "Answer.")) == len(gone)
    assert forgotten > 0
    kept = [turn for text in turns[forgotten // 2 : -1] for turn in (f"用：{text}", "助：Answer.")]
    assert playback.prompts[-1] == prompt("系：Be brief.", *kept, "用：Question 11")


def test_nothing_is_forgotten_while_it_fits(playback: Playback, words: Tokenizer) -> None:
    talk = conversation(words, positions=4096)
    for i in range(8):
        playback.says("Answer.")
        events, _ = ask(talk, f"Question {i}")
        assert not [each for each in events if isinstance(each, Forgotten)]
    assert playback.prompts[-1].count("Answer.") == 7


def test_a_message_that_can_never_fit_costs_nothing(playback: Playback, words: Tokenizer) -> None:
    talk = conversation(words, positions=100)
    playback.says("Hello!")
    playback.says("Yes.")
    ask(talk, "Hi")
    with pytest.raises(InputError, match="longer than the model's 100 positions"):
        ask(talk, "long " * 200)
    ask(talk, "Still there?")
    assert playback.prompts[-1] == prompt("系：", "用：Hi", "助：Hello!", "用：Still there?")


def test_a_message_that_fits_without_room_is_answered(playback: Playback, words) -> None:
    talk = conversation(words, positions=100)
    text = "a b c d e f g h i j k l m n o p q r s t u v " * 3
    assert 75 < len(chat.encode(words, [user(text)])) <= 100
    playback.says("Long.")
    _, answer = ask(talk, text)
    assert answer.reply.answer == "Long."


# --- thinking switches and the system message


SWITCHES = [(None, ""), ("slow", ""), ("fast", " /no_think"), ("auto", " /auto_think")]


@pytest.mark.parametrize(("think", "written"), SWITCHES)
def test_think_marks_the_last_message_alone(playback, words, think, written: str) -> None:
    talk = conversation(words, think=think)
    playback.says("[unused16][unused17]A.")
    playback.says("B.")
    ask(talk, "Hi")
    ask(talk, "Ho")
    assert playback.prompts[0] == prompt("系：", f"用：Hi{written}")
    assert playback.prompts[1] == prompt("系：", "用：Hi", "助：A.", f"用：Ho{written}")


@pytest.mark.parametrize("typed", ["Hi /no_think", "Hi /auto_think", "META_PROMPT: system 1\nHi"])
@pytest.mark.parametrize("think", ["slow", "fast", "auto", None])
def test_a_switch_in_the_message_wins(playback, words, think, typed: str) -> None:
    talk = conversation(words, think=think)
    playback.says("Unmarked")
    _, answer = ask(talk, typed)
    assert playback.prompts == [prompt("系：", f"用：{typed}")]
    assert answer.reply.answer == "Unmarked"


def test_unmarked_text_is_a_thought_when_slow_was_asked_for(playback, words) -> None:
    for text, talk in [
        ("Hi", conversation(words, think="slow")),
        ("META_PROMPT: system 2\nHi", conversation(words, think="fast")),
    ]:
        playback.says("Unmarked")
        _, answer = ask(talk, text)
        assert (answer.reply.thinking, answer.reply.answer) == ("Unmarked", "")
        assert answer.reply.truncated


def test_a_thinking_mode_may_change_between_messages(playback, talk: Conversation) -> None:
    playback.says("A.")
    playback.says("B.")
    ask(talk, "Hi")
    talk.think, talk.system = "fast", "Be brief."
    ask(talk, "Ho")
    expected = prompt("系：Be brief.", "用：Hi", "助：A.", "用：Ho /no_think")
    assert playback.prompts[1] == expected


# --- with a model


def test_it_is_what_generate_says(model: Pangu, words: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=5)
    talk = Conversation(model, words, sampling, "slow")
    for text in ("Hi", "And then?"):
        ids = chat.encode(words, [*talk.messages, user(text)], think="slow")
        (whole,) = infer.generate(model, [ids], sampling, tokenizer=words)
        events, answer = ask(talk, text)
        assert answer.prompt_tokens == len(ids)
        assert answer.tokens == len(whole.token_ids)
        assert answer.finish_reason == whole.finish_reason
        parsed = infer.output.as_json(whole, words, chat=True, think="slow")
        assert dataclasses.asdict(answer.reply) == {
            name: parsed[name] for name in dataclasses.asdict(answer.reply)
        }
        if not any(isinstance(each, Restart) for each in events):
            assert said(events, "thinking") == answer.reply.thinking
            assert said(events, "answer") == answer.reply.answer


def test_the_scripted_folder_says_its_script(tmp_path: Path) -> None:
    folder = write_scripted(tmp_path / "scripted")
    words = Tokenizer.load(folder)
    talk = Conversation(pangu_jax.load(folder), words, Sampling(max_new_tokens=64))
    events, answer = ask(talk, "Hi")
    assert answer.reply.thinking == THOUGHT
    assert answer.reply.answer == SPOKEN + ESCAPE
    assert answer.finish_reason == "stop"
    assert answer.tokens == len(SCRIPT)
    assert [type(each) for each in events].count(Restart) == 0
