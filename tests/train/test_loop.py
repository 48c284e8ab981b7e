"""Runs: kept, stopped, killed and gone on with to the same bits, and refused in one line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import pangu_jax
from infer import check, files
from pangu_jax.errors import InputError, PanguError
from pangu_jax.text import chat
from pangu_jax.text.tokenizer import write_preset
from train import __main__ as door
from train import loop
from train.record import Record, TrainingError
from train.step import Metrics

TINY = """
vocab_size = 1024
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
intermediate_size = 48
attention_bias = true
tie_embeddings = true
rope_theta = 10_000.0
init_range = 0.05
max_positions = 128
bos_token_id = 1
pad_token_id = 0
eos_token_ids = [15]
dtype = "float32"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset, data and a configuration: six steps, a checkpoint after every second."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.toml").write_text(TINY)
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + 2?"},
                {"role": "assistant", "thinking": f"{a}+2={a + 2}", "content": f"{a + 2}"},
            ]
        }
        for a in range(30)
    ]
    (home / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (home / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": f"The number {a} comes before {a + 1}."}) + "\n" for a in range(40)
        )
    )
    (home / "run.toml").write_text(
        f"""
[model]
preset = "{home / "tiny.toml"}"
tokenizer = "nano"
[data]
path = "{home / "talks.jsonl"}"
length = 64
batch = 2
[optimizer]
warmup_steps = 2
learning_rate = 1e-2
[run]
output = "{home / "unused"}"
steps = 6
save_every = 2
"""
    )
    return home


def sft(home: Path, output: Path, *more: str) -> int:
    return door.main(["sft", str(home / "run.toml"), "--run.output", str(output), *more])


def weights(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(pangu_jax.load(folder / "final"))]


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """A run that nothing stopped."""
    assert sft(home, home / "whole") == 0
    return home / "whole"


