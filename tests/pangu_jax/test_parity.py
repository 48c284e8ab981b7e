"""The numbers are the reference's: stored outputs of a reference implementation, and an independent
forward.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pangu_jax
from tests import folders, reference

ORACLE = Path(__file__).parent.parent / "oracle"
STRICT, WEIGHTS = 3e-4, 5e-5


class Oracle:
    """A stored model, and the reference's outputs for it."""

    def __init__(self, name: str, form: str):
        self.name, self.expected = name, np.load(ORACLE / name / "expected.npz")
        self.model = pangu_jax.load(ORACLE / name, form=form)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.expected[key]


@pytest.fixture(scope="module", params=["dense-tiny", "moge-tiny"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["separate", "stacked"])
def oracle(request: pytest.FixtureRequest, name: str) -> Oracle:
    return Oracle(name, request.param)


@pytest.mark.parametrize("i", range(4))
def test_logits(oracle: Oracle, i: int) -> None:
    logits = oracle.model(oracle[f"prompt_{i}_input_ids"][None])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], oracle[f"prompt_{i}_logits"], atol=STRICT, rtol=0)


@pytest.mark.parametrize("i", range(4))
def test_every_layer(oracle: Oracle, i: int) -> None:
    trace = pangu_jax.trace(oracle.model, oracle[f"prompt_{i}_input_ids"][None])
    close = lambda got, key, atol: np.testing.assert_allclose(
        got, oracle[f"prompt_{i}_{key}"], atol=atol, rtol=0
    )
    close(trace.hidden[:, 0], "hidden", STRICT)
    close(trace.final_norm[0], "final_norm", STRICT)
    if oracle.name == "dense-tiny":
        assert trace.router_logits is trace.experts is trace.weights is None
        return
    close(trace.router_logits[:, 0], "router_logits", STRICT)
    close(trace.weights[:, 0], "topk_weights", WEIGHTS)
    np.testing.assert_array_equal(trace.experts[:, 0], oracle[f"prompt_{i}_topk_ids"])


def test_left_padded_batch(oracle: Oracle) -> None:
    mask = oracle["batch_attention_mask"]
    logits = np.asarray(oracle.model(oracle["batch_input_ids"], attention_mask=mask))
    assert np.isfinite(logits).all()
    real = mask == 1
    np.testing.assert_allclose(logits[real], oracle["batch_logits"][real], atol=STRICT, rtol=0)


def test_right_padding_and_holes_equal_left_padding(oracle: Oracle) -> None:
    """Where the padding lies does not matter: right of the prompt, or between its tokens."""
    prompts = [oracle[f"prompt_{i}_input_ids"] for i in range(3)]
    width = 16
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (6, width)).astype(np.int32)  # padding holds arbitrary ids
    mask = np.zeros((6, width), bool)
    for i, prompt in enumerate(prompts):
        mask[i, : len(prompt)] = True
        mask[i + 3, np.sort(rng.permutation(width)[: len(prompt)])] = True
        tokens[i][mask[i]] = tokens[i + 3][mask[i + 3]] = prompt
    logits = np.asarray(oracle.model(tokens, attention_mask=mask))
    for row in range(6):
        expected = oracle[f"prompt_{row % 3}_logits"]
        np.testing.assert_allclose(logits[row][mask[row]], expected, atol=STRICT, rtol=0)


