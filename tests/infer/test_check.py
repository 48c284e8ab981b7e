"""`check`: one honest report, good and bad."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from infer import __main__ as door
from infer import check
from tests import folders

ORACLE = Path(__file__).parent.parent / "oracle"


def report(folder: Path, skip_run: bool = True) -> dict[str, check.Finding]:
    return {finding.what: finding for finding in check.inspect(folder, skip_run)}


def test_a_good_moge_folder() -> None:
    found = report(ORACLE / "moge-tiny", skip_run=False)
    assert list(found) == [
        "config", "tensors", "parameters", "values", "router_scale", "generation"
    ]  # fmt: skip
    assert all(finding.ok for finding in found.values())
    assert "16 experts in 8 groups" in found["config"].detail
    assert "F32, in 1 file" in found["tensors"].detail
    assert "all ones" not in found["router_scale"].detail


def test_counts_and_ignored_tensors(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    folders.write(tmp_path, folders.DENSE, {**tensors, **extra}, shards=3)
    found = report(tmp_path)
    assert f"{len(tensors)} as expected" in found["tensors"].detail
    assert "in 3 files, 1 ignored" in found["tensors"].detail
    total = sum(tensor.size for tensor in tensors.values())
    assert f"{total:,}, {total:,} active" in found["parameters"].detail


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite(tmp_path: Path, bad: float, dtype: str) -> None:
    tensors = folders.random_tensors(folders.MOGE)
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors[name][3, 2] = bad
    folders.write(tmp_path, folders.MOGE, tensors, dtype=dtype)
    last = list(report(tmp_path).values())[-1]
    assert not last.ok
    assert name in last.detail
    assert "1 NaN or Inf" in last.detail


def test_a_matrix_of_zeros(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0
    folders.write(tmp_path, folders.DENSE, tensors)
    assert "all zeros" in report(tmp_path)["values"].detail


def test_untrained_router_scale_is_mentioned(tmp_path: Path) -> None:
    tensors = folders.random_tensors(folders.MOGE)
    for name in tensors:
        if name.endswith("router_scale"):
            tensors[name][:] = 1
    folders.write(tmp_path, folders.MOGE, tensors)
    assert "all ones" in report(tmp_path)["router_scale"].detail


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.write(tmp_path / "good", folders.DENSE, dtype="bfloat16")
    assert door.main(["check", "--model", str(tmp_path / "good"), "--skip-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok    config")
    assert "FAIL" not in out
    tensors = folders.random_tensors(folders.DENSE)
    del tensors["model.norm.weight"]
    folders.write(tmp_path / "bad", folders.DENSE, tensors)
    assert door.main(["check", "--model", str(tmp_path / "bad"), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is False
    assert "missing tensor model.norm.weight" in shown["findings"][-1]["detail"]
    assert door.main(["check", "--model", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().out


def test_pieces_cover_everything() -> None:
    values = np.arange(10).astype(ml_dtypes.bfloat16).reshape(2, 5)
    pieces = list(check._pieces(values, limit=4))
    assert [piece.size for piece in pieces] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), values.reshape(-1))
