"""The demo, with very little of everything."""

import dataclasses
import json
from pathlib import Path

import pytest

import pangu_jax
from train import __main__ as door
from train import demo, loop, sft, tasks
from train.commands import Demo
from train.config import Config
from train.data.feed import Rows
from train.data.mixture import Data
from train.tasks import files


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, one question of each kind, short answers."""
    whole = demo.configuration

    def configuration(command: Demo, folder: Path) -> Config:
        config = whole(command, folder)
        run = dataclasses.replace(config.run, steps=2, save_every=1)
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=1)
        return dataclasses.replace(config, run=run, optimizer=optimizer)

    monkeypatch.setattr(demo, "configuration", configuration)
    for name, value in (("EXAMPLES", 32), ("HELD_OUT", 1), ("MOST", 4)):
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("model", ["nano", pytest.param("nano-moge", marks=pytest.mark.slow)])
def test_the_demo_shows_all_of_it(model: str, tmp_path: Path, capsys) -> None:
    flags = ["demo", "--model", model, "--output", str(tmp_path), "--seed", "7"]
    assert door.main(flags) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / f"{model}-7"
    for task in tasks.TASKS:
        assert f"| {task} " in out
    assert "difficulty 3 and more, slow: 0.0% right" in out
    assert out.count("you   ") == len(tasks.TASKS)
    assert f"chat --model {folder}/run/final" in err
    found = json.loads((folder / "eval.json").read_text())
    assert len(found["scores"]) > 0
    assert (folder / "accuracy.png").exists()
    assert pangu_jax.load(folder / "run" / "final").config == pangu_jax.preset(model)
    assert "going on" not in err


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_second_demo_does_not_train_again(tmp_path: Path, capsys) -> None:
    flags = ["demo", "--output", str(tmp_path)]
    assert door.main(flags) == 0
    first, _ = capsys.readouterr()
    assert door.main(flags) == 0
    second, err = capsys.readouterr()
    assert "the run is complete" in err
    answers = lambda text: [line for line in text.splitlines() if "tokens/s" not in line]
    assert answers(first) == answers(second)


@pytest.mark.parametrize("model", ["nano", "nano-moge"])
def test_the_whole_demo_goes_through_its_examples_about_once(model: str, tmp_path: Path) -> None:
    config = demo.configuration(Demo(model=model), tmp_path)
    count = 640
    files.write(tmp_path / "tasks", list(tasks.TASKS), count, 0, 0)
    home = loop.tokenizer_folder(config)
    tokenizer = pangu_jax.Tokenizer.load(home)
    (store,) = Data(config, sft.READER, tokenizer, home, tmp_path / "data").stores.values()
    rows = Rows(store, config.data.length, config.data.packing, sft.READER.cut)
    assert rows.left_out == 0
    assert demo.EXAMPLES * len(rows) / config.data.batch == pytest.approx(count, rel=0.1)
