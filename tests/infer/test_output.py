"""Text of completions: stop strings, end tokens and streams, whatever the split into pieces."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
import pangu_jax
from infer import decode, generation
from infer.output import Completion, Row, StopText
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig, configs_folder
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer

EOS = 15
FREE = Sampling(max_new_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
PROMPTS = [[1, 5, 9], [8], [3, 3, 3, 3], [700, 2]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(configs_folder() / "tokenizers" / "nano")


@pytest.fixture(scope="module")
def model() -> Pangu:
    """Random weights: any of the 1024 tokens may come next."""
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e4,
        max_positions=256,
        intermediate_size=32,
        eos_token_ids=(EOS,),
        dtype="float32",
    )
    return pangu_jax.init(config, jax.random.key(0))


def cut(text: str, stops: Sequence[str]) -> tuple[str, int | None]:
    """What comes before the stop string that is complete first (of those, the longest), and the
    length of text that completes it; by trying every length.
    """
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], end
    return text, None


# --- StopText alone -------------------------------------------------------------------------------

words = lambda longest: st.text("ab", min_size=1, max_size=longest)


@settings(deadline=None, max_examples=400)
@given(st.lists(words(4), max_size=3), st.text("abc", max_size=12), st.sets(st.integers(1, 11)))
def test_every_split_gives_the_same_text(stops: list[str], text: str, at: set[int]) -> None:
    ends = [0, *sorted(place for place in at if place < len(text)), len(text)]
    reader, shown = StopText(tuple(stops)), ""
    wanted, complete = cut(text, stops)
    for a, b in itertools.pairwise(ends):
        shown += reader.add(text[a:b])
        assert wanted.startswith(shown)
        if b < (len(text) + 1 if complete is None else complete):
            assert not reader.found
            held = text[len(shown) : b]  # no longer than it must be
            assert not held or any(stop.startswith(held) for stop in stops)
    assert reader.found == (complete is not None)
    shown += reader.finish()
    assert shown == reader.text == wanted
    assert reader.finish() == ""


@pytest.mark.parametrize("pieces", [["abcd"], ["abc", "d"], ["a", "b", "c", "d"], ["ab", "cd"]])
def test_of_overlapping_stops_the_first_to_be_complete_ends_the_text(pieces: list[str]) -> None:
    reader = StopText(("abcd", "bc"))
    assert "".join(map(reader.add, pieces)) == "a"
    assert reader.found


# --- one row, tokens by hand ----------------------------------------------------------------------


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Byte pieces: several tokens a character."""
    ids = [tokenizer.id(f"<0x{byte:02X}>") for byte in text.encode()]
    return [id for id in ids if id is not None]


def read(row: Row, ids: list[int], chunk: int) -> list[str]:
    """The texts of a row that takes tokens in chunks, padded with -1 as the device does."""
    texts = []
    for start in range(0, len(ids), chunk):
        if row.finish_reason is not None:
            break
        some = np.array([*ids[start : start + chunk], -1, -1], np.int32)
        texts.append(row.take(some, np.full(some.shape, -0.5, np.float32), None))
    return [*texts, row.end() if row.finish_reason is None else ""]


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_a_stop_string_of_bytes_across_tokens(tokenizer: Tokenizer, chunk: int) -> None:
    ids = spelt(tokenizer, "ab你好吗c")
    row = Row(Sampling(stop=("好吗", "?")), frozenset(), tokenizer)
    texts = read(row, ids, chunk)
    done = row.completion
    assert done.text == "".join(texts) == "ab你"
    assert done.token_ids == ids[:11]  # the byte that completed it, and nothing after
    assert len(done.logprobs) == 11
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_an_end_token_amid_a_character_and_a_half_stop(tokenizer: Tokenizer, chunk: int) -> None:
    """What was held back is text after all; the end token is none."""
    half = spelt(tokenizer, "a好")[:-1]
    for stop in ("b", "a\ufffd\ufffd!"):
        row = Row(Sampling(stop=(stop,)), frozenset({EOS}), tokenizer)
        texts = read(row, [*half, EOS, 700], chunk)
        assert row.completion.text == "".join(texts) == tokenizer.decode(half)
        assert row.completion.token_ids == [*half, EOS]
        assert row.completion.finish_reason == "stop"


