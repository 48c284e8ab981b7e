"""The command line as users run it: output, exit codes, one-line errors."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from infer import __main__ as door
from infer import cli, commands, loading
from infer.cli import flag
from pangu_jax.errors import CheckpointError, InputError
from tests import folders

ROOT = Path(__file__).parent.parent.parent
ORACLE = ROOT / "tests" / "oracle"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    code = door.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def _leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "") or "0.95")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def test_json_is_the_reference(capsys) -> None:
    expected = np.load(ORACLE / "dense-tiny" / "expected.npz")
    ids = ",".join(map(str, expected["prompt_1_input_ids"]))
    code, out, _ = run(
        capsys, "generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids", ids,
        "--temperature", "0", "--max-new-tokens", "32", "--ignore-eos", "--json",
    )  # fmt: skip
    assert code == 0
    (completion,) = json.loads(out)["completions"]
    assert completion["token_ids"] == expected["prompt_1_gen"].tolist()
    assert len(completion["logprobs"]) == 32
    assert completion["finish_reason"] == "length"
    assert completion["text"] is None


def test_plain_output_is_ids_on_stdout_and_the_rest_on_stderr(capsys) -> None:
    argv = ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids", "1,2"]
    argv += ["--temperature", "0", "--max-new-tokens", "3", "--ignore-eos", "--form", "stacked"]
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert len([int(word) for word in out.strip().split(",")]) == 3
    assert "3 tokens in" in err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["generate", "--modle", "x"], "unknown option '--modle'; did you mean --model?"),
        (["generate", "--model=x", "--promt", "hi"], "did you mean --prompt?"),
        (["genrate"], "unknown command 'genrate'; did you mean generate?"),
        (["generate", "--prompt", "x"], "arguments are required: --model"),
        (["generate", "--model", "x"], "give one of --prompt, --prompt-ids and --input"),
        (["generate", "--model=x", "--prompt=a", "--prompt-ids=1"], "give one of --prompt,"),
        (["generate", "--model=x", "--input=a"], "--input and --output go together"),
        (["generate", "--model=x", "--prompt=a", "--think=fast"], "--think need --chat"),
        (["chat", "--model", "x", "--think", "hard"], "'hard' is not one of fast, slow, auto"),
        (
            ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt", "hi"],
            "no tokenizer.model there; use --prompt-ids",
        ),
        (["chat", "--model", str(ORACLE / "dense-tiny")], "no tokenizer.model there"),
        (["generate", "--model", "x", "--prompt-ids", "1,b"], "'1,b' is not N,N,..."),
        (["generate", "--model", "x", "--prompt-ids", "1", "--top-k", "1.5"], "'1.5' is not N"),
        (
            ["generate", "--model", "x", "--prompt-ids", "1", "--dtype", "int8"],
            "'int8' is not one of float32, bfloat16, float16",
        ),
        (["generate", "--model", "/nowhere", "--prompt-ids", "1"], "/nowhere: does not exist"),
        (
            ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids", "512"],
            "token id 512 is outside the vocabulary of 512",
        ),
        (
            ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids", ""],
            "a prompt is empty",
        ),
        (
            ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids", "1", "--top-p=0"],
            "top_p must be above 0",
        ),
        (
            ["generate", "--model", str(ORACLE / "dense-tiny"), "--prompt-ids=1", "--layout=tp9"],
            "no layouts configuration named 'tp9'",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv: list[str], complaint: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["check", "--help"], []])
def test_help(capsys, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        door.main(argv)
    assert caught.value.code == 0
    assert "usage: pangu-infer" in capsys.readouterr().out


def test_help_is_quick_and_imports_no_jax() -> None:
    code = "import sys; from infer.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(), 'imported'"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("module", ["infer", "train"])
def test_both_doors_open_with_python_m(module: str) -> None:
    argv = [sys.executable, "-m", module]
    done = subprocess.run([*argv, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"usage: pangu-{module}" in done.stdout
    done = subprocess.run([*argv, "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'fly'")


def test_a_missing_device_is_one_line() -> None:
    argv = [sys.executable, "-m", "infer", "generate", "--prompt-ids", "1", "--model"]
    done = subprocess.run(
        [*argv, str(ORACLE / "dense-tiny")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX has no usable abacus device here")
    assert done.stderr.count("\n") == 1


def test_every_command_has_a_handler() -> None:
    assert {kind.__name__ for kind in commands.COMMANDS.values()} == set(commands.HANDLERS)


# --- where settings come from


def settings(tmp_path: Path, defaults: dict, **given: object):
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    command = commands.Generate(model=str(tmp_path), prompt_ids=(1,), **given)
    return loading.settings(command, tmp_path)


def test_settings_default_to_the_folders(tmp_path: Path) -> None:
    published = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.8}
    got = settings(tmp_path, published)
    assert (got.temperature, got.top_k, got.top_p, got.max_new_tokens) == (1.0, 0, 0.8, 128)
    got = settings(tmp_path, published, temperature=0.0, max_new_tokens=7, top_k=3)
    assert (got.temperature, got.top_k, got.top_p, got.max_new_tokens) == (0.0, 3, 0.8, 7)


def test_without_do_sample_it_is_greedy_unless_asked(tmp_path: Path) -> None:
    assert settings(tmp_path, {"temperature": 0.7}).temperature == 0.0
    assert settings(tmp_path, {}).temperature == 0.0
    assert settings(tmp_path, {"do_sample": True}).temperature == 1.0
    assert settings(tmp_path, {"temperature": 0.7}, temperature=0.2).temperature == 0.2


def test_hostile_defaults_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p must be a number"):
        settings(tmp_path, {"top_p": "high"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p must be 0 or more"):
        settings(tmp_path, {"top_p": -3.0})
    with pytest.raises(CheckpointError, match="do_sample must be true or false"):
        settings(tmp_path, {"do_sample": "false"})


def test_eos_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    import pangu_jax

    folders.write(tmp_path, folders.DENSE)
    assert pangu_jax.load(tmp_path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert pangu_jax.load(tmp_path).config.eos_token_ids == (5, 7)


# --- the parser itself


@dataclasses.dataclass(frozen=True)
class Example:
    """An example."""

    name: str = flag("a name")
    count: int | None = flag("a count", None)
    ids: tuple[int, ...] = flag("ids", ())
    kind: Literal["a", "b"] = flag("a kind", "a")
    loud: bool = flag("be loud", False)


def parse(*argv: str) -> Example:
    return cli.parse("prog", "about", {"example": Example}, ["example", *argv])


def test_fields_become_flags() -> None:
    assert parse("--name", "x") == Example(name="x")
    full = parse("--name=x", "--count", "-3", "--ids", "1, 2,3", "--kind", "b", "--loud")
    assert full == Example(name="x", count=-3, ids=(1, 2, 3), kind="b", loud=True)


@pytest.mark.parametrize(
    "argv", [["--nam", "x"], ["--name", "x", "--loud=1"], ["--name", "x", "y"]]
)
def test_no_guessing(argv: list[str]) -> None:
    with pytest.raises(InputError):
        parse(*argv)


def test_a_value_may_look_like_a_flag() -> None:
    assert parse("--name=--odd").name == "--odd"
