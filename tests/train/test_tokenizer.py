"""The tokenizer command: the committed tokenizer is its work, and its mistakes are one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

import pangu_jax
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import PUBLISHED_SPECIALS
from train import __main__ as door
from train import commands, tokenizer

ROOT = Path(__file__).parent.parent.parent
NANO = configs_folder() / "tokenizers" / "nano"
CORPUS = NANO / "corpus.txt"


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def pieces(folder: Path) -> list[str]:
    model = processor(folder)
    return [model.id_to_piece(id) for id in range(model.vocab_size())]


def lines() -> list[str]:
    return list(tokenizer.read_lines(CORPUS))


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The `error:` line of a command that fails."""
    assert door.main(["tokenizer", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- the committed tokenizer


def test_the_command_makes_the_committed_tokenizer_again(tmp_path: Path, capsys) -> None:
    argv = ["tokenizer", "--input", str(CORPUS), "--output", str(tmp_path / "new")]
    assert door.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "1024 pieces" in err
    assert pieces(tmp_path / "new") == pieces(NANO)
    assert sorted(os.listdir(tmp_path / "new")) == ["tokenizer.model", "tokenizer_config.json"]


def test_ids() -> None:
    got = pieces(NANO)
    assert got[:5] == ["<unk>", "<s>", "</s>", "<|User|>:", "<|Bot|>:"]
    assert got[5:39] == [f"[unused{i}]" for i in range(34)]
    assert got[39:295] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert len(got) == len(set(got)) == 1024
    model = processor(NANO)
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)


@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_the_presets_mean_these_ids(name: str) -> None:
    config, got = pangu_jax.preset(name), pieces(NANO)
    assert config.vocab_size == len(got)
    assert [got[id] for id in config.eos_token_ids] == ["[unused10]"]
    assert config.bos_token_id == got.index("<s>")
    assert config.pad_token_id == got.index("<unk>")


def test_the_config_names_the_pieces() -> None:
    config, got = json.loads((NANO / "tokenizer_config.json").read_text()), pieces(NANO)
    assert config == tokenizer.tokenizer_config()
    assert "auto_map" not in config
    assert config["eos_token"] == "[unused10]"
    assert config["pad_token"] == config["unk_token"] == "<unk>"
    added = config["added_tokens_decoder"]
    assert {int(id): token["content"] for id, token in added.items()} == dict(enumerate(got[:39]))
    assert all(token["special"] for token in added.values())
    assert config["additional_special_tokens"] == list(PUBLISHED_SPECIALS)


@pytest.mark.parametrize(
    "text",
    [
        "今天天气很好，我们去公园吧！",
        "龘靐齉爩",
        "🎉👨‍👩‍👧 ☀️",
        "def f(x):\n    if x:\n\treturn {'a': [1, 2]}\n\n",
        "a  b   c \t d",
        " leading and trailing ",
        "   ",
        "ﬁ Ａ １ é é ½",
        "\r\n\x00\x7f\u3000",
        "12345 + 67890 = 80235",
    ],
)
def test_text_comes_back(text: str) -> None:
    model = processor(NANO)
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert model.unk_id() not in ids


def test_digits_stand_alone() -> None:
    assert processor(NANO).encode("2024 1000", out_type=str) == list("▁2024▁1000")


@pytest.mark.parametrize("piece", "▁= ▁carry 进位 排序 ▁first ▁so 答案是 ▁▁▁▁ 用户 助手".split())
def test_phrases_of_exercises_are_pieces(piece: str) -> None:
    assert piece in pieces(NANO)


def test_the_corpus_shrinks() -> None:
    model = processor(NANO)
    text = "".join(lines())
    assert len(model.encode(text)) < 0.8 * len(text)


# --- the function


def test_any_size_works_and_long_lines_count(tmp_path: Path) -> None:
    tokenizer.train_tokenizer(iter([" ".join(lines())]), tmp_path / "long", 400)
    assert len(pieces(tmp_path / "long")) == 400
    tokenizer.train_tokenizer(lines(), tmp_path / "few", 311)
    assert len(pieces(tmp_path / "few")) == 311


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer.train_tokenizer(lines(), tmp_path / name, 500)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_write_leaves_nothing_and_other_files_stay(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "corpus.txt").write_text("kept")
    done = []

    def replace(old: Path, new: Path) -> None:
        if done:
            raise OSError(28, "No space left on device", str(new))
        done.append(shutil.move(old, new))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space left"):
            tokenizer.train_tokenizer(lines(), tmp_path, 400)
    assert os.listdir(tmp_path) == ["corpus.txt"]
    tokenizer.train_tokenizer(lines(), tmp_path, 400)
    assert (tmp_path / "corpus.txt").read_text() == "kept"


# --- mistakes


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        (None, 1024, "no such file"),
        (b"", 1024, "there is no text"),
        (b"\n  \n\t\n", 1024, "there is no text"),
        (b"hello world\n", 1024, "the text is enough for about"),
        (b"hello world\n", 310, "a vocabulary of 310 is too small"),
        (b"hello world\n", 0, "use at least 311"),
        (b"hello world\n", -5, "use at least 311"),
        (b"hello world\n", 10**12, "SentencePiece cannot train on this"),
        ("⁇\n".encode() * 9, 320, "320"),
        (b"gr\xfcn\n", 1024, "not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd, text: bytes | None, size: int, expected: str
) -> None:
    source = tmp_path / "text.txt"
    if text is not None:
        source.write_bytes(text)
    before = os.listdir(tmp_path)
    argv = ("--input", source, "--output", tmp_path / "new", f"--vocab-size={size}")
    assert expected in complaint(capfd, *argv)
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_an_existing_tokenizer_stays(tmp_path: Path, capfd, name: str) -> None:
    (tmp_path / name).write_text("trained for a week")
    err = complaint(capfd, "--input", CORPUS, "--output", tmp_path)
    assert f"{tmp_path / name}: already exists" in err
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "trained for a week"


def test_places_that_cannot_be_used(tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    err = complaint(capfd, "--input", CORPUS, "--output", tmp_path / "file")
    assert "File exists" in err
    os.mkfifo(tmp_path / "pipe")
    for name, expected in {"pipe": "not a regular file", ".": "not a regular file"}.items():
        err = complaint(capfd, "--input", tmp_path / name, "--output", tmp_path / "new")
        assert expected in err
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_the_reader_refuses_before_the_writer_begins(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        tokenizer.train_tokenizer(tokenizer.read_lines(tmp_path / "x"), tmp_path / "new", 400)


# --- the door


def test_help_lists_the_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        door.main(["--help"])
    assert caught.value.code == 0
    assert "Train a tokenizer" in capsys.readouterr().out


def test_every_command_has_a_handler() -> None:
    assert {kind.__name__ for kind in commands.COMMANDS.values()} == set(commands.HANDLERS)


def test_the_command_imports_no_jax(tmp_path: Path) -> None:
    argv = ["tokenizer", "--input", str(CORPUS), "--output", str(tmp_path / "new")]
    code = f"import sys; from train.__main__ import main\nassert main({argv!r}) == 0\n"
    code += "assert not {'jax', 'flax'} & sys.modules.keys(), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_ctrl_c(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "train_tokenizer", interrupted)
    argv = ["tokenizer", "--input", str(CORPUS), "--output", str(tmp_path / "new")]
    assert door.main(argv) == 130
    assert capsys.readouterr().err == "interrupted\n"
