"""The tokenizer against outputs of the reference, against a naive one, and against bad folders."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pangu_jax.errors import CheckpointError, InputError
from pangu_jax.text.tokenizer import PUBLISHED_SPECIALS, Tokenizer
from tests import spm
from tests.limits import no_longer_than

ORACLE = Path(__file__).parents[2] / "oracle" / "tokenizer"
CASES = sorted(path.stem for path in ORACLE.glob("*.json"))
QUICK = settings(max_examples=60, deadline=None)


def refused(folder: Path, name: str) -> str:
    """The one line with which a folder is refused; it names the file."""
    with no_longer_than(20), pytest.raises(CheckpointError) as caught:
        Tokenizer.load(folder)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert len(message) < 500
    assert name in message
    return message


# --- against the reference's outputs --------------------------------------------------------------


@functools.cache
def case(name: str) -> tuple[dict[str, Any], Tokenizer]:
    raw = json.loads((ORACLE / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(ORACLE / raw["model"], Path(temporary) / "tokenizer.model")
        for file, content in raw["files"].items():
            (Path(temporary) / file).write_text(json.dumps(content), encoding="utf-8")
        return raw, Tokenizer.load(Path(temporary))


def test_there_are_cases() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("name", CASES)
def test_ids_as_the_reference(name: str) -> None:
    raw, tokenizer = case(name)
    for text, full, bare, *_ in raw["encode"]:
        assert tokenizer.encode(text) == full, text
        assert tokenizer.encode(text, add_special_tokens=False) == bare, text


@pytest.mark.parametrize("name", CASES)
def test_texts_as_the_reference(name: str) -> None:
    raw, tokenizer = case(name)
    for ids, text, skipped in [*(row[1:2] + row[3:] for row in raw["encode"]), *raw["decode"]]:
        assert tokenizer.decode(ids) == text, ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped, ids


@pytest.mark.parametrize("name", CASES)
def test_special_ids_as_the_reference(name: str) -> None:
    raw, tokenizer = case(name)
    assert tokenizer.special_ids == frozenset(raw["special_ids"])
    for attribute in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(tokenizer, attribute) == raw[attribute], attribute
    for content, i in raw["added"].items():
        assert tokenizer.id(content) == i
        assert tokenizer.token(i) == content
    if name != "char":  # whose added tokens leave a gap
        assert tokenizer.vocab_size == raw["vocab_size"]


def test_the_published_specials() -> None:
    assert tuple(PUBLISHED_SPECIALS) == spm.SPECIALS


# --- against the naive tokenizer ------------------------------------------------------------------


@functools.cache
def pair(kind: str, listing: str) -> tuple[Tokenizer, spm.Naive]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, naive = spm.folder_of(Path(temporary), kind, listing)
        return Tokenizer.load(folder), naive


@pytest.mark.parametrize(("kind", "listing"), spm.PAIRS)
def test_ids_as_the_naive(kind: str, listing: str) -> None:
    tokenizer, naive = pair(kind, listing)

    @QUICK
    @given(spm.TEXTS)
    @example("")
    @example("[unused9]你好[unused10]")
    @example(" [unused9] <|User|>:  <|Bot|>:\n<extra>>>")
    def check(text: str) -> None:
        assert tokenizer.encode(text) == naive.encode(text)
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert bare == naive.encode(text, False)
        assert all(0 <= i < tokenizer.vocab_size for i in bare)

    check()


@pytest.mark.parametrize(("kind", "listing"), spm.PAIRS)
def test_texts_as_the_naive(kind: str, listing: str) -> None:
    tokenizer, naive = pair(kind, listing)

    @QUICK
    @given(spm.ids_for(naive, outside=True), st.booleans())
    @example([], False)
    @example([-1, naive.size, 10**30], True)
    def check(ids: list[int], skip: bool) -> None:
        assert tokenizer.decode(ids, skip_special_tokens=skip) == naive.decode(ids, skip)

    check()


@pytest.mark.parametrize(("kind", "listing"), spm.PAIRS)
def test_tokens_as_the_naive(kind: str, listing: str) -> None:
    tokenizer, naive = pair(kind, listing)
    assert tokenizer.vocab_size == naive.size
    assert tokenizer.special_ids == naive.special
    bos = naive.processor.bos_id()
    assert tokenizer.bos_id == (bos if naive.bos else None)
    assert tokenizer.unk_id == naive.processor.unk_id()
    assert tokenizer.eos_id == naive.added["[unused9]" if listing == "decoder" else "</s>"]
    assert tokenizer.pad_id is None
    assert tokenizer.chat_template is None
    names = {i: content for content, i in naive.added.items()}
    for i in range(naive.size):
        token = names[i] if i in names else naive.processor.id_to_piece(i)
        assert tokenizer.token(i) == token
        assert tokenizer.id(token) == i
    for missing in ("", "no such token", "<S>", "[unused34]", "\x00", "\ud800"):
        assert tokenizer.id(missing) is None


@pytest.mark.parametrize("kind", spm.LOSSLESS)
def test_text_comes_back(kind: str) -> None:
    """Where nothing is normalised, all but U+2581, which stands for a space, comes back."""
    tokenizer, _ = pair(kind, "decoder")

    @settings(max_examples=200, deadline=None)
    @given(spm.TEXTS | st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text.replace("▁", " ")

    check()


@pytest.mark.parametrize("kind", [kind for kind in spm.KINDS if kind != "no bos"])
def test_bos_and_eos_only_at_the_ends(kind: str) -> None:
    tokenizer, _ = pair(kind, "decoder")
    for text in ("", "Hello", "[unused9]", "<s>"):
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == [tokenizer.bos_id, *bare, tokenizer.eos_id]


@pytest.mark.parametrize("kind", ["unigram", "Chinese"])
def test_what_only_looks_like_a_special_token_is_none(kind: str) -> None:
    """Full-width forms become ASCII in the model; the unknown among it is no special token."""
    tokenizer, _ = pair(kind, "decoder")
    for text in ("［unused9］", "你［unused10］", "＜s＞", "<｜User｜>:", "<0x41>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not set(ids) & set(range(1, 3 + len(spm.SPECIALS)))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "[unused9]\udc80", "\ud83d \ude00"])
def test_lone_surrogates_are_refused(text: str) -> None:
    tokenizer, _ = pair("bpe", "decoder")
    with pytest.raises(InputError) as caught:
        tokenizer.encode(text)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.isprintable()


@pytest.mark.parametrize("atom", ["a", " ", "[unused9]", "[unused", "龘", "😀", "word ", "<extra>"])
def test_long_texts_take_no_longer_by_the_square(atom: str) -> None:
    tokenizer, naive = pair("bpe", "decoder")
    text = atom * (200_000 // len(atom))
    with no_longer_than(10):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids[1:-1]) == text
    assert ids == naive.encode(text)


def test_added_tokens_whose_names_overlap(tmp_path: Path) -> None:
    """The leftmost starts first; of those that start together the longest wins."""
    naive = spm.Naive.of("bpe", spm.BASE, ["<a>", "<a><b>", "<b>", "<b><c><d>", "*", "**", "."])
    decoder = {str(i): spm.added(name, i < 3) for name, i in naive.added.items()}
    spm.write(tmp_path, "bpe", tokenizer_config={"added_tokens_decoder": decoder})
    tokenizer = Tokenizer.load(tmp_path)

    @QUICK
    @given(st.lists(st.sampled_from(["<a>", "<b>", "<c>", "<d>", "*", ".", "x", " "])).map("".join))
    @example("<a><b><c><d>")
    @example("*****.x<a><a><b><b><c>")
    def check(text: str) -> None:
        assert tokenizer.encode(text) == naive.encode(text)

    check()


# --- files and their precedence -------------------------------------------------------------------


def test_the_folder_may_be_a_string(tmp_path: Path) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config={})
    assert Tokenizer.load(str(tmp_path)).encode("") == [1]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True)])
def test_bos_and_eos_as_configured(tmp_path: Path, bos: bool, eos: bool) -> None:
    config = {"add_bos_token": bos, "add_eos_token": eos}
    spm.write(tmp_path, "bpe", tokenizer_config=config)
    assert Tokenizer.load(tmp_path).encode("") == [1] * bos + [2] * eos


def test_bos_is_that_of_the_model(tmp_path: Path) -> None:
    """Whatever string is named as BOS, as the published class has it."""
    spm.write(tmp_path, "bpe", tokenizer_config={"bos_token": "[unused9]"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("") == [1]


def test_the_map_counts_only_without_a_decoder(tmp_path: Path) -> None:
    there, other = {"eos_token": "[unused10]"}, {"eos_token": "[unused11]"}
    spm.write(tmp_path, "bpe", tokenizer_config=there, special_tokens_map=other)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.id("[unused11]")
    decoder = {"2": spm.added("</s>")}
    config = {**there, "added_tokens_decoder": decoder}
    spm.write(tmp_path, "bpe", tokenizer_config=config, special_tokens_map=other)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.id("[unused10]")


TEMPLATES: dict[str, tuple[Any, str | None]] = {
    "a string": ("{{ messages }}", "{{ messages }}"),
    "null": (None, None),
    "a list": (
        [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
        "d",
    ),
    "a list without default": ([{"name": "rag", "template": "r"}], None),
    "an empty list": ([], None),
}


@pytest.mark.parametrize("which", TEMPLATES)
def test_chat_template_of_the_config(tmp_path: Path, which: str) -> None:
    raw, template = TEMPLATES[which]
    spm.write(tmp_path, "bpe", tokenizer_config={"chat_template": raw})
    assert Tokenizer.load(tmp_path).chat_template == template


@pytest.mark.parametrize("config", [None, {}, {"chat_template": "old"}])
def test_the_template_file_comes_first(tmp_path: Path, config: Any) -> None:
    spm.write(tmp_path, "bpe", **({} if config is None else {"tokenizer_config": config}))
    text = "{% for m in messages %}\n你好 {{ m }}\n{% endfor %}\n"
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == text


# --- folders that are refused ---------------------------------------------------------------------

FILES = ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
FILES.append("chat_template.jinja")


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "missing")


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "file")


def test_a_folder_without_the_model(tmp_path: Path) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config={})
    (tmp_path / "tokenizer.model").unlink()
    refused(tmp_path, "tokenizer.model")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_for_a_file(tmp_path: Path, name: str) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    refused(tmp_path, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_for_a_file(tmp_path: Path, name: str, linked: bool) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / ("pipe" if linked else name))
    if linked:
        (tmp_path / name).symlink_to("pipe")
    refused(tmp_path, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_end(tmp_path: Path, name: str) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path, name)


@pytest.mark.parametrize("name", FILES)
def test_a_huge_file(tmp_path: Path, name: str) -> None:
    spm.write(tmp_path, "bpe")
    with open(tmp_path / name, "ab") as file:
        file.truncate(1 << 40)  # a hole, which takes no room
    refused(tmp_path, name)


@pytest.mark.parametrize("name", FILES[:4])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, name)


BROKEN = {
    "not JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "not UTF-8": b'{"a": "\xff"}',
    "a very deep list": b"[" * 200_000,
    "a very deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of many digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "something behind": b"{} {}",
}


@pytest.mark.parametrize("name", FILES[1:4])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_json(tmp_path: Path, name: str, how: str) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / name).write_bytes(BROKEN[how])
    refused(tmp_path, name)


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    spm.write(tmp_path, "bpe")
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    refused(tmp_path, "chat_template.jinja")


WRONG: dict[str, dict[str, Any]] = {
    **{f"bos_token {value!r}": {"bos_token": value} for value in (1, True, [], {"content": 1})},
    **{f"add_bos_token {value!r}": {"add_bos_token": value} for value in ("yes", 1.5, [], {})},
    **{f"add_eos_token {value!r}": {"add_eos_token": value} for value in ("", 2, [True])},
    **{f"eos_token {value!r}": {"eos_token": value} for value in (0.5, {}, ["</s>"])},
    **{f"pad_token {value!r}": {"pad_token": value} for value in (0, [1], {"contents": "x"})},
    **{
        f"additional_special_tokens {value!r}": {"additional_special_tokens": value}
        for value in (1, "x", {"a": "b"}, [1], [None], [["a"]], [{}], [{"content": 5}])
    },
    **{
        f"chat_template {value!r}": {"chat_template": value}
        for value in (1, True, {"default": 1}, ["x"], [{"name": "default"}], [{"template": "x"}])
    },
    "a template that is no text": {"chat_template": [{"name": "default", "template": 5}]},
    **{f"a decoder {value!r}": {"added_tokens_decoder": value} for value in (1, "x", [], [{}])},
    **{
        f"an entry {value!r}": {"added_tokens_decoder": {"400": value}}
        for value in (None, 1, "<x>", [], {}, {"special": True})
    },
    **{
        f"an id {i!r}": {"added_tokens_decoder": {i: spm.added("<x>")}}
        for i in ("-1", "1.5", "x", "", "1e3", "0x10", "NaN", "\n\x1b[31m", "9" * 5000)
    },
    **{
        f"the id {i}": {"added_tokens_decoder": {str(i): spm.added("<x>")}}
        for i in (10**12, 2**31, 2**63, 2**64, -(2**63))
    },
    "an id twice": {"added_tokens_decoder": {"400": spm.added("<x>"), "0400": spm.added("<y>")}},
    **{
        f"the content {content!r}": {"added_tokens_decoder": {"400": spm.added(content)}}
        for content in ("", 5, None, ["x"], {}, True)
    },
    **{
        f"the flag {flag}": {"added_tokens_decoder": {"400": spm.added("<x>", **{flag: "no"})}}
        for flag in ("lstrip", "rstrip", "single_word", "special")
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_configs(tmp_path: Path, what: str) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config=WRONG[what])
    refused(tmp_path, "tokenizer_config.json")


@pytest.mark.parametrize("value", [1, True, [], {"content": 1}, {}])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "mask_token"])
def test_wrong_maps(tmp_path: Path, name: str, value: Any) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config={}, special_tokens_map={name: value})
    refused(tmp_path, "special_tokens_map.json")


@pytest.mark.parametrize("i", [-1, 1.5, "400", None, True, 10**12, 2**64, [400], {}])
def test_wrong_added_ids(tmp_path: Path, i: Any) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config={}, added_tokens={"<x>": i})
    refused(tmp_path, "added_tokens.json")


@pytest.mark.parametrize("raw", [{"": 400}, {"<x>": 400, "<y>": 400}])
def test_wrong_added_tokens(tmp_path: Path, raw: Any) -> None:
    spm.write(tmp_path, "bpe", tokenizer_config={}, added_tokens=raw)
    refused(tmp_path, "added_tokens.json")


def test_an_id_twice_in_the_text_of_the_file(tmp_path: Path) -> None:
    spm.write(tmp_path, "bpe")
    entry = json.dumps(spm.added("<x>"))
    text = f'{{"added_tokens_decoder": {{"400": {entry}, "400": {entry.replace("x", "y")}}}}}'
    (tmp_path / "tokenizer_config.json").write_text(text)
    refused(tmp_path, "tokenizer_config.json")


HOSTILE = {
    "many": [f"<{i}>" for i in range(5_000)],
    "each begins the next": ["x" * i for i in range(1, 500)],
    "long": ["x" * 100_000 + str(i) for i in range(3)],
    "patterns": ["(a+)+$", "[", "\\", "(?P<x>", "a|b", ".*", "^", "\n", "\x00", "{9}"],
    "surrogates": ["<\ud800>", "\udfff"],
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}, {"single_word": True}])
def test_hostile_tokens_load_or_are_refused_in_time(
    tmp_path: Path, how: str, flags: dict[str, bool]
) -> None:
    contents = enumerate(HOSTILE[how])
    decoder = {str(400 + i): spm.added(content, **flags) for i, content in contents}
    spm.write(tmp_path, "bpe", tokenizer_config={"added_tokens_decoder": decoder})
    with no_longer_than(10):
        try:
            tokenizer = Tokenizer.load(tmp_path)
        except CheckpointError:
            refused(tmp_path, "tokenizer_config.json")
            assert how != "patterns"
            return
        for text in ("x" * 20_000, "(a+)+$[\\.*^\n" * 999, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"):
            ids = tokenizer.encode(text)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)


# --- models that are no models --------------------------------------------------------------------

PROBE = """
import sys
from pathlib import Path
from pangu_jax.errors import CheckpointError
from pangu_jax.text.tokenizer import Tokenizer
for folder in sorted(Path(sys.argv[1]).iterdir()):
    print(folder.name, end=" ", flush=True)
    try:
        tokenizer = Tokenizer.load(folder)
    except CheckpointError as error:
        assert str(error).isprintable() and "tokenizer.model" in str(error), repr(error)
        print("refused", flush=True)
        continue
    ids = tokenizer.encode("Hello 你好 [unused9] 😀")
    tokenizer.decode(ids)
    tokenizer.decode(list(range(tokenizer.vocab_size)), skip_special_tokens=True)
    print("loaded", flush=True)
