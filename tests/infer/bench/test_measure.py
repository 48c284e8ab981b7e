"""The bench command: its formulas, and (slow) the 1B shape on this machine."""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pangu_jax
from infer import __main__ as door
from infer.bench import bounds, measure


@pytest.mark.parametrize("name", ["embedded-1b", "embedded-7b", "pro-moe-72b"])
def test_prefill_flops_are_about_two_per_active_parameter(name: str) -> None:
    config = pangu_jax.preset(name)
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    layers = config.num_active_parameters - vocabulary
    got = bounds.prefill_flops(config, prompt=1024, batch=3)
    attention = 2 * 2 * config.num_heads * config.head_dim * config.num_layers * 1024 * 1024 / 2
    head = 2 * config.vocab_size * config.hidden_size
    assert got == pytest.approx(3 * (2 * layers * 1024 + attention + head))


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        ("embedded-1b", 1, 2 * 1_155_912_192 + 100 * 79_872),
        ("embedded-7b", 1, 2 * (8_030_887_936 - 628_228_096) + 100 * 139_264),
        ("embedded-7b", 4, 2 * (8_030_887_936 - 628_228_096) + 400 * 139_264),
        ("pro-moe-72b", 1, 2 * (16_498_139_136 - 785_285_120) + 100 * 196_608),
        # Every expert is read once the batch picks them all.
        ("pro-moe-72b", 64, 2 * (71_988_781_056 - 785_285_120) + 6400 * 196_608),
    ],
)
def test_bytes_of_a_step(name: str, batch: int, expected: int) -> None:
    model = pangu_jax.abstract(pangu_jax.preset(name))
    assert bounds.step_bytes(model, 100, batch) == expected


def test_a_small_run_prints_numbers(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr(bounds, "FLOPS_SIDE", {"cpu": 64})
    argv = ["bench", "--model", "nano", "--prompt", "8", "--tokens", "96", "--repeats", "3"]
    assert door.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(measure.Result)} == result.keys()
    assert min(v for v in result.values() if isinstance(v, float | int)) >= 0
    (speed,) = result.pop("speeds")
    assert speed["program"] == "pangu_jax"
    assert speed["same_tokens"] == 1
    again = measure.Result(**result, speeds=[measure.Speed(**speed)])
    assert "| decode, 1 at a time |" in measure.table(again)


def test_prefill_and_decode_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr(bounds, "FLOPS_SIDE", {"cpu": 64})

    def slow(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        time.sleep(0.4)
        first()
        time.sleep(0.01 * (tokens - 1))
        return np.zeros((len(prompts), tokens))

    sides = [measure.Side("slow", slow, 10**9)]
    config, dtype = pangu_jax.preset("nano"), jnp.dtype("float32")
    (speed,) = measure.measure(config, dtype, sides, 8, 11, 2, 3).speeds
    assert 0 < speed.prefill_tokens_per_s <= 2 * 8 / 0.4
    assert 0 < speed.decode_tokens_per_s <= 2 / 0.01
    assert 0 < speed.decode_gb_per_s <= 1 / 0.01
    assert speed.prefill_fastest >= speed.prefill_tokens_per_s
    assert speed.decode_fastest >= speed.decode_tokens_per_s


@pytest.mark.parametrize(
    "argv", [["--prompt", "0"], ["--tokens", "1"], ["--prompt", "1020"]], ids=str
)
def test_senseless_runs_are_refused(capsys, argv: list[str]) -> None:
    assert door.main(["bench", "--model", "nano", *argv]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speed_of_the_1b_shape(dtype: str) -> None:
    """Far below what docs/benchmarks.md records: this fails on a mistake, not on a busy machine."""
    model = pangu_jax.init(pangu_jax.preset("embedded-1b"), jax.random.key(0), dtype=dtype)
    side = measure.Side("ours", measure.ours(model), bounds.step_bytes(model, 136, 1))
    result = measure.measure(model.config, model.dtype, [side], 128, 17, 1, 2)
    print("\n" + measure.table(result))
    (speed,) = result.speeds
    tflops = result.prefill_flops * speed.prefill_tokens_per_s / 128 / 1e12
    assert tflops > 0.2 * result.bound_tflops
    if dtype == "float32":
        assert speed.decode_gb_per_s > 0.25 * result.bound_gb_per_s
