"""Runs: kept, stopped, killed and gone on with to the same bits, and refused in one line."""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import infer
import pangu_jax
from infer import check, files
from pangu_jax import build
from pangu_jax.errors import CheckpointError, InputError, PanguError
from pangu_jax.text import chat
from pangu_jax.text.tokenizer import Tokenizer, write_preset
from tests import runs
from tests.runs import Killer, SharedRecipe
from train import config as configs
from train import loop, pretrain, record, sft
from train.config import Config, ModelSection
from train.data.feed import Feed
from train.data.mixture import Data
from train.objectives import Batch
from train.record import Record, TrainingError
from train.run_folder import RunFolder
from train.step import Metrics


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def wholes(home: Path) -> Callable[[str], Path]:
    """Runs that nothing stopped, by their kind."""

    def whole(kind: str) -> Path:
        output = home / f"whole-{kind}"
        if not output.exists():
            assert runs.start(kind, home, output, plot=True) == 0
        return output

    return whole


@pytest.fixture(scope="module")
def whole(wholes: Callable[[str], Path]) -> Path:
    return wholes("dense")


@pytest.fixture(scope="module")
def kill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    with Killer(tmp_path_factory.mktemp("killer")) as killer:
        yield killer


def run(home: Path, output: Path, *flags: str, **more: Any) -> int:
    """The dense one, six steps with a checkpoint after every second."""
    return runs.start("dense", home, output, *flags, **more)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that begins with `error:`, which is the last."""
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error:")] == said[-1:]
    return said[-1]


# --- what there is in the end


@pytest.mark.parametrize("kind", ["dense", pytest.param("moge", marks=pytest.mark.slow)])
def test_what_a_run_leaves(kind: str, wholes: Callable[[str], Path]) -> None:
    whole = wholes(kind)
    lines = runs.metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert runs.steps(whole) == [4, 6]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "beta2 = 0.95" in (whole / "config.toml").read_text()
    assert (whole / "frozen").exists() == (kind == "moge")
    assert pangu_jax.load(whole / "final").config.eos_token_ids == (15,)  # the tokenizer's


def test_the_end_is_a_folder_like_any_other(whole: Path) -> None:
    assert all(finding.ok for finding in check.inspect(whole / "final"))
    model = pangu_jax.load(whole / "final")
    tokenizer = Tokenizer.load(whole / "final")
    prompt = chat.encode(tokenizer, [{"role": "user", "content": "What is 3 + 2?"}])
    (completion,) = infer.generate(model, [prompt], infer.Sampling(4), tokenizer=tokenizer)
    assert len(completion.token_ids) > 0


NEVER = {"step", "loss", "grad_norm", "weight_norm", "z", "learning_rate", "tokens", *runs.TIMED}
MOGE_TOO = {"balance", "load_max", "load_spread", "idle_experts", "router_entropy"}


def test_a_line_of_metrics_says_everything(wholes: Callable[[str], Path]) -> None:
    for kind, names in (("dense", NEVER), ("moge", NEVER | MOGE_TOO)):
        for line in runs.lines(wholes(kind) / "metrics.jsonl"):
            assert set(line) == names
            assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=1e-2)
            assert line["memory_gb"] > 0.05


def test_flops_are_those_of_the_products(whole: Path) -> None:
    """Twice for every weight and token, half of the squares of attention, times three."""
    leaves = dict(build.named_leaves(pangu_jax.load(whole / "final", form="separate")))
    weights = sum(
        leaf.size for name, leaf in leaves.items() if leaf.ndim > 1 and "bias" not in name
    )
    attention = sum(2 * 2 * heads * 16 * 64 * 64 / 2 for heads in (2, 2))  # both layers
    flops = 3 * 2 * (2 * 64 * weights + attention)
    for line in runs.lines(whole / "metrics.jsonl"):
        wanted = flops / line["seconds"] / 1e12
        assert line["tflops"] == pytest.approx(wanted, rel=1e-3, abs=5.1e-7)


def test_the_last_weights_have_the_norm_that_is_told(wholes: Callable[[str], Path]) -> None:
    """Of those that are trained."""
    for kind in ("dense", "moge"):
        trained = [
            leaf.astype(np.float64)
            for name, leaf in runs.numbers(wholes(kind), 6).items()
            if name.startswith("['trainable']")
        ]
        norm = np.sqrt(sum((leaf**2).sum() for leaf in trained))
        assert runs.metrics(wholes(kind))[-1]["weight_norm"] == pytest.approx(norm, rel=1e-5)


def test_loads_of_experts_add_up(wholes: Callable[[str], Path]) -> None:
    """A line per checkpoint; every token of its steps chose an expert of each of four groups."""
    folder = wholes("moge")
    lines, tokens = runs.lines(folder / "router.jsonl"), [m["tokens"] for m in runs.metrics(folder)]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line, two in zip(lines, zip(tokens[::2], tokens[1::2], strict=True), strict=True):
        (layer,) = line["load"]
        assert np.array(layer).reshape(4, 2).sum(1).tolist() == [sum(two)] * 4


def test_the_end_is_the_running_mean(wholes: Callable[[str], Path]) -> None:
    found = dict(build.named_leaves(pangu_jax.load(wholes("moge") / "final", form="stacked")))
    numbers = runs.numbers(wholes("moge"), 6)
    for name, leaf in found.items():
        if "qkv_bias" in name:  # frozen as it began
            assert not np.asarray(leaf).any()
            continue
        np.testing.assert_array_equal(leaf, numbers[f"['ema']['{name}']"])
    moved = np.abs(numbers["['ema']['embed']"] - numbers["['trainable']['embed']"])
    assert moved.max() > 1e-4


# --- killed


class Killed(Exception):
    pass


def killed_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """What is left of a program that dies while that step is under way."""
    add = Record.add

    def die(self: Record, taken: record.Taken, metrics: Metrics) -> None:
        add(self, taken, metrics)
        if taken.step == step:
            raise Killed

    patch.setattr(Record, "add", die)


@pytest.mark.parametrize(("kind", "at"), [("dense", 1), ("dense", 4), ("moge", 5)])
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, at: int, home: Path, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever it had written."""
    with pytest.MonkeyPatch.context() as patch:
        killed_at(at, patch)
        with pytest.raises(Killed):
            runs.start(kind, home, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert runs.start(kind, home, tmp_path / "run") == 0
    runs.same(tmp_path / "run", wholes(kind))


def opens(folder: Path) -> bool:
    """Whether a run's folder is a model; where it is none, one line says so."""
    said = ""
    try:
        model = pangu_jax.load(folder)
    except CheckpointError as error:
        said = str(error)
    if said:
        assert said.startswith(str(folder))
        assert len(said.splitlines()) == 1
        return False
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


WHILE = {
    "the data are read": ("dense", "data/data/state.json", 1, False),
    "frozen leaves are written": ("moge", "frozen.*/*", 2, False),
    "a checkpoint is written beside the training": ("dense", "checkpoints/4.*/state*", 3, True),
    "a checkpoint takes its place": ("moge", "checkpoints/4", 1, True),
    "the end is written": ("dense", "*final.partial*/model*", 1, True),
}


@pytest.mark.parametrize(
    "what",
    [
        name if "beside" in name else pytest.param(name, marks=pytest.mark.slow, id=name)
        for name in WHILE
    ],
)
def test_sigkill_while(
    what: str, kill: Killer, home: Path, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    """The program itself. Whatever is left is a model, or one line."""
    kind, place, number, whether = WHILE[what]
    output = tmp_path / "run"
    code = kill(runs.argv(kind, home, output), at=f"{output}/{place}", number=number)
    assert code == -signal.SIGKILL, kill.said.read_text()
    assert opens(output) is whether
    assert not (output / "final").exists()
    assert runs.start(kind, home, output) == 0
    runs.same(output, wholes(kind))
    assert not list(output.rglob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moge"])
def test_sigkill_at_any_touch_of_the_folder(
    kind: str, kill: Killer, home: Path, wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    """Six runs, each killed when it touches a file for some time, until that time never comes."""
    rng, kills = random.Random(0), 0
    for attempt in range(6):
        output = tmp_path / str(attempt)
        command = runs.argv(kind, home, output)
        while True:
            code = kill(command, at=f"{output}*", number=int(10 ** rng.uniform(0, 2.5)))
            kills += code != 0
            opens(output)
            if code == 0:
                break
            assert code == -signal.SIGKILL, kill.said.read_text()
        runs.same(output, wholes(kind))
        shutil.rmtree(output)
    assert kills > 6


@pytest.mark.slow
def test_sigkill_at_any_time(home: Path, whole: Path, tmp_path: Path) -> None:
    """The command as it is typed, killed again and again until it is done."""
    command = [sys.executable, "-m", "train", *runs.argv("dense", home, tmp_path / "run")]
    command += ["--run.save_every", "1"]
    kills = 0
    for seconds in [4, 5, 6, 7, 8, 9, 10, 12, 600]:
        program = subprocess.Popen(
            command, cwd=runs.ROOT, stderr=subprocess.DEVNULL, env=runs.same_programs()
        )
        try:
            assert program.wait(seconds) == 0
            break
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            kills += 1
    assert kills > 0
    assert runs.metrics(tmp_path / "run") == runs.metrics(whole)
    one, two = (folder / "final" / "model.safetensors" for folder in (tmp_path / "run", whole))
    assert one.read_bytes() == two.read_bytes()


# --- asked to stop


@pytest.mark.parametrize(
    ("kind", "sign", "code"), [("dense", signal.SIGINT, 130), ("moge", signal.SIGTERM, 143)]
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    kind: str,
    sign: signal.Signals,
    code: int,
    home: Path,
    wholes: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add = Record.add

    def ask(self: Record, taken: record.Taken, metrics: Metrics) -> None:
        add(self, taken, metrics)
        if taken.step == 3:
            signal.raise_signal(sign)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "add", ask)
        assert runs.start(kind, home, tmp_path / "run") == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "stopped after step 3; the same command goes on" in capsys.readouterr().err
    assert len(runs.metrics(tmp_path / "run")) == 3
    assert runs.steps(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "final").exists()
    assert runs.start(kind, home, tmp_path / "run") == 0
    assert "going on after step 3" in capsys.readouterr().err
    runs.same(tmp_path / "run", wholes(kind))


def test_a_second_ctrl_c_leaves_at_once(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add = Record.add

    def ask(self: Record, taken: record.Taken, metrics: Metrics) -> None:
        add(self, taken, metrics)
        if taken.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "add", ask)
        assert run(home, tmp_path / "run") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert runs.steps(tmp_path / "run") == [2]
    assert run(home, tmp_path / "run") == 0
    runs.same(tmp_path / "run", whole)


def test_asked_at_the_last_step_it_is_done(home: Path, whole: Path, tmp_path: Path) -> None:
    add = Record.add

    def ask(self: Record, taken: record.Taken, metrics: Metrics) -> None:
        add(self, taken, metrics)
        if taken.step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "add", ask)
        assert run(home, tmp_path / "run") == 0
    runs.same(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_program_itself_saves_after_sigterm(
    kill: Killer, home: Path, whole: Path, tmp_path: Path
) -> None:
    """And ends with the exit code that tells so."""
    output = tmp_path / "run"
    command = runs.argv("dense", home, output)
    assert kill(command, signal.SIGTERM, at=f"{output}/checkpoints/2.*") == 143
    assert not (output / "final").exists()
    (*_, last) = runs.steps(output)
    assert 2 <= last < 6
    assert run(home, output) == 0
    runs.same(output, whole)


# --- checkpoints


def test_only_the_newest_checkpoints_stay(home: Path, tmp_path: Path) -> None:
    """How many may change between two starts."""
    output, flags = tmp_path / "run", ("--run.save_every", "1")
    assert run(home, output, *flags, "--run.keep", "3") == 0
    assert runs.steps(output) == [4, 5, 6]
    shutil.rmtree(output / "final")
    for step in (5, 6):
        shutil.rmtree(output / "checkpoints" / str(step))
    assert run(home, output, *flags, "--run.keep", "1") == 0
    assert runs.steps(output) == [6]


def copied(folder: Path, target: Path, **paths: Path) -> Path:
    """A finished run as it was before `final`, elsewhere; what it began with may be, too."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "final")
    model = {name: str(path) for name, path in paths.items() if name != "data"}
    overrides: dict[str, Any] = {"run": {"output": str(target)}, "model": model}
    overrides |= {"data": {"path": str(paths["data"])}} if "data" in paths else {}
    config = configs.load(str(target / "config.toml"), overrides)
    (target / "config.toml").write_text(configs.to_toml(config))
    return target


def test_a_damaged_checkpoint_is_one_line(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That says what to do: the run goes on from the one before, to the same bits."""
    output = copied(whole, tmp_path / "run")
    damaged = output / "checkpoints" / "6"
    for file in damaged.rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
    assert run(home, output) == 2
    error = one_error(capsys)
    assert error.startswith(f"error: {damaged}: not a checkpoint of this run (")
    assert error.endswith("remove it to go on from the one before")
    shutil.rmtree(damaged)
    assert run(home, output) == 0
    runs.same(output, whole)


# --- refused


def test_a_mistake_is_not_another_run(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corrected command goes on in the same folder."""
    (tmp_path / "bad.jsonl").write_text("{")
    for mistake in (
        ("--data.path", str(tmp_path / "missing.jsonl")),
        ("--data.path", str(tmp_path / "bad.jsonl")),
        ("--optimizer.freeze", "x"),
    ):
        assert run(home, tmp_path / "run", *mistake) == 2
        one_error(capsys)
    assert run(home, tmp_path / "run") == 0
    runs.same(tmp_path / "run", whole)


def test_a_complete_run_is_left_alone(
    home: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.time()
    assert run(home, whole) == 0
    assert "complete" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").stat().st_mtime < before


def test_another_run_is_refused(
    home: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--run.save_every", "5", "--run.keep", "9", "--run.failure", "skip", "--run.spike", "9")
    assert run(home, whole, "--data.batch", "3", *same, "--step.z_loss", "1e-4") == 2
    error = one_error(capsys)
    assert "data.batch was 2, now 3; step.z_loss was 0.0, now 0.0001" in error
    assert "run." not in error.replace("run.output", "")


def test_two_at_a_time_are_refused(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that comes too late changes nothing."""
    output = copied(whole, tmp_path / "run")
    before = (output / "config.toml").read_bytes()
    with files.locked(output / ".lock"):
        assert run(home, output, "--run.save_every", "1") == 2
    assert "another process is at work there" in one_error(capsys)
    assert (output / "config.toml").read_bytes() == before


def test_changed_data_are_refused(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until they are what they were."""
    data, text = tmp_path / "data.jsonl", (home / "talks.jsonl").read_text()
    output, flags = copied(whole, tmp_path / "run", data=data), ("--data.path", str(data))
    data.write_text(text.replace("+ 2", "+ 3"))
    assert run(home, output, *flags) == 2
    assert "changed since the run began" in one_error(capsys)
    data.write_text(text)
    assert run(home, output, *flags) == 0
    runs.same(output, whole)


def test_a_changed_tokenizer_is_refused(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_preset("nano", tokenizer)
    output = copied(whole, tmp_path / "run", tokenizer=tokenizer)
    file = tokenizer / "tokenizer_config.json"
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}[unused10]{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert run(home, output, "--model.tokenizer", str(tokenizer)) == 2
    assert "the tokenizer or the model changed since the run began" in one_error(capsys)


def test_another_model_of_the_same_name_is_refused(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.toml"
    output = copied(whole, tmp_path / "run", preset=preset)
    preset.write_text(runs.TINY.replace("rope_theta = 10_000.0", "rope_theta = 5_000.0"))
    assert run(home, output, "--model.preset", str(preset)) == 2
    assert "the model changed since the run began" in one_error(capsys)


def test_a_run_that_went_on_is_another_model(home: Path, whole: Path, tmp_path: Path) -> None:
    """Where another run begins with it: at a checkpoint, or at its end."""
    base, run = copied(whole, tmp_path / "base"), RunFolder(tmp_path / "run")
    run.path.mkdir()
    model = ModelSection(path=str(base))
    config = dataclasses.replace(config_of(whole), model=model)
    check = lambda: run.check_inputs(config, pangu_jax.load(base).config, "the data")
    check()
    check()
    (base / "checkpoints" / "6").rename(tmp_path / "6")
    with pytest.raises(InputError, match="the model changed since the run began"):
        check()
    (tmp_path / "6").rename(base / "checkpoints" / "6")
    check()
    shutil.copytree(whole / "final", base / "final")
    with pytest.raises(InputError, match="the model changed since the run began"):
        check()


def test_a_foreign_folder_is_not_written_to(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "file"):
        assert run(home, tmp_path / name) == 2
        assert "no folder of a run" in one_error(capsys)
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "file").read_text() == "kept"


def test_what_a_first_write_left_is_no_obstacle(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.partial-1").write_text("half")
    (tmp_path / "run" / ".lock").touch()
    config = configs.load(str(home / "run.toml"), {"run": {"output": str(tmp_path / "run")}})
    assert RunFolder.of(config).path == tmp_path / "run"


# --- failures


def config_of(folder: Path) -> Config:
    return configs.load(str(folder / "config.toml"), {})


def batches_of(folder: Path, reader: Any = sft.READER, phase: int = 0) -> Any:
    """Any batch of a finished run, by its number in the phase."""
    config = config_of(folder)
    home = loop.tokenizer_folder(config)
    data = Data(config, reader, Tokenizer.load(home), home, folder / "data")
    return data.feed(config.stages[phase])


def trained_by_hand(folder: Path, batches: list[Batch]) -> dict[str, Any]:
    """The weights of a run's model after these batches, without anything that a run is."""
    config = config_of(folder)
    preset = pangu_jax.preset(str(config.model.preset))
    key = jax.random.key(config.run.seed)
    model = pangu_jax.init(preset, key, dtype="float32", form="stacked")
    recipe = SharedRecipe(config, model)
    step, state = jax.jit(recipe.step(), donate_argnames="state"), recipe.start(model)
    for batch in batches:
        state, _ = step(state, batch)
    return {**state.trainable, **state.frozen}


def same_weights(folder: Path, wanted: dict[str, Any]) -> None:
    found = dict(build.named_leaves(pangu_jax.load(folder / "final", form="stacked")))
    assert set(found) == set(wanted)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a loss and gradients that are no numbers of certain batches of a phase, by their
    numbers, and of all after one.
    """
    since = Feed.since

    def of(*numbers: int, after: int = 10**6, rows: int = 2) -> None:
        def poisoned(self: Feed, first: int) -> Iterator[Batch]:
            for number, batch in enumerate(since(self, first), first):
                if len(batch.tokens) == rows and (number in numbers or number > after):
                    batch = dataclasses.replace(batch, weights=batch.weights * np.float32("nan"))
                yield batch

        monkeypatch.setattr(Feed, "since", poisoned)

    return of


SKIP = ("--run.failure", "skip")


def test_a_failure_stops_the_run(
    poison: Callable[..., None],
    home: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And says which checkpoint is good, and what can be done."""
    poison(4)
    assert run(home, tmp_path / "run") == 2
    assert one_error(capsys) == (
        "error: the loss is nan at step 5; the last good checkpoint is of step 4: --run.failure "
        "skip goes back to it and leaves those batches out; or begin another run with a lower "
        "optimizer.learning_rate"
    )
    assert runs.steps(tmp_path / "run") == [2, 4]
    assert runs.metrics(tmp_path / "run") == runs.metrics(whole)[:4]
    assert opens(tmp_path / "run")
    assert run(home, tmp_path / "run", *SKIP) == 0
    feed = batches_of(whole)
    same_weights(tmp_path / "run", trained_by_hand(whole, [feed[i] for i in (0, 1, 2, 3, 5, 6)]))


def test_a_failure_before_the_first_checkpoint(
    poison: Callable[..., None], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(1)
    assert run(home, tmp_path / "run") == 2
    assert one_error(capsys) == (
        "error: the loss is nan at step 2; there is no checkpoint yet: begin another run with a "
        "lower optimizer.learning_rate"
    )
    assert run(home, tmp_path / "run", *SKIP) == 2
    assert "there is no checkpoint yet, and the run went back 0 times" in one_error(capsys)
    assert runs.steps(tmp_path / "run") == []
    assert not opens(tmp_path / "run")


def test_batches_that_fail_are_left_out(
    poison: Callable[..., None],
    home: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those since the checkpoint and no others: the run ends as one that was never given them."""
    poison(3, 5)
    assert run(home, tmp_path / "run", *SKIP) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "back to" in line] == [
        "the loss is nan at step 4: back to step 2, and its next 2 batches are left out",
        "the loss is nan at step 4: back to step 2, and its next 4 batches are left out",
    ]
    feed = batches_of(whole)
    batches = [feed[number] for number in (0, 1, 6, 7, 8, 9)]
    same_weights(tmp_path / "run", trained_by_hand(whole, batches))
    lines = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [int((b.segments > 0).sum()) for b in batches]
    assert lines[:2] == runs.metrics(whole)[:2]
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("at", [4, 5])
def test_killed_after_it_went_back(
    at: int, poison: Callable[..., None], home: Path, whole: Path, tmp_path: Path
) -> None:
    """Before the next checkpoint and after it: what was left out stays out."""
    poison(2)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(at, patch)
        with pytest.raises(Killed):
            run(home, tmp_path / "run", *SKIP)
    assert run(home, tmp_path / "run", *SKIP) == 0
    feed = batches_of(whole)
    same_weights(tmp_path / "run", trained_by_hand(whole, [feed[i] for i in (0, 1, 3, 4, 5, 6)]))


def test_a_run_does_not_go_back_for_ever(
    poison: Callable[..., None], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(after=2)
    assert run(home, tmp_path / "run", *SKIP) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "back to step 2" in line]) == loop.MOST_BACK
    assert said[-1] == (
        "error: the loss is nan at step 3; the last good checkpoint is of step 2, and the run went "
        f"back {loop.MOST_BACK} times: begin another with a lower optimizer.learning_rate"
    )
    assert runs.steps(tmp_path / "run") == [2]


def test_a_checkpoint_is_good_or_it_is_none(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate at which the weights leave float32's range in the first step, before any loss does."""
    flags = ("--optimizer.learning_rate", "1e30", "--run.save_every", "1")
    for _ in range(2):
        assert run(home, tmp_path / "run", *flags) == 2
        error = one_error(capsys)
        assert error.startswith("error: the norm of the weights is inf at step 1; there is no")
    assert runs.metrics(tmp_path / "run") == []


def test_a_spike_is_a_failure(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that are learnt by heart, and one of something else."""
    rows, output = [{"text": "7 " * 29}] * 20, tmp_path / "run"
    rows[0] = {"text": "Zq! xv? ~ JKW {%} ^ ü"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.path", str(tmp_path / "data.jsonl"), "--run.steps", "30"]
    flags += ["--run.spike", "2", *SKIP, "--run.seed", "227"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "SPIKE_WINDOW", 5)
        assert runs.start("text", home, output, *flags) == 0
    found = re.findall(
        r"the loss is \d\.\d{3}, after a median of 0\.\d{3}, at step (\d+): "
        r"back to step 18, and its next (\d) batches are left out",
        capsys.readouterr().err,
    )
    assert found == [("19", "1"), ("20", "3")]
    feed = batches_of(output, pretrain.READER)
    odd = [number for number in range(33) if len(np.unique(feed[number].tokens)) > 9]
    assert odd == [1, 18, 20]  # the first, when nothing is known yet
    batches = [feed[number] for number in range(33) if number not in (18, 19, 20)]
    same_weights(output, trained_by_hand(output, batches))


# --- several sources and phases

SEVERAL = """
[model]
preset = "{home}/tiny.toml"
tokenizer = "nano"
[data]
length = 64
batch = 2
[[source]]
name = "talks"
path = "{home}/talks.jsonl"
[[source]]
name = "texts"
path = "{home}/texts.jsonl"
[[phase]]
steps = 3
weights = {{ talks = 1.0, texts = 3.0 }}
[[phase]]
steps = 3
learning_rate = 1e-3
length = 32
batch = 3
[optimizer]
learning_rate = 1e-2
warmup_steps = 2
[run]
output = "unused"
steps = 6
save_every = 2
"""


@pytest.fixture(scope="module")
def several(home: Path) -> Path:
    """A run of two sources and two phases, with rows of another length in each."""
    (home / "several.toml").write_text(SEVERAL.format(home=home))
    assert runs.start("several", home, home / "several") == 0
    return home / "several"


def test_phases_follow_each_other(several: Path) -> None:
    first, second = (batches_of(several, pretrain.READER, phase) for phase in (0, 1))
    batches = [first[i] for i in range(3)] + [second[i] for i in range(3)]
    assert {batch.tokens.shape for batch in batches} == {(2, 64), (3, 32)}
    same_weights(several, trained_by_hand(several, batches))
    lines = runs.metrics(several)
    assert [line["tokens"] for line in lines] == [int((b.segments > 0).sum()) for b in batches]
    # A warm-up of two steps, the last step of each phase, a jump between them.
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose([*rates[:3], rates[5]], [5e-3, 1e-2, 1e-3, 1e-4], rtol=1e-6)
    assert 1e-4 < rates[4] < rates[3] < 1e-3


@pytest.mark.parametrize("at", [3, 5])
def test_killed_at_the_border_of_two_phases(
    at: int, home: Path, several: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(at, patch)
        with pytest.raises(Killed):
            runs.start("several", home, tmp_path / "run")
    assert runs.start("several", home, tmp_path / "run") == 0
    runs.same(tmp_path / "run", several)


def test_a_failure_behind_a_border_is_left_out(
    poison: Callable[..., None], home: Path, several: Path, tmp_path: Path
) -> None:
    """The checkpoint before it is of the first phase."""
    poison(0, rows=3)
    assert runs.start("several", home, tmp_path / "run", *SKIP) == 0
    lines = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("length = 32", "length = 33", "a [[phase]] is another"),
        ("learning_rate = 1e-3", "learning_rate = 2e-3", "a [[phase]] is another"),
        ("texts = 3.0", "texts = 2.0", "a [[phase]] is another"),
        ('name = "talks"', 'name = "talks"\nweight = 2.0', "a [[source]] is another"),
    ],
)
def test_changed_phases_and_sources_are_refused(
    old: str,
    new: str,
    what: str,
    home: Path,
    several: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = SEVERAL.format(home=home)
    assert old in text
    (home / "other.toml").write_text(text.replace(old, new))
    assert runs.start("other", home, several) == 2
    assert f"{several} holds another run: {what}. Choose" in one_error(capsys)


def test_a_phase_whose_rows_hold_nothing_is_refused_at_once(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after all the steps before it."""
    phases = "[[phase]]\nsteps = 3\n[[phase]]\nsteps = 3\nlength = 4\n"
    (tmp_path / "run.toml").write_text((home / "run.toml").read_text() + phases)
    assert run(tmp_path, tmp_path / "run") == 2
    assert "nothing to learn from in rows of 4 tokens" in one_error(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- data, models


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
    text: str, complaint: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    assert run(home, tmp_path / "run", "--data.path", str(tmp_path / "data.jsonl")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint in error


def test_what_cannot_be_learnt_is_left_out_and_told(
    home: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad lines by request, examples that are too long anyway."""
    said = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "7 " * 80}]
    lines = (home / "talks.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join([*lines[:7], "{\n", *lines[7:], json.dumps({"messages": said})]))
    assert run(home, tmp_path / "run", "--data.path", str(data), "--data.bad", "skip") == 0
    error = capsys.readouterr().err
    assert "1 bad lines are left out" in error
    assert "1 of 31 examples are longer than data.length (64)" in error
    assert runs.metrics(tmp_path / "run") == runs.metrics(whole)


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
    assert run(tmp_path, tmp_path / "run", *freeze) == 0
    before, after = pangu_jax.load(base), pangu_jax.load(tmp_path / "run" / "final")
    assert after.dtype == "bfloat16"
    np.testing.assert_array_equal(after.embed[...], before.embed[...])
    for old, new in zip(before.blocks, after.blocks, strict=True):
        np.testing.assert_array_equal(new.attention.qkv[...], old.attention.qkv[...])
        assert (np.asarray(new.attention.out[...]) != np.asarray(old.attention.out[...])).any()
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "run" / "final" / name).read_bytes() == (base / name).read_bytes()


def test_a_pattern_that_freezes_nothing_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "run", "--optimizer.freeze", "embedd") == 2
    assert "no leaf matches 'embedd'; did you mean embed?" in one_error(capsys)


def test_rows_longer_than_the_model_are_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "run", "--data.length", "256") == 2
    assert "data.length (256) is more than the model's 128 positions" in one_error(capsys)


def test_errors_are_of_the_family() -> None:
    assert issubclass(TrainingError, PanguError)
    assert issubclass(record.Failure, TrainingError)
    assert issubclass(InputError, PanguError)
