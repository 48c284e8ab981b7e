"""The optimisations one by one: all of them choose the tokens of the naive program."""

import jax
import pytest

import pangu_jax
from infer.bench import ablate, measure

STEPS = (
    "no cache: all tokens again for each",
    "+ KV cache",
    "+ a leaf for each layer",
    "+ 32 tokens a dispatch",
    "+ kernels",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_every_program_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.bench.bounds.BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr("infer.bench.bounds.FLOPS_SIDE", {"cpu": 64})
    model = pangu_jax.init(pangu_jax.preset(name), jax.random.key(0), dtype="float32")
    sides = ablate.sides(model, length=20, batch=2)
    assert tuple(side.name for side in sides[:5]) == STEPS
    assert [side.name for side in sides[5:]] == ["+ w8a8", "+ int8 cache"]
    assert sides[5].step_bytes < sides[0].step_bytes / 2
    found = measure.measure(model.config, model.dtype, sides, 9, 40, 2, 1)
    for speed in found.speeds[:5]:
        assert speed.same_tokens == 1, speed.program
        assert speed.decode_tokens_per_s > 0
    text = measure.table(found)
    assert text.count("| decode, 2 at a time, ") == 7
    assert "+ kernels: 100% of its 2 x 40 tokens" in text


def test_a_quantised_model_is_not_quantised_again() -> None:
    model = pangu_jax.init(pangu_jax.preset("nano"), jax.random.key(0), dtype="float32")
    sides = ablate.sides(pangu_jax.quantize(model, "w8a16"), length=20, batch=1)
    assert tuple(side.name for side in sides) == STEPS