def same(one: Path, two: Path) -> None:
    assert metrics(one) == metrics(two)
    for a, b in zip(weights(one), weights(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_run_leaves(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(int(each.name) for each in (whole / "checkpoints").iterdir()) == [4, 6]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "batch = 2" in (whole / "config.toml").read_text()
    assert "beta2 = 0.95" in (whole / "config.toml").read_text()


def test_the_end_is_a_folder_like_any_other(whole: Path) -> None:
    assert all(finding.ok for finding in check.inspect(whole / "final"))
    model = pangu_jax.load(whole / "final")
    tokenizer = pangu_jax.Tokenizer.load(whole / "final")
    prompt = chat.encode(tokenizer, [{"role": "user", "content": "What is 3 + 2?"}])
    (completion,) = infer.generate(model, [prompt], infer.Sampling(4), tokenizer=tokenizer)
    assert len(completion.token_ids) > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bits(
    at: int, home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had written: killed when step `at` was under way."""
    add = Record.add

    def kill(self: Record, step: int, *rest) -> None:
        add(self, step, *rest)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", kill)
        with pytest.raises(Killed):
            sft(home, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert sft(home, tmp_path / "run") == 0
    same(tmp_path / "run", whole)


def test_killed_while_the_end_is_written(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(model: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pangu_jax, "save_hf", kill)
        with pytest.raises(Killed):
            sft(home, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert sft(home, tmp_path / "run") == 0
    same(tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_one_line(home: Path, whole: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    toml = tmp_path / "run" / "config.toml"
    toml.write_text(toml.read_text().replace(str(whole), str(tmp_path / "run")))
    for file in (tmp_path / "run" / "checkpoints" / "6").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:200])
    assert sft(home, tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'run' / 'checkpoints' / '6'}: ")
    assert "remove it" in error
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert sft(home, tmp_path / "run") == 0
    same(tmp_path / "run", whole)


def test_a_mistake_leaves_no_folder(home: Path, tmp_path: Path, capsys) -> None:
    """So that the corrected command is not another run's."""
    missing = ("--data.path", str(tmp_path / "missing.jsonl"))
    assert sft(home, tmp_path / "run", *missing) == 2
    assert sft(home, tmp_path / "run", "--optimizer.freeze", "x") == 2
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_goes_on(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    add = Record.add

    def interrupt(self: Record, step: int, *rest) -> None:
        add(self, step, *rest)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", interrupt)
        assert sft(home, tmp_path / "run") == 130
    assert "stopped after step 3" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 3
    assert sft(home, tmp_path / "run") == 0
    assert "going on after step 3" in capsys.readouterr().err
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_sigkill_at_any_moment(home: Path, whole: Path, tmp_path: Path) -> None:
    """The program itself, killed again and again until it is done."""
    command = [sys.executable, "-m", "train", "sft", str(home / "run.toml")]
    command += ["--run.output", str(tmp_path / "run"), "--run.save_every", "1"]
    # Compiled as the whole run was, in this process: to the same bits.
    same_programs = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    kills = 0
    for seconds in [4, 5, 6, 7, 8, 9, 10, 12, 600]:
        program = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=same_programs)
        try:
            assert program.wait(seconds) == 0
            break
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            kills += 1
    assert kills > 0
    same(tmp_path / "run", whole)


def test_a_complete_run_is_left_alone(home: Path, whole: Path, capsys) -> None:
    before = time.time()
    assert sft(home, whole) == 0
    assert "complete" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").stat().st_mtime < before


def test_another_run_is_refused(home: Path, whole: Path, capsys) -> None:
    assert sft(home, whole, "--data.batch", "3", "--run.save_every", "5") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "data.batch was 2, now 3" in error
    assert "save_every" not in error


def test_changed_data_are_refused(home: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes((home / "talks.jsonl").read_bytes())
    flags = ("--data.path", str(data), "--run.steps", "2")
    assert sft(home, tmp_path / "run", *flags) == 0
    (tmp_path / "run" / "final").rename(tmp_path / "elsewhere")
    data.write_text(data.read_text().replace("+ 2", "+ 3"))
    assert sft(home, tmp_path / "run", *flags) == 2
    assert "changed since the run began" in capsys.readouterr().err


def test_a_foreign_folder_is_not_written_to(home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    assert sft(home, tmp_path / "mine") == 2
    assert "no folder of a run" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_no_number_stops_the_run(home: Path, tmp_path: Path, capsys) -> None:
    assert sft(home, tmp_path / "run", "--optimizer.learning_rate", "1e30") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss is")
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


def test_gradients_without_a_norm_stop_the_run(
    home: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave a run that can be looked at."""
    add = Record.add

    def overflow(self: Record, step: int, metrics: Metrics, tokens: int) -> None:
        if step == 3:
            metrics = dataclasses.replace(metrics, grad_norm=jnp.float32(np.inf))
        add(self, step, metrics, tokens)

    monkeypatch.setattr(Record, "add", overflow)
    assert sft(home, tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the norm of the gradients is inf at step 3")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_another_model_of_the_same_name_is_refused(home: Path, tmp_path: Path, capsys) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(TINY)
    flags = ("--model.preset", str(preset), "--run.steps", "2")
    assert sft(home, tmp_path / "run", *flags) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    preset.write_text(TINY.replace("rope_theta = 10_000.0", "rope_theta = 5_000.0"))
    assert sft(home, tmp_path / "run", *flags) == 2
    assert "the model changed since the run began" in capsys.readouterr().err


def test_two_at_a_time_are_refused(home: Path, tmp_path: Path, capsys) -> None:
    assert sft(home, tmp_path / "run", "--run.steps", "2") == 0
    shutil.rmtree(tmp_path / "run" / "final")
    with files.locked(tmp_path / "run" / ".lock"):
        assert sft(home, tmp_path / "run", "--run.steps", "2") == 2
    assert "another process is at work there" in capsys.readouterr().err


def test_what_a_first_write_left_is_no_obstacle(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.partial-1").write_text("half")
    assert sft(home, tmp_path / "run", "--run.steps", "2") == 0


def test_a_presets_ends_are_those_of_the_tokenizer(home: Path, tmp_path: Path) -> None:
    preset = tmp_path / "other.toml"
    preset.write_text(TINY.replace("[15]", "[45]"))
    flags = ("--model.preset", str(preset), "--run.steps", "2")
    assert sft(home, tmp_path / "run", *flags) == 0
    assert pangu_jax.load(tmp_path / "run" / "final").config.eos_token_ids == (15,)


def test_long_examples_are_told_of(home: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    long = {"role": "assistant", "content": "7 " * 80}
    line = json.dumps({"messages": [{"role": "user", "content": "count"}, long]})
    data.write_text((home / "talks.jsonl").read_text() + line + "\n")
    flags = ("--data.path", str(data), "--run.steps", "2")
    assert sft(home, tmp_path / "run", *flags) == 0
    assert "1 of 31 examples are longer than data.length (64)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "nothing to learn from"),
        ('{"messages": []}', "line 1: no message of an assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n{"mesages": 1}', "line 2: needs"),
        ("{", "line 1: not valid JSON"),
    ],
)
def test_bad_data_is_one_line(
    text: str, complaint: str, home: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    assert sft(home, tmp_path / "run", "--data.path", str(tmp_path / "data.jsonl")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint in error


def test_pretraining_learns_text(home: Path, tmp_path: Path) -> None:
    flags = ["--run.output", str(tmp_path / "run"), "--data.path", str(home / "texts.jsonl")]
    assert door.main(["pretrain", str(home / "run.toml"), *flags]) == 0
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_fine_tuning_a_folder(home: Path, tmp_path: Path) -> None:
    """Its dtype, tokenizer and unknown settings stay; frozen leaves are its own, bit for bit."""
    base = tmp_path / "base"
    config = pangu_jax.preset(home / "tiny.toml")
    pangu_jax.save_hf(pangu_jax.init(config, jax.random.key(1), dtype="bfloat16"), base)
    write_preset("nano", base)
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "run.toml").write_text(
        (home / "run.toml")
        .read_text()
        .replace('tokenizer = "nano"', "")
        .replace(f'preset = "{home / "tiny.toml"}"', f'path = "{base}"')
    )
    freeze = ("--optimizer.freeze", "embed", "--optimizer.freeze", "blocks.*.qkv")
    assert (
        door.main(
            ["sft", str(tmp_path / "run.toml"), "--run.output", str(tmp_path / "run"), *freeze]
        )
        == 0
    )
    before, after = pangu_jax.load(base), pangu_jax.load(tmp_path / "run" / "final")
    assert after.dtype == "bfloat16"
    np.testing.assert_array_equal(after.embed[...], before.embed[...])
    for old, new in zip(before.blocks, after.blocks, strict=True):
        np.testing.assert_array_equal(new.attention.qkv[...], old.attention.qkv[...])
        assert (np.asarray(new.attention.out[...]) != np.asarray(old.attention.out[...])).any()
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "run" / "final" / name).read_bytes() == (base / name).read_bytes()


def test_a_pattern_that_freezes_nothing_is_refused(home: Path, tmp_path: Path, capsys) -> None:
    assert sft(home, tmp_path / "run", "--optimizer.freeze", "embedd") == 2
    assert "no leaf matches 'embedd'; did you mean embed?" in capsys.readouterr().err


def test_rows_longer_than_the_model_are_refused(home: Path, tmp_path: Path, capsys) -> None:
    assert sft(home, tmp_path / "run", "--data.length", "256") == 2
    assert "data.length (256) is more than the model's 128 positions" in capsys.readouterr().err


def test_every_row_is_seen_once_per_pass() -> None:
    seen = np.concatenate([loop.batch_rows(step, 3, 10, seed=4) for step in range(20)])
    for epoch in range(6):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:20])
    assert not np.array_equal(seen[:10], loop.batch_rows(0, 10, 10, seed=5))


def test_errors_are_of_the_family() -> None:
    assert issubclass(TrainingError, PanguError)
    assert issubclass(InputError, PanguError)
