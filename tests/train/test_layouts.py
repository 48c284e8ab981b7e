"""Training on eight devices is training on one: steps, checkpoints, whole runs."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pangu_jax
from pangu_jax import build
from tests import layouts
from train import __main__ as door
from train import objectives
from train import optimizer as optimizers
from train import step as steps
from train.checkpoints import Checkpoints, shapes
from train.config import OptimizerSection
from train.objectives import Batch
from train.packing import Example, pack
from train.step import Metrics, State

# A low rate: Adam makes whole steps of gradients that are nothing but rounding (key biases have
# some), and these differ.
SECTION = OptimizerSection(learning_rate=2e-4, warmup_steps=0, weight_decay=0.1)


def some_batch(rows: int, length: int, vocab: int) -> Batch:
    """Packed examples of several lengths, with padding behind them and prompts not learnt."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(length // 3, length, 2 * rows)
    examples = [
        Example(rng.integers(3, vocab, size).astype(np.int32), np.arange(size) >= 2)
        for size in sizes
    ]
    return pack(examples, length).batch(np.arange(rows))


class Trained:
    """A nano-moge of one layer and random weights after two steps under a layout."""

    def __init__(self, where: str | None) -> None:
        config = dataclasses.replace(pangu_jax.preset("nano-moge"), num_layers=1)
        placed = None if where is None else layouts.named(where)
        like = layouts.abstract(config, placed)
        weights = layouts.lively(layouts.init(config))
        model = build.with_weights(like, jax.device_put(weights, build.places(like)))
        self.batch = some_batch(3, 20, config.vocab_size)
        self.optimizer = optimizers.make(SECTION, 10)
        self.step = jax.jit(steps.make(model, self.optimizer))
        self.states = [steps.start(model, self.optimizer, frozen)]
        self.metrics: list[Metrics] = []
        for _ in range(2):
            state, metrics = self.step(self.states[-1], self.batch)
            self.states.append(state)
            self.metrics.append(metrics)


def frozen(name: str) -> bool:
    return name.endswith("router_scale")


@functools.cache
def trained(where: str | None) -> Trained:
    return Trained(where)


@pytest.fixture(scope="module")
def one() -> Trained:
    return trained(None)


@pytest.fixture(
    scope="module",
    params=[
        "h2p-8",
        "fsdp",
        *(
            pytest.param(w, marks=pytest.mark.slow)
            for w in ("ep8", "fsdp-h2p-4x2", "two axes of heads")
        ),
    ],
)
def many(request: pytest.FixtureRequest) -> Trained:
    return trained(request.param)


def numbers(state: State) -> dict[str, Any]:
    """All that a step changes, by name."""
    leaves = jax.tree_util.tree_leaves_with_path((state.step, state.trainable, state.optimizer))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_step_is_that_of_one_device(one: Trained, many: Trained) -> None:
    for got, wanted in zip(many.metrics, one.metrics, strict=True):
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(got.grad_norm, wanted.grad_norm, rtol=1e-5)
    assert float(one.metrics[1].loss) < float(one.metrics[0].loss)
    for got, wanted in zip(many.states, one.states, strict=True):
        layouts.close_leaves(got.trainable, wanted.trainable)
        layouts.close_leaves(got.frozen, wanted.frozen, 0)
    layouts.close_leaves(numbers(many.states[-1]), numbers(one.states[-1]), 1e-4)


def test_a_step_compiles_once_and_leaves_everything_in_its_place(many: Trained) -> None:
    assert many.step._cache_size() == 1
    places = [leaf.sharding for leaf in jax.tree.leaves(many.states[0])]
    for state in many.states[1:]:
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == places


def test_moments_lie_with_their_weights() -> None:
    """FSDP would be of little use otherwise."""
    model = layouts.abstract(layouts.MOGE, layouts.named("fsdp"))
    weights = layouts.lively(layouts.init(layouts.MOGE))
    start = build.with_weights(model, jax.device_put(weights, build.places(model)))
    state = steps.start(start, optimizers.make(SECTION, 10), frozen)
    held = jax.tree_util.tree_leaves_with_path(state.optimizer)
    for name in ("embed", "blocks.0.mlp.down", "blocks.0.attention.qkv"):
        parts = [leaf for path, leaf in held if f"'{name}'" in jax.tree_util.keystr(path)]
        assert len(parts) == 2
        for leaf in parts:
            assert leaf.sharding == state.trainable[name].sharding
            assert leaf.addressable_shards[0].data.size == leaf.size // 8


