"""Tiny SentencePiece models for tests, and a naive tokenizer of `sentencepiece` and `re` alone.

Nothing here comes from the package: what is written down is how the published tokenizer behaves.
"""

import dataclasses
import functools
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import strategies as st

SPECIALS = ("<|User|>:", "<|Bot|>:", *(f"[unused{i}]" for i in range(34)))
CORPUS = [
    "Hello world, this is a test of the tokens .",
    "你好，世界。今天天气很好，我们去公园。",
    "for i in range(10):\n    print(i)  # comment",
    "The quick brown fox jumps over the lazy dog 0123456789",
    "\tif a and b:\n\t\tx = {'k': [1, 2]}",
    "café ab abc abcd",
]
# Denormalisation changes what decodes to: longer, shorter, nothing, and across pieces.
DENORMAL = {"b": "XYZ", "ab": "Q", "abcd": "好", "o": "", "，": ",", ". .": "!", "q": "qq"}

FALLBACK: dict[str, Any] = {"byte_fallback": True, "vocab_size": 400}
EXACT: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NO_PREFIX = {"add_dummy_prefix": False}
USER = {"user_defined_symbols": list(SPECIALS)}
CONTROL = {"control_symbols": list(SPECIALS)}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", **FALLBACK, **EXACT, **USER},
    "bpe tidied": {"model_type": "bpe", "vocab_size": 120},
    "unigram": {"model_type": "unigram", **FALLBACK, **CONTROL},
    "unigram exact": {"model_type": "unigram", **FALLBACK, **EXACT, **CONTROL, **NO_PREFIX},
    "suffix": {"model_type": "unigram", **FALLBACK, **EXACT, "treat_whitespace_as_suffix": True},
    "char": {"model_type": "char", "vocab_size": 100, **EXACT, **NO_PREFIX},
    "Chinese": {"model_type": "bpe", "vocab_size": 80, **CONTROL, "corpus": CORPUS[1:2]},
    "char tidied": {"model_type": "char", **FALLBACK, **NO_PREFIX, **USER},
    "denormal": {"model_type": "bpe", **FALLBACK, **EXACT, **USER, "denormal": DENORMAL},
    "no bos": {"model_type": "bpe", **FALLBACK, **EXACT, "bos_id": -1, "eos_id": -1, "pad_id": 1},
}
# What comes back exactly: every character has a piece or bytes, and nothing is tidied away.
LOSSLESS = ["bpe", "unigram exact", "no bos"]


def tsv(rules: dict[str, str]) -> str:
    """A rule file as SentencePiece reads it: code points in hex, one rule a line."""
    hexes = lambda text: " ".join(f"{ord(character):X}" for character in text)
    return "".join(f"{hexes(old)}\t{hexes(new)}\n" for old, new in sorted(rules.items()))


@functools.cache
def model(kind: str) -> bytes:
    """`tokenizer.model` of this kind, trained once per session."""
    options = dict(KINDS[kind])
    with tempfile.TemporaryDirectory() as folder:
        if rules := options.pop("denormal", None):
            options["denormalization_rule_tsv"] = os.path.join(folder, "rules.tsv")
            Path(options["denormalization_rule_tsv"]).write_text(tsv(rules), encoding="utf-8")
        corpus, out = options.pop("corpus", CORPUS), io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(  # type: ignore
            sentence_iterator=iter(corpus * 10),
            model_writer=out,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    return out.getvalue()


def write(folder: Path, kind: str | bytes, **files: Any) -> Path:
    """A tokenizer folder: the model, and each keyword as a file `keyword.json` of that content."""
    folder.mkdir(parents=True, exist_ok=True)
    content = kind if isinstance(kind, bytes) else model(kind)
    (folder / "tokenizer.model").write_bytes(content)
    for name, raw in files.items():
        (folder / f"{name}.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def added(content: Any, special: Any = True, **flags: Any) -> dict[str, Any]:
    """One entry of `added_tokens_decoder`."""
    off = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **off, "special": special, **flags}


@dataclasses.dataclass
class Naive:
    """What the published tokenizer does, for added tokens without flags."""

    processor: Any
    added: dict[str, int]
    special: set[int]
    bos: bool = True
    eos: int | None = None

    @staticmethod
    def of(kind: str, special: Iterable[str], kept: Iterable[str] = (), **options: Any) -> "Naive":
        """`special` first, then `kept`; those which are no pieces get the next ids, in order."""
        processor = sentencepiece.SentencePieceProcessor(model_proto=model(kind))
        pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
        ids, special = dict(pieces), list(special)
        for content in [*special, *kept]:
            ids.setdefault(content, len(ids))
        names = {content: ids[content] for content in [*special, *kept]}
        return Naive(processor, names, {ids[content] for content in special}, **options)

    @property
    def size(self) -> int:
        pieces = self.processor.get_piece_size()
        return pieces + len([i for i in self.added.values() if i >= pieces])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        longest_first = sorted(self.added, key=len, reverse=True)
        runs = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = []
        for run in filter(None, runs):
            ids += [self.added[run]] if run in self.added else self.processor.encode(run)
        if not add_special_tokens:
            return ids
        front = [self.processor.bos_id()] if self.bos else []
        return [*front, *ids, *([] if self.eos is None else [self.eos])]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        names = {i: content for content, i in self.added.items()}
        known = [i for i in ids if i in names or 0 <= i < self.processor.get_piece_size()]
        left = [i for i in known if not (skip_special_tokens and i in self.special)]
        text = ""
        for name, run in itertools.groupby(left, names.get):
            run = list(run)
            text += self.processor.decode(run) if name is None else name * len(run)
        return text

    def bytes_of(self, data: bytes) -> list[int]:
        """Byte pieces, or nothing where the model has none."""
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in data]
        return [i for i in ids if self.processor.is_byte(i)]