def test_the_end_of_length_gives_what_was_held_back(tokenizer: Tokenizer) -> None:
    ids = spelt(tokenizer, "xab")
    row = Row(Sampling(stop=("abc",)), frozenset(), tokenizer)
    assert read(row, ids, 100) == ["x", "ab"]
    assert (row.completion.text, row.completion.finish_reason) == ("xab", "length")
    row = Row(Sampling(stop=("\ufffd",)), frozenset(), tokenizer)
    assert read(row, spelt(tokenizer, "x好")[:-1], 100) == ["x", ""]
    assert (row.completion.text, row.completion.finish_reason) == ("x", "stop")


def test_special_tokens_are_text_and_may_be_stopped_at(tokenizer: Tokenizer) -> None:
    think = tokenizer.id("[unused16]")
    assert think is not None
    ids = [*spelt(tokenizer, "a"), think, *spelt(tokenizer, "b")]
    row = Row(Sampling(), frozenset(), tokenizer)
    assert "".join(read(row, ids, 1)) == "a[unused16]b"
    row = Row(Sampling(stop=("[unused",)), frozenset(), tokenizer)
    assert "".join(read(row, ids, 1)) == "a"
    assert row.completion.token_ids == ids[:2]


def test_top_logprobs_are_each_rows_own_number_without_impossible_tokens() -> None:
    ids = np.array([[3, 1, 2], [5, 4, 0]])
    logprobs = np.array([[-0.1, -2.5, -np.inf], [-0.7, -0.7, -3.0]], np.float32)
    for most, wanted in (
        (1, [{3: -0.1}, {5: -0.7}]),
        (3, [{3: -0.1, 1: -2.5}, {5: -0.7, 4: -0.7, 0: -3.0}]),
    ):
        row = Row(Sampling(top_logprobs=most), frozenset(), None)
        row.take(np.array([3, 5]), np.array([-0.1, -0.7], np.float32), (ids, logprobs))
        row.end()
        top = row.completion.top_logprobs
        assert top is not None
        assert [list(each) for each in top] == [list(each) for each in wanted]
        for got, right in zip(top, wanted, strict=True):
            np.testing.assert_allclose([*got.values()], [*right.values()], rtol=1e-6)
    assert row.completion.text is None


# --- a whole model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(model: Pangu, tokenizer: Tokenizer) -> list[Completion]:
    return infer.generate(model, PROMPTS, FREE, tokenizer=tokenizer)


def stopped_at(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str]) -> tuple[list[int], str]:
    """The tokens up to the first that completes a stop string, and the text before it."""
    text, complete = cut(tokenizer.decode(ids), stops)
    if complete is None:
        return ids, text
    has = lambda size: any(stop in tokenizer.decode(ids[:size]) for stop in stops)
    return ids[: next(size for size in range(len(ids) + 1) if has(size))], text


