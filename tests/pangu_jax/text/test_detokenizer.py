"""Ids in, text out as soon as it is certain: always what decoding them all at once gives."""

import functools
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pangu_jax.text.detokenizer import Detokenizer
from pangu_jax.text.tokenizer import Tokenizer
from tests import spm
from tests.limits import no_longer_than

ORACLE = Path(__file__).parents[2] / "oracle" / "tokenizer"
CASES = sorted(path.stem for path in ORACLE.glob("*.json"))
QUICK = settings(max_examples=25, deadline=None)
SMALL = settings(max_examples=12, deadline=None)
FALLBACK = [kind for kind in spm.KINDS if "byte_fallback" in spm.KINDS[kind]]
EAGER = [kind for kind in spm.KINDS if kind != "denormal"]


@functools.cache
def pair(kind: str, listing: str = "decoder") -> tuple[Tokenizer, spm.Naive]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, naive = spm.folder_of(Path(temporary), kind, listing)
        return Tokenizer.load(folder), naive


@functools.cache
def case(name: str) -> tuple[dict[str, Any], Tokenizer]:
    raw = json.loads((ORACLE / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(ORACLE / raw["model"], Path(temporary) / "tokenizer.model")
        for file, content in raw["files"].items():
            (Path(temporary) / file).write_text(json.dumps(content), encoding="utf-8")
        return raw, Tokenizer.load(Path(temporary))


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: Iterable[int], skip: bool) -> list[str]:
    """The texts of pushing `ids` in parts that end at `cuts`, and of finishing."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(cuts), len(ids)]
    parts = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return [*parts, detokenizer.finish()]


# --- all of the text, however it is cut -----------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_any_split_gives_the_references_text(name: str, skip: bool) -> None:
    raw, tokenizer = case(name)
    rng = random.Random(1)
    rows = [*(row[1:2] + row[3:] for row in raw["encode"]), *raw["decode"]]
    for which, (ids, *texts) in enumerate(rows):
        cuts = [rng.randint(0, len(ids)) for _ in range(3)] if which % 2 else range(len(ids))
        assert "".join(streamed(tokenizer, ids, cuts, skip)) == texts[skip], (ids, cuts)


@pytest.mark.parametrize(("kind", "listing"), spm.PAIRS)
def test_any_split_gives_the_naive_text(kind: str, listing: str) -> None:
    tokenizer, naive = pair(kind, listing)

    @QUICK
    @given(spm.ids_for(naive, outside=True), st.booleans(), st.sets(st.integers(0, 20)))
    def check(ids: list[int], skip: bool, whole: set[int]) -> None:
        cuts = [end for end in range(len(ids)) if end not in whole]
        assert "".join(streamed(tokenizer, ids, cuts, skip)) == naive.decode(ids, skip)

    check()


@pytest.mark.parametrize("kind", spm.KINDS)
def test_any_split_gives_the_text_that_went_in(kind: str) -> None:
    tokenizer, naive = pair(kind)

    @QUICK
    @given(spm.TEXTS)
    @example("[unused9]你好😀[unused10]<|User|>: hi")
    def check(text: str) -> None:
        ids = naive.encode(text, False)
        parts = streamed(tokenizer, ids, range(len(ids)), False)
        assert "".join(parts) == naive.decode(ids)
        if kind in spm.LOSSLESS:
            assert "".join(parts) == text.replace("▁", " ")

    check()


@pytest.mark.parametrize("kind", spm.KINDS)
def test_nothing_gives_nothing(kind: str) -> None:
    detokenizer = Detokenizer(pair(kind)[0])
    assert detokenizer.push([]) == ""
    assert detokenizer.finish() == ""


def test_two_streams_at_once() -> None:
    tokenizer, naive = pair("bpe")
    texts = ["你好 😀 world", "[unused9] other\n\ttext 龘"]
    streams = [Detokenizer(tokenizer) for _ in texts]
    out = ["", ""]
    ids = [naive.encode(text, False) for text in texts]
    for step in itertools.zip_longest(*ids):
        for which, i in enumerate(step):
            out[which] += streams[which].push([] if i is None else [i])
    assert [text + stream.finish() for text, stream in zip(out, streams, strict=True)] == texts


# --- nothing too early ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FALLBACK)
def test_no_replacement_for_what_is_still_to_come(kind: str) -> None:
    tokenizer, naive = pair(kind)

    @QUICK
    @given(st.lists(st.sampled_from("é你好😀𠮷\u200dab "), max_size=6).map("".join))
    @example(spm.FAMILY)
    def check(text: str) -> None:
        ids = naive.bytes_of(text.encode())
        parts = streamed(tokenizer, ids, range(len(ids)), False)
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == naive.decode(ids)

    check()


@pytest.mark.parametrize("kind", FALLBACK)
def test_bytes_run_on_across_what_is_skipped(kind: str) -> None:
    """Special tokens go first, so one in the middle of a character does not break it."""
    tokenizer, naive = pair(kind)
    first, *rest = naive.bytes_of("你".encode())
    ids = [first, naive.added["[unused9]"], *rest]
    assert naive.decode(ids, True) == "你"
    assert "".join(streamed(tokenizer, ids, [0, 1, 2, 3, 4], True)) == "你"
    assert "".join(streamed(tokenizer, ids, [0, 1, 2, 3, 4], False)) == naive.decode(ids)


@pytest.mark.parametrize("kind", spm.KINDS)
def test_what_was_shown_stays(kind: str) -> None:
    """It begins the text of whatever ids follow: in particular that of any one more."""
    tokenizer, naive = pair(kind)

    @SMALL
    @given(spm.ids_for(naive), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        shown = Detokenizer(tokenizer, skip_special_tokens=skip).push(ids)
        for more in range(naive.size):
            assert naive.decode([*ids, more], skip).startswith(shown)

    check()


# --- nothing too late -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EAGER)
def test_what_is_certain_is_shown(kind: str) -> None:
    """All that the texts of many ways to go on have in common, after every id."""
    tokenizer, naive = pair(kind)
    tails = [b"\x80\x80", b"\xbf\xbf\xbf", b"\x80\x80\x80", b"\x90\x80\x80", b"\x9f\xbf\xbf"]
    ways = [[], *([i] for i in range(naive.size)), *map(naive.bytes_of, tails)]

    @SMALL
    @given(spm.ids_for(naive), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        shown = ""
        for end in range(1, len(ids) + 1):
            shown += detokenizer.push(ids[end - 1 : end])
            texts = [naive.decode(ids[:end] + way, skip) for way in ways]
            first, last = min(texts), max(texts)  # all others begin as these two do
            length = next((n for n, c in enumerate(first) if last[n : n + 1] != c), len(first))
            assert shown == first[:length], ids[:end]

    check()


@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("text", ["Hello world ab", "你好，世界。", "a b\n\tc", "[unused9] q <s>x"])
def test_whole_characters_are_shown_at_once(kind: str, text: str) -> None:
    tokenizer, naive = pair(kind)
    is_byte = lambda i: i < naive.processor.get_piece_size() and naive.processor.is_byte(i)
    ids = [i for i in naive.encode(text, False) if not is_byte(i)]
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for end in range(1, len(ids) + 1):
        shown += detokenizer.push(ids[end - 1 : end])
        assert shown == naive.decode(ids[:end])
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", ["bpe", "denormal"])
def test_a_special_token_ends_all_doubt(kind: str) -> None:
    """What is before an added token that is kept does not change any more."""
    tokenizer, naive = pair(kind)
    end = naive.added["<extra>"]

    @QUICK
    @given(spm.ids_for(naive), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        shown = "".join(detokenizer.push([i]) for i in [*ids, end])
        assert shown == naive.decode([*ids, end], skip)
        assert detokenizer.finish() == ""

    check()


# --- long streams ---------------------------------------------------------------------------------

LONG = {
    "words": "Hello world. ",
    "a word": "abcd",
    "spaces": "    ",
    "Chinese": "你好，世界。",
    "emoji": spm.FAMILY,
    "specials": "[unused9][unused10]",
}


@pytest.mark.parametrize("what", LONG)
def test_a_long_stream_takes_no_longer_by_the_square(what: str) -> None:
    tokenizer, naive = pair("bpe")
    ids = (naive.encode(LONG[what], False) * 12_000)[:12_000]
    long_stream(tokenizer, naive, ids)


@pytest.mark.parametrize("data", [b"\x80", b"\xf0", b"\xe4\xbd", b"\xff\xfe", b"\xf0\x9f\x98"])
def test_a_long_stream_of_broken_characters(data: bytes) -> None:
    tokenizer, naive = pair("bpe")
    long_stream(tokenizer, naive, (naive.bytes_of(data) * 12_000)[:12_000])


@pytest.mark.parametrize("kind", ["bpe", "char tidied"])
def test_a_long_stream_of_what_is_not_seen(kind: str) -> None:
    """Control tokens and leading spaces, in which nothing is ever shown."""
    tokenizer, naive = pair(kind)
    space = naive.processor.piece_to_id("▁")
    long_stream(tokenizer, naive, [2, space] * 6_000)
    long_stream(tokenizer, naive, [naive.added["[unused9]"]] * 12_000, skip=True)


def long_stream(tokenizer: Tokenizer, naive: spm.Naive, ids: list[int], skip: bool = False) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    with no_longer_than(4):
        text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    assert text == naive.decode(ids, skip)