# --- texts and ids for hypothesis -----------------------------------------------------------------

FAMILY = "👨\u200d👩\u200d👧\u200d👦"
ATOMS = [
    *SPECIALS[:3],
    *("[unused9]", "[unused10]", "[unused33]", "[unused", "9]", "[", "<s>", "</s>", "<unk>", "<"),
    *("<extra>", "<extra>>", "<ext", "▁", "<0xE4>", "<0x41>", "⁇", " ⁇ ", "\ufffd"),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u3000",
        "\xa0",
        "\u2028",
        "\x00",
        "\x1b",
        "\u200b",
        "\ufeff",
    ),
    *("Hello", " world", "def f(x):\n\t", "    return x", "ab", "abcd", "a", "b", "q", ".", " ."),
    *("你好", "，", "世界。", "龘", "𠮷", "é", "e\u0301", "\u0301", "Ａ", "［unused9］", "ﬁ", "①"),
    *("😀", FAMILY, "🏳\ufe0f\u200d🌈", "\u200d", "नमस्ते", "Straße", "İ"),
]
TEXTS = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=12).map("".join)


def ids_for(naive: Naive, outside: bool = False) -> st.SearchStrategy[list[int]]:
    """Any ids at all, with whole and broken characters in bytes, and added tokens, more often."""
    cut = st.tuples(st.sampled_from("é你😀𠮷\u200d"), st.integers(1, 4))
    parts = [
        st.integers(0, naive.processor.get_piece_size() - 1).map(lambda i: [i]),
        st.sampled_from([0, *naive.added.values()]).map(lambda i: [i]),
        cut.map(lambda pair: naive.bytes_of(pair[0].encode()[: pair[1]])),
        st.binary(min_size=1, max_size=3).map(naive.bytes_of),
    ]
    if outside:
        beyond = [-1, -(10**30), naive.size, naive.size + 1, 2**31 - 1, 2**31, 2**63, 2**64, 10**30]
        parts.append(st.sampled_from(beyond).map(lambda i: [i]))
    return st.lists(st.one_of(parts), max_size=16).map(lambda lists: [*itertools.chain(*lists)])


# --- folders by kind and by how they list their special tokens ------------------------------------

BASE = ("<s>", "</s>", "<unk>")
LISTINGS = ("decoder", "appended", "no config")
PAIRS = [
    (kind, how) for kind in KINDS for how in LISTINGS if (kind, how) != ("no bos", LISTINGS[2])
]


def folder_of(folder: Path, kind: str, listing: str) -> tuple[Path, Naive]:
    """A folder whose special tokens are listed one by one, by name, or not at all."""
    bos = kind != "no bos"
    pieces = Naive.of(kind, ()).processor
    if listing == "no config":
        there = [special for special in SPECIALS if pieces.piece_to_id(special)]
        return write(folder, kind), Naive.of(kind, [*BASE, *there])
    config: dict[str, Any] = {"additional_special_tokens": list(SPECIALS), "eos_token": "</s>"}
    if listing == "appended":
        naive = Naive.of(kind, [*BASE, *SPECIALS], bos=bos)
        return write(folder, kind, tokenizer_config=config), naive
    naive = Naive.of(kind, [*BASE, *SPECIALS[:12]], [*SPECIALS[12:], "<extra>", "<extra>>"])
    naive.bos, naive.eos = bos, naive.added["[unused9]"]
    naive.special -= {naive.added["</s>"]}
    decoder = {str(i): added(name, "extra" not in name) for name, i in naive.added.items()}
    config = {
        "added_tokens_decoder": decoder,  # what is special here and named nowhere else is kept
        "additional_special_tokens": list(SPECIALS[:12]),
        "eos_token": "[unused9]",
        "add_eos_token": True,
    }
    return write(folder, kind, tokenizer_config=config), naive
