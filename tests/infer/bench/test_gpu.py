"""`make bench-gpu`'s program, with small models where there is no card."""

import subprocess
import sys

import pytest

from infer.bench import gpu
from pangu_jax import preset
from pangu_jax.kernels import native

SMALL = ("--dense", "nano", "--moge", "nano-moge", "--tokens", "8", "--context", "64")


def rows(text: str) -> list[list[str]]:
    """The cells of tables, without heads."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    at = [i for i, line in enumerate(lines) if line[0] == "---"]
    return lines[at[0] + 1 :]


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    monkeypatch.setattr(gpu, "CALLS", 1)


def test_operations(capsys: pytest.CaptureFixture[str]) -> None:
    with native.without():
        assert gpu.main(["operations", *SMALL, "--batch", "2"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 3 * 2 + 2 * 4
    for row in found:
        assert len(row) == len(gpu.HEAD)
        assert row[-1] == "0.0e+00"  # one program twice


def test_a_difference_is_marked_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a kernel that is a tenth too large."""
    import jax.numpy as jnp

    calls = iter(range(10**6))
    wrong = lambda x: x * jnp.asarray([1, 1.1][next(calls) % 2], x.dtype)
    row = gpu.compare("wrong", wrong, [jnp.ones(8)], 1.0, 1.0, (1.0, 1.0))
    assert row[-1].endswith("!")
    monkeypatch.setattr(gpu, "experts_rows", lambda *_: [row])
    monkeypatch.setattr(gpu, "attention_rows", lambda *_: [])
    assert gpu.main(["operations", *SMALL]) == 1
    assert "!" in capsys.readouterr().out


@pytest.mark.slow
def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    with native.without():
        assert gpu.main(["models", *SMALL, "--batch", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [["nano, bf16", "1 x 64"], ["nano-moge, w8a8", "1 x 64"]]
    assert all(float(cell.replace(",", "")) > 0 for row in found for cell in row[2:])


def test_what_does_not_fit_is_said() -> None:
    rows = gpu.model_rows("nano", preset("nano"), None, [2**40], 64)
    assert "no room" in next(iter(rows))[2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--dense", "none"], "none"), (["--context", "8"], "at least 16"), (["--batch", "0"], "1")],
)
def test_bad_input_is_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["models", *flags])
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_it_needs_no_other_packages() -> None:
    """Than those of `.ci/gpu-packages.txt`."""
    others = ("beartype", "grain", "prompt_toolkit", "jinja2", "pyarrow", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import infer.bench.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
