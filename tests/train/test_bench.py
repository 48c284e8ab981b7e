"""The bench command: its formula against the products of a step, PyTorch's step against ours."""

import dataclasses
import json
import math
import sys
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pangu_jax
from infer.bench import bounds as probes
from pangu_jax import build
from pangu_jax import model as models
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.model import Pangu
from train import __main__ as door
from train import bench, flops, objectives
from train import optimizer as optimizers
from train import step as steps
from train.config import OptimizerSection, Stage
from train.objectives import Objective

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    max_positions=160,
    intermediate_size=48,
    dtype="float32",
)
TOML = """
vocab_size = 64
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 8
intermediate_size = 24
rope_theta = 1e4
max_positions = 64
"""


@pytest.fixture
def toml(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of one layer, and probes and repeats as small."""
    monkeypatch.setattr(probes, "FLOPS_SIDE", {"cpu": 64})
    monkeypatch.setattr(bench, "REPEAT", 0.01)
    file = tmp_path / "tiny.toml"
    file.write_text(TOML)
    return str(file)


def products(jaxpr) -> int:
    """Multiplications and additions of all products, in loops as often as they are run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inside = [
            products(inner)
            for each in jax.tree.leaves(list(equation.params.values()))
            if hasattr(inner := getattr(each, "jaxpr", each), "eqns")
        ]
        if equation.primitive.name == "cond":  # one of several platforms
            inside = [max(inside)]
        total += times * sum(inside)
    return total


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_the_products_of_a_step(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    T, B = 40, 3
    model = pangu_jax.abstract(config, form="stacked")
    batch = bench.random_batch(config.vocab_size, T, B)
    forward = products(jax.make_jaxpr(objectives.loss)(model, batch).jaxpr)
    scores = 2 * config.num_layers * config.num_heads * config.head_dim * T**2 * B
    hidden_half = scores  # of those and of their products with the values
    assert flops.step_flops(config, T, B) == 3 * (forward - hidden_half)
    optimizer = optimizers.make(OptimizerSection(), [Stage.whole(OptimizerSection(), 100)])
    state = jax.eval_shape(lambda m: steps.start(m, optimizer, lambda name: False), model)
    whole = products(jax.make_jaxpr(steps.make(model, optimizer))(state, batch).jaxpr)
    logits_again = 2 * config.hidden_size * config.vocab_size * T * B
    assert whole == 3 * forward + logits_again + scores  # which are made again, too


@pytest.mark.parametrize("moge", [None, MoGEConfig(12, 3, 16, 24)], ids=["dense", "moge"])
def test_only_scores_are_made_again(
    moge: MoGEConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all products in a step, those of experts among them, beside a step that keeps all."""
    width = TINY.intermediate_size if moge is None else None
    config = dataclasses.replace(TINY, moge=moge, intermediate_size=width)
    model = pangu_jax.abstract(config, form="stacked")
    batch = bench.random_batch(config.vocab_size, 40, 3)
    count = lambda: products(jax.make_jaxpr(jax.grad(objectives.loss))(model, batch).jaxpr)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_again", lambda remat: lambda layer: layer)
        everything_kept = count()
    scores = 2 * config.num_layers * config.num_heads * config.head_dim * 40**2 * 3
    assert count() - everything_kept == scores


def test_parts_multiply_as_much_as_the_whole(plain_xla: None) -> None:
    """Of a batch that they divide; a mean of weights and other losses multiply nothing."""
    model = pangu_jax.abstract(TINY, form="stacked")
    batch = bench.random_batch(TINY.vocab_size, 40, 4)
    optimizer = optimizers.make(OptimizerSection(), [Stage.whole(OptimizerSection(), 100)])
    state = jax.eval_shape(lambda m: steps.start(m, optimizer, lambda name: False, True), model)

    def of(**more: Any) -> int:
        step = steps.make(model, optimizer, ema=0.9, **more)
        return products(jax.make_jaxpr(step)(state, batch).jaxpr)

    whole = of()
    assert of(parts=4) == whole
    assert of(parts=2, wanted=Objective(z_loss=0.1, remat="dots"), dtype="bfloat16") == whole
    forward = flops.step_flops(TINY, 40, 4) / 3
    assert whole < of(wanted=Objective(remat="full")) < whole + forward


@pytest.mark.parametrize(
    ("kind", "float32", "bfloat16"),
    [
        ("NVIDIA H200", 67, 989),
        ("TPU v5p", 76.5, 459),
        ("TPU v5", 76.5, 459),
        ("TPU v5 lite", 32.8, 197),
        ("TPU v6 lite", 153, 918),
        ("cpu", None, None),
        ("TPU v5 lite pod", None, None),
    ],
)
def test_the_most_a_chip_can_do(kind: str, float32: float | None, bfloat16: float | None) -> None:
    """In TFLOP/s, as the vendors say; nothing is said of a chip that is not known."""
    for size, wanted in ((4, float32), (2, bfloat16)):
        found = flops.peak(kind, size)
        assert found == (None if wanted is None else pytest.approx(wanted * 1e12))


def test_flops_of_a_moge_are_those_of_the_active_weights() -> None:
    config = pangu_jax.preset("pro-moe-72b")
    T = 512
    passed = config.num_active_parameters - config.vocab_size * config.hidden_size
    square = 2 * config.num_layers * config.num_heads * config.head_dim * T**2
    got = flops.step_flops(config, T, 2)
    assert got == pytest.approx(3 * 2 * (2 * passed * T + square), rel=1e-4)  # norms and biases


@pytest.mark.parametrize("length", [2, 3, 7, 128])
def test_rows_are_full_and_of_several_examples(length: int) -> None:
    batch = bench.random_batch(1000, length, 50)
    assert batch.tokens.shape == (50, length)
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < 1000
    examples = batch.segments[:, -1]
    assert (np.diff(batch.segments, axis=1) >= 0).all()
    assert (batch.segments[:, 0] == 1).all()
    assert set(examples.tolist()) == {min(n, length // 2) for n in (2, 3, 4)}
    np.testing.assert_array_equal(batch.weights.sum(axis=1), length - examples)
    assert (batch.weights.sum(axis=1) > 0).all()


@pytest.mark.parametrize("peer", [find_spec("torch") is not None])
def test_a_small_run_prints_one_json_object(capsys, toml: str, peer: bool) -> None:
    """Beside the peer where there is PyTorch."""
    argv = ["bench", "--model", toml, "--length", "12", "--batch", "2", "--repeats", "2", "--json"]
    assert door.main([*argv, *(["--peer"] if peer else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(bench.Result)} == result.keys()
    assert (result["peer"] is not None) == peer
    for side in (result["jax"], result["peer"]) if peer else (result["jax"],):
        assert {field.name for field in dataclasses.fields(bench.Speed)} == side.keys()
        assert side["tokens_per_s"] == pytest.approx(24 / side["step_seconds"])
        assert side["of_the_bound"] == pytest.approx(side["tflops"] / result["bound_tflops"])
        assert len(side["losses"]) == len(side["grad_norms"]) == bench.COMPARED
        assert side["losses"][0] == pytest.approx(np.log(64), rel=0.05)
        assert side["losses"][2] < side["losses"][1] < side["losses"][0]


def side(*losses: float) -> bench.Speed:
    return bench.Speed("JAX", 0.5, 4.0, 1.0, 0.25, 0.02, losses, (1.0, 1.0, 1.0))


def test_the_table_has_a_line_for_each() -> None:
    alone = bench.Result("cpu", 1234, 1, 2, 4.0, side(2.0, 2.0, 1.0), None)
    row = "| JAX | 0.5000 | 4.0 | 1.000 TFLOP/s | 4.000 TFLOP/s | 25% | 2% |"
    assert bench.table(alone).splitlines()[-1] == row
    assert "| a step of 1 x 2 | seconds |" in bench.table(alone)
    both = bench.table(dataclasses.replace(alone, peer=side(2.0, 2.0, 1.5)))
    assert both.count(row) == 2
    assert both.endswith(
        "2.00000 2.00000 1.00000; with the gradients' norms, the two "
        "implementations are at most 5.0e-01 apart"
    )


@pytest.mark.parametrize(("loss", "apart"), [(1.001, "1.0e-03"), (math.nan, "nan")])
def test_numbers_that_are_not_the_peers_are_a_failed_check(
    capsys, toml: str, monkeypatch: pytest.MonkeyPatch, loss: float, apart: str
) -> None:
    result = bench.Result("cpu", 1, 1, 2, 1.0, side(2.0, 2.0, 1.0), side(2.0, 2.0, loss))
    monkeypatch.setattr(bench, "measure", lambda *_: result)
    assert door.main(["bench", "--model", toml, "--length", "2"]) == 1
    assert f"{apart} apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--length", "65"], "the model has only 64 positions"),
        (["--length", "1"], "--length must be at least 2"),
        (["--batch", "0"], "--batch and --repeats must be at least 1"),
        (["--repeats", "-1"], "--batch and --repeats must be at least 1"),
        (["--model", "nani"], "no models configuration named"),
        (["--length", "2", "--peer"], "--peer needs PyTorch: pip install torch"),
    ],
    ids=str,
)
def test_senseless_runs_are_refused(
    capsys, toml: str, monkeypatch: pytest.MonkeyPatch, argv: list[str], complaint: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert door.main(["bench", "--model", toml, *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {complaint}")
    assert err.count("\n") == 1


SECTION = OptimizerSection(learning_rate=3e-3, warmup_steps=1, clip_norm=0.5, weight_decay=0.3)


def random_model(config: ModelConfig) -> Pangu:
    """Weights that are everywhere far from 0, 1 and each other, biases and norms too."""
    model = pangu_jax.abstract(config, form="stacked")
    rng = np.random.default_rng(4)
    whole = NamedSharding(model.mesh, PartitionSpec())

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        middle = 1.0 if name.endswith("norm.weight") else 0.0
        return jax.device_put(rng.normal(middle, 0.2, like.shape).astype(np.float32), whole)

    return build.fill(model, leaf)


def test_no_peer_routes_in_another_way(capsys, tmp_path) -> None:
    file = tmp_path / "topk.toml"
    file.write_text(
        TOML.replace("intermediate_size = 24\n", "")
        + "[moge]\nnum_experts = 8\nnum_groups = 2\nper_group = 2\nexpert_width = 8\n"
        + "shared_width = 8\n"
    )
    assert door.main(["bench", "--model", str(file), "--length", "2", "--peer"]) == 2
    assert "--peer routes as MoGE does: one expert of every group" in capsys.readouterr().err


EXPERTS = MoGEConfig(num_experts=12, num_groups=3, expert_width=16, shared_width=24)


@pytest.mark.parametrize(
    ("tied", "bias", "moge"), [(True, True, None), (False, False, None), (False, True, EXPERTS)]
)
def test_the_peer_takes_our_steps(tied: bool, bias: bool, moge: MoGEConfig | None) -> None:
    """Four losses and gradient norms of rows of several examples, in one of which there is padding
    and what is not to be learnt: every leaf's gradient, clipping, decay, the schedule.
    """
    pytest.importorskip("torch")
    from train import peer

    width = TINY.intermediate_size if moge is None else None
    config = dataclasses.replace(
        TINY, tie_embeddings=tied, attention_bias=bias, moge=moge, intermediate_size=width
    )
    whole = bench.random_batch(config.vocab_size, 140, 3)
    assert whole.segments.max() == 4
    kept = np.arange(140)[None, :] < np.array([[140], [131], [140]])
    learnt = np.random.default_rng(5).random((3, 140)) < 0.7
    batch = dataclasses.replace(
        whole, segments=whole.segments * kept, weights=whole.weights * kept * learnt
    )
    model = random_model(config)
    theirs = peer.steps(model, batch, SECTION, bench.SCHEDULED)
    ours = bench.jax_steps(model, batch, SECTION)
    got = np.array([(ours(1), theirs(1)) for _ in range(4)])
    np.testing.assert_allclose(got[:, 0], got[:, 1], rtol=1e-4)
    assert got[0, 0, 1] > SECTION.clip_norm
    assert abs(got[3, 0, 0] / got[0, 0, 0] - 1) > 0.01  # the steps did change something