def test_a_checkpoint_of_one_layout_is_restored_under_another(one: Trained, tmp_path: Path) -> None:
    """Bit for bit, into its own places; and a step goes on from there."""
    h2p = trained("h2p-8")
    for source, target in ((one, h2p), (h2p, one)):
        folder = Checkpoints(tmp_path / str(id(source)))
        folder.save(source.states[-1])
        state = folder.restore(shapes(target.states[0]), target.states[0].frozen)
        folder.close()
        for name, leaf in numbers(source.states[-1]).items():
            np.testing.assert_array_equal(numbers(state)[name], leaf, err_msg=name)
        for got, wanted in zip(
            jax.tree.leaves(state), jax.tree.leaves(target.states[0]), strict=True
        ):
            assert got.sharding == wanted.sharding
        last, metrics = target.step(state, target.batch)
        assert target.step._cache_size() == 1
        wanted, same = source.step(source.states[-1], source.batch)
        layouts.close_leaves(last.trainable, wanted.trainable)
        np.testing.assert_allclose(metrics.loss, same.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("dense", "two axes of heads", "flashcomm1"),
        pytest.param("moge", "h2p-8", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("moge", "h2p-8", "all_reduce", marks=pytest.mark.slow),
        pytest.param("moge", "fsdp-h2p-4x2", "all_reduce", marks=pytest.mark.slow),
        pytest.param("moge", "ep8", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("moge", "another order", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("tied", "tp8", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("tied", "fsdp", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("dense", "nothing shared", "all_reduce", marks=pytest.mark.slow),
    ],
)
def test_long_rows_in_chunks(
    name: str, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of more than a block of queries, and a loss in several chunks of tokens."""
    config = dataclasses.replace(layouts.MODELS[name], max_positions=256)
    batch = some_batch(3, 140, config.vocab_size)
    weights = layouts.lively(layouts.init(config))
    found = []
    for placed, chunk in ((None, 1024), (layouts.named(where, kind), 50)):
        monkeypatch.setattr(objectives, "CHUNK", chunk)
        like = layouts.abstract(config, placed)
        loss = lambda own, like=like: objectives.loss(build.with_weights(like, own), batch)
        found.append(jax.jit(jax.value_and_grad(loss))(jax.device_put(weights, build.places(like))))
    (wanted, exact), (got, grads) = found
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    layouts.close_leaves(grads, exact)


def test_a_batch_without_a_target_has_no_loss_and_no_gradient() -> None:
    """On every device, whoever has the rows."""
    like = layouts.abstract(layouts.DENSE, layouts.named("h2p-8"))
    weights = layouts.lively(layouts.init(layouts.DENSE))
    batch = some_batch(2, 9, 97)
    batch = dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
    run = jax.jit(
        jax.value_and_grad(lambda own: objectives.loss(build.with_weights(like, own), batch))
    )
    loss, grads = run(jax.device_put(weights, build.places(like)))
    assert float(loss) == 0
    assert not any(np.asarray(grad).any() for grad in grads.values())


# --- whole runs

TINY = """
vocab_size = 1024
hidden_size = 32
num_layers = 1
num_heads = 4
num_kv_heads = 2
head_dim = 8
rope_theta = 10_000.0
init_range = 0.05
max_positions = 128
eos_token_ids = [15]
dtype = "float32"
[moge]
num_experts = 8
num_groups = 4
expert_width = 11
shared_width = 20
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.toml").write_text(TINY)
    lines = [json.dumps({"text": f"The number {a} comes before {a + 1}."}) for a in range(40)]
    (home / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (home / "run.toml").write_text(
        f"""
[model]
preset = "{home / "tiny.toml"}"
tokenizer = "nano"
[data]
path = "{home / "texts.jsonl"}"
length = 48
batch = 3
[optimizer]
warmup_steps = 2
learning_rate = 1e-3
freeze = ["blocks.*.qkv_bias"]
[run]
output = "{home / "unused"}"
steps = 4
save_every = 2
"""
    )
    return home


def pretrain(home: Path, output: Path, *more: str) -> int:
    argv = ["pretrain", str(home / "run.toml"), "--run.output", str(output), *more]
    return door.main(argv)


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    assert pretrain(home, home / "whole") == 0
    return home / "whole"


@pytest.fixture(scope="module")
def spread(home: Path) -> Path:
    """The same run on eight devices."""
    assert pretrain(home, home / "spread", "--model.layout", "h2p-8") == 0
    return home / "spread"


def same_end(one: Path, two: Path) -> None:
    a, b = (build.weights(pangu_jax.load(folder / "final")) for folder in (one, two))
    layouts.close_leaves(a, b)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for got, wanted in zip(*rows, strict=True):
        assert got["step"] == wanted["step"]
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_run_with_a_layout_ends_the_same(whole: Path, spread: Path) -> None:
    same_end(spread, whole)
    assert 'layout = "h2p-8"' in (spread / "config.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--model.layout", "fsdp"), ()], ids=str)
def test_a_run_goes_on_under_another_layout(
    flags: tuple[str, ...], home: Path, whole: Path, spread: Path, tmp_path: Path, capsys
) -> None:
    """Stopped after two of four steps."""
    run = tmp_path / "run"
    shutil.copytree(spread, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "4")
    toml = run / "config.toml"
    toml.write_text(toml.read_text().replace(str(spread), str(run)))
    assert pretrain(home, run, *flags) == 0
    assert "going on after step 2" in capsys.readouterr().err
    same_end(run, whole)


def test_a_model_that_does_not_fit_is_one_line(home: Path, tmp_path: Path, capsys) -> None:
    assert pretrain(home, tmp_path / "run", "--model.layout", "ep8") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: experts.expert (y: 8 ranks) cannot hold 4 whole groups")
    assert not (tmp_path / "run").exists()
