"""What a command opens, and its settings: generation_config.json, flags over it, mistakes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pangu_jax
from infer import __main__ as door
from infer import cli, commands, loading
from infer.sampling import Sampling
from pangu_jax.checkpoint import hf
from pangu_jax.errors import CheckpointError, InputError
from pangu_jax.text.tokenizer import Tokenizer
from tests.infer.test_conversation import write_random

ROOT = Path(__file__).parent.parent.parent
ALL = ("chat", "generate", "check", "eval", "bench", "plan", "quantize", "warmup")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random"))


def parsed(*argv: str) -> Any:
    return cli.parse("pangu-infer", "about", commands.COMMANDS, list(argv))


def settings(folder: Path, *flags: str, **otherwise: Any) -> Sampling:
    return loading.settings(parsed("chat", "--model", str(folder), *flags), folder, **otherwise)


def configure(tmp_path: Path, **defaults: Any) -> Path:
    (tmp_path / hf.GENERATION).write_text(json.dumps(defaults))
    return tmp_path


# --- settings

EVERY = {
    "do_sample": True,
    "temperature": 0.75,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "max_new_tokens": 11,
}


def test_every_default_comes_from_the_folder(tmp_path: Path) -> None:
    got = settings(configure(tmp_path, **EVERY, bos_token_id=1, transformers_version="4.53.2"))
    wanted = {name: value for name, value in EVERY.items() if name != "do_sample"}
    assert got == Sampling(**wanted)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", 0.0),
        ("top_k", 0),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("repetition_penalty", 1.0),
        ("max_new_tokens", 3),
    ],
)
def test_a_flag_is_over_the_folder(tmp_path: Path, flag: str, value: float) -> None:
    name = "--" + flag.replace("_", "-")
    got = settings(configure(tmp_path, **EVERY), name, str(value))
    wanted = {**EVERY, flag: value}
    del wanted["do_sample"]
    assert got == Sampling(**wanted)


def test_what_the_folder_does_not_say(tmp_path: Path) -> None:
    assert settings(tmp_path) == Sampling()
    assert settings(tmp_path, max_new_tokens=512) == Sampling(max_new_tokens=512)
    configure(tmp_path, max_new_tokens=9, top_p=None)
    assert settings(tmp_path, max_new_tokens=512) == Sampling(max_new_tokens=9)
    assert settings(tmp_path, "--max-new-tokens", "3", max_new_tokens=512).max_new_tokens == 3


def test_integers_are_numbers(tmp_path: Path) -> None:
    got = settings(configure(tmp_path, do_sample=True, temperature=1, top_p=1))
    assert (got.temperature, got.top_p) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("defaults", "complaint"),
    [
        ({"min_p": 2.0}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.001"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"top_k": "many"}, "top_k must be an integer"),
        ({"temperature": [1]}, "temperature must be a number"),
    ],
)
def test_a_bad_default_names_the_file(tmp_path: Path, defaults: dict, complaint: str) -> None:
    configure(tmp_path, **defaults)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {complaint}"):
        settings(tmp_path)
    # The folder's mistake, even where a flag would be over it.
    with pytest.raises(CheckpointError):
        settings(tmp_path, "--min-p", "0", "--max-new-tokens", "5")


def test_every_sampling_field_is_a_flag_of_generate() -> None:
    flags = {field.name for field in dataclasses.fields(commands.Generate)}
    assert {field.name for field in dataclasses.fields(Sampling)} <= flags


def test_biases_and_stops(tmp_path: Path) -> None:
    flags = ["--logit-bias", "5:-100,7:2.5", "--stop", "a,b", "--stop", "\n", "--stop=--x"]
    got = settings(tmp_path, *flags, "--stop-token-ids", "3,4", "--ignore-eos", "--seed", "-1")
    assert got.logit_bias == {5: -100.0, 7: 2.5}
    assert got.stop == ("a,b", "\n", "--x")
    assert got.stop_token_ids == (3, 4)
    assert got.ignore_eos
    assert got.seed == -1


@pytest.mark.parametrize("word", ["5", "5:", ":5", "5:1:2", "a:1", "5:x", "1.5:1", "5:1,", ""])
def test_biases_that_are_none(word: str) -> None:
    with pytest.raises(InputError, match=r"--logit-bias: .* is not N:X,N:X"):
        parsed("chat", "--model", "x", f"--logit-bias={word}")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--logit-bias=5:nan"], "logit_bias"),
        (["--logit-bias=5:inf"], "logit_bias"),
        (["--stop="], "stop must be a list of strings that are not empty"),
        (["--min-p=1.5"], "min_p must be from 0 to 1"),
        (["--temperature=nan"], "temperature"),
        (["--temperature=-1"], "temperature must be 0 or more"),
        (["--max-new-tokens=0"], "max_new_tokens must be from 1"),
        (["--seed=9999999999"], "seed must be an integer below"),
        (["--thinking-budget=-1"], "thinking_budget must be 0 or more"),
        (["--stop-token-ids=1,x"], "'1,x' is not N,N"),
        (["--logit-bias=1024:1"], "token id 1024 is outside the vocabulary of 1024"),
        (["--think", "x", "--chat"], "'x' is not one of fast, slow, auto"),
        (["--n=0"], "n must be from 1"),
        (["--top-logprobs=101"], "top_logprobs must be from 0 to 100"),
        (["--batch=0"], "--batch must be at least 1"),
        (["a\nb"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_one_line_before_the_model_is_loaded(
    folder: Path, flags: list[str], complaint: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(loading, "model", lambda command: pytest.fail("the model was loaded"))
    monkeypatch.setattr("infer.door.prepare_jax", lambda: None)
    code = door.main(["generate", "--model", str(folder), "--prompt", "Hi", *flags])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err


# --- the tokenizer and the model


def test_no_tokenizer_is_none(folder: Path, tmp_path: Path) -> None:
    config, _ = hf.read_config(folder)
    assert loading.tokenizer(tmp_path, config) is None
    found = loading.tokenizer(folder, config)
    assert isinstance(found, Tokenizer)
    assert found.vocab_size == config.vocab_size


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path) -> None:
    config, _ = hf.read_config(folder)
    small = dataclasses.replace(config, vocab_size=1023)
    with pytest.raises(CheckpointError, match="1024 tokens, but the model has only 1023"):
        loading.tokenizer(folder, small)
    loading.tokenizer(folder, dataclasses.replace(config, vocab_size=2048))


@pytest.mark.parametrize("data", [b"", b"garbage"])
def test_a_damaged_tokenizer_is_refused(folder: Path, tmp_path: Path, data: bytes) -> None:
    config, _ = hf.read_config(folder)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        loading.tokenizer(tmp_path, config)


def test_the_model_as_the_flags_ask(folder: Path) -> None:
    argv = ("chat", "--model", str(folder), "--dtype", "bfloat16", "--form", "stacked")
    model, seconds = loading.model(parsed(*argv))
    assert isinstance(model, pangu_jax.Pangu)
    assert (model.dtype, model.form) == ("bfloat16", "stacked")
    assert seconds > 0


@pytest.mark.parametrize("argv", [["chat"], ["generate", "--prompt", "Hi"]])
def test_without_a_tokenizer_text_is_refused(folder: Path, tmp_path, argv, capsys) -> None:
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    assert door.main([*argv, "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "no tokenizer.model there" in err


# --- help


@pytest.mark.parametrize("name", ALL)
def test_help_lists_every_flag(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        door.main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(commands.COMMANDS[name]):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert " ".join(field.metadata["help"].split()) in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit):
        door.main(["--help"])
    shown = capsys.readouterr().out
    assert set(ALL) == set(commands.COMMANDS)
    for name, kind in commands.COMMANDS.items():
        assert name in shown
        assert (kind.__doc__ or "").strip()


def test_closed_streams_are_no_traceback(folder: Path) -> None:
    argv = [sys.executable, "-m", "infer", "chat", "--model", str(folder)]
    for closed in ("<&-", ">&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *argv],
            cwd=ROOT, capture_output=True, text=True, input="", timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