def stops_in(completion: Completion, seed: int) -> tuple[str, ...]:
    """Strings of 1 to 12 characters out of a text (whole characters only)."""
    rng, text = np.random.default_rng(seed), completion.text or ""
    found = []
    for _ in range(2):
        at, size = int(rng.integers(len(text) // 3, len(text) - 12)), int(rng.integers(1, 13))
        found.append(text[at : at + size].strip("\ufffd") or "never there")
    return tuple(found)


def test_free_text_is_the_tokenizers(tokenizer: Tokenizer, free: list[Completion]) -> None:
    for each in free:
        assert each.text == tokenizer.decode(each.token_ids)
        assert (len(each.token_ids), each.finish_reason) == (60, "length")
    assert any("\ufffd" in (each.text or "") for each in free)


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_of_every_row(
    model: Pangu, tokenizer: Tokenizer, free: list[Completion], seed: int
) -> None:
    """In a batch of rows that stop here and there, or not; the same in a stream."""
    stops = [stops_in(each, seed) for each in free]
    stops[seed % 4] = ("never there",)
    asked = [Sampling(**{**vars(FREE), "stop": each}) for each in stops]
    got = infer.generate(model, PROMPTS, asked, tokenizer=tokenizer)
    for completion, without, stop in zip(got, free, stops, strict=True):
        ids, text = stopped_at(tokenizer, without.token_ids, stop)
        assert completion.token_ids == ids
        assert completion.text == text
        assert completion.logprobs == without.logprobs[: len(ids)]
        assert completion.finish_reason == ("length" if len(ids) == 60 else "stop")
    i = (seed + 1) % 4
    *texts, last = generation.stream(model, PROMPTS[i], asked[i], tokenizer=tokenizer)
    assert isinstance(last, Completion)
    assert (last.token_ids, last.text) == (got[i].token_ids, got[i].text)
    assert "".join(map(str, texts)) == got[i].text
    assert last.finish_reason == got[i].finish_reason


@pytest.mark.parametrize("steps", [1, 7, 32])
def test_a_stop_string_across_dispatches(
    model: Pangu, tokenizer: Tokenizer, free: list[Completion], steps: int
) -> None:
    """Whatever is shown at the end of a dispatch is no part of the stop string."""
    text = free[0].text or ""
    stop = text[len(text) // 4 : len(text) // 2]
    assert len(stop) > 20
    ids, wanted = stopped_at(tokenizer, free[0].token_ids, [stop])
    asked = [Sampling(**{**vars(FREE), "stop": (stop,)}), *[FREE] * 3]
    batch, shown = generation.Decoding(model, PROMPTS, asked, tokenizer), ["", ""]
    while batch.alive:
        texts = batch.step(steps)
        shown = [shown[i] + texts[i] for i in range(2)]
        assert wanted.startswith(shown[0])
    assert shown == [wanted, free[1].text]
    assert batch.rows[0].completion.token_ids == ids
    assert batch.rows[1].completion.token_ids == free[1].token_ids


def test_a_stop_string_compiles_nothing(
    model: Pangu, tokenizer: Tokenizer, free: list[Completion]
) -> None:
    """The rows that go on do so in the program that is there."""
    decode.decode.clear_cache()
    infer.generate(model, PROMPTS, FREE, tokenizer=tokenizer)
    programs = decode.decode._cache_size()
    early = tokenizer.decode(free[0].token_ids[2:5])
    asked = [Sampling(**{**vars(FREE), "stop": (early,)}), *[FREE] * 3]
    got = infer.generate(model, PROMPTS, asked, tokenizer=tokenizer)
    assert got[0].finish_reason == "stop"
    assert decode.decode._cache_size() == programs


def test_end_tokens_of_every_row(
    model: Pangu, tokenizer: Tokenizer, free: list[Completion]
) -> None:
    """Stop ids and the model's own: the token is among the ids, its text is not in the text."""
    own = [(free[0].token_ids[40],), (free[1].token_ids[3], free[1].token_ids[30]), (), (-5, 4000)]
    asked = [Sampling(**{**vars(FREE), "stop_token_ids": each}) for each in own]
    asked[2] = Sampling(**{**vars(FREE), "ignore_eos": False, "logit_bias": {EOS: 100.0}})
    got = infer.generate(model, PROMPTS, asked, tokenizer=tokenizer)
    for completion, without, ends in zip(got, free, own, strict=True):
        if ends == ():
            assert (completion.token_ids, completion.text) == ([EOS], "")
            continue
        places = [i for i, token in enumerate(without.token_ids) if token in ends]
        size = places[0] + 1 if places else 60
        assert completion.token_ids == without.token_ids[:size]
        kept = completion.token_ids[:-1] if places else completion.token_ids
        assert completion.text == tokenizer.decode(kept)
        assert completion.finish_reason == ("stop" if places else "length")


def test_what_a_tokenizer_is_needed_for(model: Pangu, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop needs a tokenizer"):
        infer.generate(model, [[1]], Sampling(stop=("a",)))
    with pytest.raises(InputError, match="n must be 1 in a stream"):
        list(generation.stream(model, [1], Sampling(n=2), tokenizer=tokenizer))
