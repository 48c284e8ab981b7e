"""The door: folders and models, text and ids, all at once and as they come."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import infer
import pangu_jax
from infer import LLM, Completion, Sampling
from pangu_jax.errors import ConfigError, InputError
from tests.infer.test_conversation import write_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32", slots=3, context=48) as made:
        yield made


PROMPTS = ["12+34=", [1, 5, 9], "Why?"]
ASKED = Sampling(max_new_tokens=9, ignore_eos=True)


@pytest.mark.slow
def test_generate_is_generate(llm: LLM, folder: Path) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    model = pangu_jax.load(folder, "float32")
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in PROMPTS]
    asked = [ASKED, Sampling(5, n=2, temperature=1.0, seed=4), ASKED]
    heard: list[Completion] = []
    got = llm.generate(PROMPTS, asked, progress=heard.append)
    wanted = infer.generate(model, ids, asked, tokenizer=tokenizer)
    assert [(a.token_ids, a.text) for a in got] == [(a.token_ids, a.text) for a in wanted]
    assert heard == got


def test_streams(llm: LLM) -> None:
    async def listen(prompt: str) -> tuple[str, Completion]:
        parts, completion = [], None
        async for each in llm.stream(prompt, ASKED):
            if isinstance(each, Completion):
                completion = each
            else:
                parts.append(each)
        assert completion is not None
        return "".join(parts), completion

    async def several() -> list[tuple[str, Completion]]:
        return await asyncio.gather(*(listen(text) for text in ("a", "b", "12", "Why?")))

    found = asyncio.run(several())
    wanted = llm.generate(["a", "b", "12", "Why?"], ASKED)
    assert [completion.token_ids for _, completion in found] == [c.token_ids for c in wanted]
    assert [text for text, _ in found] == [c.text for c in wanted]


def test_who_stops_listening_cancels(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.stream("a", Sampling(max_new_tokens=40, ignore_eos=True))
        await anext(stream)
        await stream.aclose()

    before = llm.engine.stats.tokens
    asyncio.run(leave())
    llm.generate([[1]], Sampling(max_new_tokens=1))
    stats = llm.engine.stats
    assert stats.running == 0
    assert stats.tokens - before < 40


def test_a_listener_that_fails_stops_nobody_else(llm: LLM) -> None:
    def told(text: str, end: object) -> None:
        raise ValueError("not listening")

    (ticket,) = llm.submit("a", Sampling(max_new_tokens=30, ignore_eos=True), told=told)
    assert ticket.result().finish_reason == "cancelled"
    assert len(llm.generate([[1]], ASKED)[0].token_ids) == 9


def test_refusals(llm: LLM, folder: Path) -> None:
    before = llm.engine.stats.tokens
    with pytest.raises(InputError, match="49 tokens does not fit"):
        llm.generate([[1, 2], [1] * 49])
    with pytest.raises(InputError, match="2 samplings for 1 prompts"):
        llm.generate([[1]], [ASKED, ASKED])
    with pytest.raises(InputError, match="warm_up comes before"):
        llm.warm_up()
    with pytest.raises(ConfigError, match=r"no room for pages: one takes .* bytes"):
        LLM(folder, memory=10)
    with (
        LLM(pangu_jax.load(folder), slots=1, context=8) as bare,
        pytest.raises(InputError, match="needs a tokenizer"),
    ):
        bare.generate(["text"])
    assert llm.engine.stats.tokens == before