"""


def probe(models: dict[str, bytes], tmp_path: Path) -> dict[str, str]:
    """What becomes of each model, in another process, which must live to the end."""
    for name, content in models.items():
        spm.write(tmp_path / name, content)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        cwd=ORACLE.parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    return dict(line.split() for line in done.stdout.splitlines())


def test_damaged_models(tmp_path: Path) -> None:
    rng, whole = random.Random(3), spm.model("bpe")
    noise = {f"noise{i}": rng.randbytes(rng.choice([1, 7, 100, 5000])) for i in range(40)}
    noise |= {
        "text": b"this is no model\n",
        "zeros": bytes(5000),
        "zip": b"PK\x03\x04" + rng.randbytes(500),
        "json": b"{}",
        "half": whole[: len(whole) // 2 + 1],
        "byte": whole[:1],
    }
    outcomes = probe(noise, tmp_path)
    assert set(outcomes) == set(noise)
    assert set(outcomes.values()) == {"refused"}


def test_cut_models_are_refused_or_work(tmp_path: Path) -> None:
    """A cut between two fields leaves a message that parses, so some of these load."""
    whole = spm.model("unigram exact")
    cuts = {f"cut{i}": whole[:i] for i in range(0, len(whole), 61)}
    outcomes = probe(cuts, tmp_path)
    assert list(outcomes.values()).count("refused") > len(cuts) // 2


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def pieces(*named: tuple[str, int]) -> bytes:
    """A model of these pieces (1 a normal one, 2 unknown, 3 control, 4 user-defined, 6 a byte)."""
    out = b""
    for text, kind in named:
        raw = b"\x0a" + varint(len(text.encode())) + text.encode()
        raw += b"\x15\x00\x00\x00\x00\x18" + varint(kind)
        out += b"\x0a" + varint(len(raw)) + raw
    return out


CRAFTED = {
    "nothing": b"",
    "no-unknown": pieces(("a", 1), ("b", 1)),
    "two-unknowns": pieces(("<unk>", 2), ("<unk2>", 2)),
    "one-twice": pieces(("<unk>", 2), ("a", 1), ("a", 1)),
    "an-empty-piece": pieces(("<unk>", 2), ("", 1)),
    "a-bad-byte": pieces(("<unk>", 2), ("<0xZZ>", 6)),
    "no-byte": pieces(("<unk>", 2), ("a", 6)),
    "a-bad-kind": pieces(("<unk>", 2), ("a", 99)),
    "a-long-length": b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 50,
}


def test_crafted_models_do_not_bring_the_process_down(tmp_path: Path) -> None:
    outcomes = probe(CRAFTED, tmp_path)
    assert set(outcomes) == set(CRAFTED)
    for name in ("nothing", "no-unknown", "two-unknowns", "a-long-length"):
        assert outcomes[name] == "refused"