def test_trace_takes_masks(oracle: Oracle) -> None:
    mask = oracle["batch_attention_mask"]
    trace = pangu_jax.trace(oracle.model, oracle["batch_input_ids"], mask)
    for row, i in enumerate(oracle["batch_prompt_index"]):
        got = trace.hidden[:, row][:, mask[row] == 1]
        np.testing.assert_allclose(got, oracle[f"prompt_{i}_hidden"], atol=STRICT, rtol=0)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head_dim is not hidden / heads": (folders.DENSE, {"head_dim": 12}),
    "one kv head": (folders.DENSE, {"num_key_value_heads": 1}),
    "as many kv heads as heads": (folders.DENSE, {"num_key_value_heads": 4}),
    "no biases": (folders.DENSE, {"bias": False}),
    "tied": (folders.DENSE, {"tie_word_embeddings": True}),
    "odd vocabulary": (folders.DENSE, {"vocab_size": 97}),
    "another eps and theta": (folders.DENSE, {"rms_norm_eps": 0.1, "rope_theta": 123.0}),
    "one layer": (folders.DENSE, {"num_hidden_layers": 1}),
    "moge": (folders.MOGE, {}),
    "moge, two groups": (folders.MOGE, {"num_experts_per_tok": 2}),
    "moge, one expert per group": (folders.MOGE, {"num_experts_per_tok": 12}),
    "moge, head_dim": (folders.MOGE, {"head_dim": 6, "num_key_value_heads": 1}),
    "moge, tied": (folders.MOGE, {"tie_word_embeddings": True, "rms_norm_eps": 0.01}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_such_model(tmp_path: Path, variant: str) -> None:
    base, change = VARIANTS[variant]
    raw = {**base, **change}
    tensors = folders.write(tmp_path, raw)
    model = pangu_jax.load(tmp_path)
    tokens = np.random.default_rng(1).integers(0, raw["vocab_size"], 13).tolist()
    expected = reference.forward(tensors, raw, tokens)
    trace = pangu_jax.trace(model, np.array([tokens]))
    np.testing.assert_allclose(trace.hidden[:, 0], expected["hidden"], atol=STRICT, rtol=0)
    np.testing.assert_allclose(trace.final_norm[0], expected["final_norm"], atol=STRICT, rtol=0)
    got = model(np.array([tokens]))[0]
    np.testing.assert_allclose(got, expected["logits"], atol=STRICT, rtol=0)
    for i, (logits, ids, weights) in enumerate(expected["routing"]):
        np.testing.assert_allclose(trace.router_logits[i, 0], logits, atol=STRICT, rtol=0)
        np.testing.assert_array_equal(trace.experts[i, 0], ids)
        np.testing.assert_allclose(trace.weights[i, 0], weights, atol=WEIGHTS, rtol=0)


@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_three_hundred_tokens(tmp_path: Path, base: dict[str, Any]) -> None:
    """Past the attention's block of queries, and enough pairs for full expert blocks."""
    tensors = folders.write(tmp_path, base)
    tokens = np.random.default_rng(2).integers(0, base["vocab_size"], 300).tolist()
    expected = reference.forward(tensors, base, tokens)["logits"]
    got = pangu_jax.load(tmp_path)(np.array([tokens]))[0]
    np.testing.assert_allclose(got, expected, atol=STRICT, rtol=0)


@pytest.mark.parametrize("base", [folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def test_bf16_agrees_on_the_likeliest_token(tmp_path: Path, base: dict[str, Any]) -> None:
    tensors = folders.write(tmp_path, base, dtype="bfloat16")
    tokens = np.random.default_rng(3).integers(0, base["vocab_size"], 40).tolist()
    expected = reference.forward(tensors, base, tokens)["logits"]
    model = pangu_jax.load(tmp_path)
    assert model.dtype == jnp.bfloat16
    logits = model(np.array([tokens]))
    assert logits.dtype == jnp.float32
    assert (np.asarray(logits[0]).argmax(-1) == expected.argmax(-1)).mean() >= 0.9
    assert np.abs(np.asarray(logits[0]) - expected).mean() < 0.1 * expected.std()


def test_float32_is_exact_by_itself(tmp_path: Path) -> None:
    """Every product of a float32 model asks for full precision, without the caller's help."""
    folders.write(tmp_path, folders.MOGE)
    model = pangu_jax.load(tmp_path)
    text = str(jax.make_jaxpr(lambda m, t: m(t))(model, jnp.zeros((1, 4), jnp.int32)))
    products = [
        line for line in text.splitlines() if "dot_general[" in line or "precision=" in line
    ]
    assert text.count("dot_general[") > 5
    assert text.count("precision=Precision.HIGHEST") + text.count("HIGHEST, Precision") >= 5
    assert "precision=None" not in "".join(products)


def test_config_of_the_oracle_is_read(name: str) -> None:
    raw = json.loads((ORACLE / name / "config.json").read_text())
    config = pangu_jax.load(ORACLE / name).config
    assert (config.moge is not None) == ("num_experts" in raw)
    assert config.eos_token_ids == (2,)
