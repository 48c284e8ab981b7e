"""The same weights in PyTorch and llama.cpp, which share no code with ours."""

import jax
import numpy as np
import pytest

import pangu_jax
from infer import __main__ as door
from infer.bench import command, measure


def check(run: measure.Program, prompts: np.ndarray, own: np.ndarray, dtype: str) -> None:
    """In bf16 a near tie may fall the other way, and then all that follows."""
    calls = []
    theirs = run(prompts, own.shape[1], lambda: calls.append(1))
    assert calls == [1]
    assert theirs.shape == own.shape
    if dtype == "float32":
        np.testing.assert_array_equal(theirs, own)
    else:
        assert np.mean(theirs[:, 0] == own[:, 0]) > 0.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_a_peer_chooses_our_tokens(name: str, dtype: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from infer.bench import peer

    model = pangu_jax.init(pangu_jax.preset(name), jax.random.key(0), dtype=dtype)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 11))
    own = measure.ours(model)(prompts, 12, lambda: None)
    found = peer.programs(model)
    assert len(found) == (1 if model.config.moge is None else 2)
    for run in found.values():
        check(run, prompts, own, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_chooses_our_tokens(dtype: str) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from infer.bench import llama

    model = pangu_jax.init(pangu_jax.preset("nano"), jax.random.key(0), dtype=dtype)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 11))
    own = measure.ours(model)(prompts, 12, lambda: None)
    ((name, run),) = llama.programs(model, 23).items()
    assert name.startswith("llama-cpp-python ")
    for _ in range(2):  # nothing is left over from the last prompt
        check(run, prompts, own, dtype)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--peer", "--recipe", "w8a8"], "--peer compares float models"),
        (["--peer", "--ablate"], "one at a time"),
        (["--engine", "--peer"], "one at a time"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.main(["bench", "--model", "nano", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["nano-moge"], ["nano", "--batch", "2"]], ids=str)
def test_what_llama_cpp_cannot_is_said(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is the only one that is installed."""
    monkeypatch.setattr(command, "_installed", lambda *packages: packages == command.LLAMA)
    assert door.main(["bench", "--peer", "--model", *flags]) == 2
    assert "dense models and --batch 1" in capsys.readouterr().err
