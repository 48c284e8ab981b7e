"""The demo's promises that do not need its whole run (`make demo` and CI do that)."""

from pathlib import Path

import pytest

from infer import demo
from pangu_jax.errors import InputError


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / demo.MARK).write_text("")
    demo._remove_earlier(folder)
    assert not folder.exists()
    demo._remove_earlier(folder)


def test_somebody_elses_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "model.safetensors").write_text("trained for a week")
    (tmp_path / "link").symlink_to("nano")
    for name in ("nano", "link"):
        with pytest.raises(InputError, match="was not written by a demo"):
            demo._remove_earlier(tmp_path / name)
    assert (tmp_path / "nano" / "model.safetensors").exists()


def test_one_model_from_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "PROMPT", 5)
    monkeypatch.setattr(demo, "NEW", 4)
    monkeypatch.setattr(demo, "BATCH", 2)
    assert demo._one_model("nano-moge", tmp_path / "nano-moge")
    assert (tmp_path / "nano-moge" / "model.safetensors").exists()
