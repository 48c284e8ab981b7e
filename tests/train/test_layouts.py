"""Training on eight devices is training on one: steps, checkpoints, whole runs."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pangu_jax
from pangu_jax import build
from pangu_jax.model import Remat
from tests import layouts
from tests.train import batches
from train import __main__ as door
from train import objectives
from train import optimizer as optimizers
from train import step as steps
from train.checkpoints import Checkpoints, shapes
from train.config import OptimizerSection, Stage
from train.objectives import Batch, Objective
from train.step import Metrics, State

# A low rate: Adam makes whole steps of gradients that are nothing but rounding (key biases have
# some), and these differ.
SECTION = OptimizerSection(learning_rate=1e-4, warmup_steps=0, weight_decay=0.1)
MUON = dataclasses.replace(SECTION, name="muon")
WEIGHTED = Objective(z_loss=0.1, balance=20.0)


def made(section: OptimizerSection) -> optax.GradientTransformation:
    return optimizers.make(section, [Stage.whole(section, 10)])


def some_batch(rows: int, length: int, vocab: int) -> Batch:
    """Packed examples of several lengths, with padding behind them and prompts not learnt."""
    sizes = np.random.default_rng(0).integers(length // 3, length, 2 * rows).tolist()
    return batches.packed(batches.examples(sizes, vocab, learnt=0.8), length, rows)


class Trained:
    """A MoGE after two steps under a layout, with all parts of an objective and a running mean."""

    def __init__(self, where: str | None) -> None:
        placed = None if where is None else layouts.named(where)
        like = layouts.abstract(layouts.MOGE, placed)
        weights = layouts.lively(layouts.init(layouts.MOGE))
        model = build.with_weights(like, jax.device_put(weights, build.places(like)))
        self.batch = some_batch(3, 20, 97)
        self.optimizer = made(SECTION)
        self.step = jax.jit(steps.make(model, self.optimizer, WEIGHTED, ema=0.9))
        self.states = [steps.start(model, self.optimizer, frozen, ema=True)]
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
        same_metrics(got, wanted)
    assert float(one.metrics[1].loss) < float(one.metrics[0].loss)
    for got, wanted in zip(many.states, one.states, strict=True):
        layouts.close_steps(got.trainable, wanted.trainable)
        layouts.close_steps(got.ema, wanted.ema)
        layouts.close_leaves(got.frozen, wanted.frozen, 0)
    layouts.close_leaves(numbers(many.states[-1]), numbers(one.states[-1]), 1e-4)


def same_metrics(got: Metrics, wanted: Metrics) -> None:
    for name in ("loss", "grad_norm", "weight_norm", "z", "balance"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-5)
    np.testing.assert_array_equal(got.router.load, wanted.router.load)
    np.testing.assert_allclose(got.router.entropy, wanted.router.entropy, rtol=1e-5)


def test_a_step_compiles_once_and_leaves_everything_in_its_place(many: Trained) -> None:
    assert many.step._cache_size() == 1
    places = [leaf.sharding for leaf in jax.tree.leaves(many.states[0])]
    for state in many.states[1:]:
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == places


@pytest.mark.parametrize(("section", "moments"), [(SECTION, 2), (MUON, 1)], ids=["adamw", "muon"])
def test_moments_lie_with_their_weights(section: OptimizerSection, moments: int) -> None:
    """FSDP would be of little use otherwise. Muon has one of matrices."""
    like = layouts.abstract(layouts.MOGE, layouts.named("fsdp"))
    weights = layouts.lively(layouts.init(layouts.MOGE))
    model = build.with_weights(like, jax.device_put(weights, build.places(like)))
    state = steps.start(model, made(section), frozen, ema=True)
    held = jax.tree_util.tree_leaves_with_path(state.optimizer)
    for name in ("embed", "blocks.0.mlp.down", "blocks.0.attention.qkv"):
        parts = [leaf for path, leaf in held if f"'{name}'" in jax.tree_util.keystr(path)]
        assert len(parts) == (2 if name == "embed" else moments)
        for leaf in (*parts, state.ema[name]):
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
        layouts.close_steps(last.trainable, wanted.trainable)
        np.testing.assert_allclose(metrics.loss, same.loss, rtol=1e-5)


# Gradients as its state, and weights that stay.
SPY = optax.GradientTransformation(
    lambda leaves: jax.tree.map(jnp.zeros_like, leaves),
    lambda grads, state, leaves: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@functools.cache
def spied(
    name: str,
    where: str | None,
    kind: str = "flashcomm1",
    parts: int = 1,
    remat: Remat | None = None,
    dtype: str = "float32",
) -> tuple[dict[str, Any], Metrics]:
    """Gradients of the whole objective of one of `layouts.MODELS`, and metrics. There are 5 rows:
    no number of devices or parts divides them.
    """
    config = layouts.MODELS[name]
    like = layouts.abstract(config, None if where is None else layouts.named(where, kind))
    weights = layouts.lively(layouts.init(config))
    model = build.with_weights(like, jax.device_put(weights, build.places(like)))
    wanted = dataclasses.replace(WEIGHTED, remat=remat)
    step = jax.jit(steps.make(model, SPY, wanted, dtype, parts))
    state, metrics = step(steps.start(model, SPY, lambda name: False), some_batch(5, 12, 97))
    return state.optimizer, metrics


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        slow("tied", "h2p-8", "all_reduce"),
        slow("moge", "fsdp", "flashcomm1"),
        *(
            slow(name, where, kind)
            for kind in ("flashcomm1", "all_reduce")
            for name, where in (
                ("moge", "h2p-8"),
                ("moge", "ep8"),
                ("moge", "h2p-4x2"),
                ("moge", "fsdp-h2p-4x2"),
                ("moge", "two axes of heads"),
                ("moge", "nothing shared"),
                ("moge", "another order"),
                ("pairs", "h2p-8"),
                ("topk", "h2p-8"),
                ("topk", "two axes of heads"),
                ("dense", "tp8"),
                ("tied", "fsdp-h2p-4x2"),
            )
        ),
    ],
)
def test_the_objective_is_that_of_one_device(name: str, where: str, kind: str) -> None:
    """With its parts, what the routers did, and its gradients."""
    grads, metrics = spied(name, where, kind)
    exact, wanted = spied(name, None)
    if metrics.router is not None:
        same_metrics(metrics, wanted)
    np.testing.assert_allclose([metrics.loss, metrics.z], [wanted.loss, wanted.z], rtol=1e-5)
    layouts.close_leaves(grads, exact)


@pytest.mark.parametrize(
    ("where", "kind", "parts"),
    [
        slow("h2p-8", "all_reduce", 3),
        slow("fsdp", "flashcomm1", 3),
        slow("h2p-8", "flashcomm1", 2),
        slow("fsdp", "flashcomm1", 2),
        slow("fsdp-h2p-4x2", "flashcomm1", 2),
        slow("another order", "all_reduce", 3),
    ],
)
def test_parts_are_those_of_one_device(where: str, kind: str, parts: int) -> None:
    """Cross-entropy and z-loss are also those of the whole."""
    grads, metrics = spied("moge", where, kind, parts)
    exact, wanted = spied("moge", None, parts=parts)
    same_metrics(metrics, wanted)
    layouts.close_leaves(grads, exact)
    _, whole = spied("moge", None)
    np.testing.assert_allclose([metrics.loss, metrics.z], [whole.loss, whole.z], rtol=1e-5)
    np.testing.assert_array_equal(metrics.router.load, whole.router.load)
    assert abs(float(metrics.balance) / float(whole.balance) - 1) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("where", ["h2p-8", "fsdp"])
def test_what_is_computed_again_changes_nothing(where: str, remat: Remat) -> None:
    grads, metrics = spied("moge", where, remat=remat)
    exact, wanted = spied("moge", where)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-6)
    layouts.close_leaves(grads, exact, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["h2p-8", "fsdp"])
def test_bfloat16_is_about_that_of_one_device(where: str) -> None:
    """Sums over devices are rounded, too."""
    grads, metrics = spied("moge", where, dtype="bfloat16")
    exact, wanted = spied("moge", None)
    np.testing.assert_allclose([metrics.loss, metrics.z], [wanted.loss, wanted.z], rtol=0.01)
    flat = lambda leaves: np.concatenate([np.asarray(leaves[n]).ravel() for n in sorted(exact)])
    one, other = flat(exact), flat(grads)
    assert other.dtype == np.float32
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fsdp", "h2p-8", "fsdp-h2p-4x2", "tp8"])
def test_muon_is_that_of_one_device(where: str) -> None:
    """A matrix is made orthogonal as a whole, whatever parts of it lie where."""
    exact, _ = spied("moge", None)
    grads = {name: np.asarray(leaf) for name, leaf in exact.items()}
    weights, found = layouts.lively(layouts.init(layouts.MOGE)), []
    for placed in (None, layouts.named(where)):
        places = build.places(layouts.abstract(layouts.MOGE, placed))
        optimizer = made(MUON)

        @jax.jit
        def two(grads: Any, own: Any, optimizer: Any = optimizer) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                _, state = optimizer.update(grads, optimizer.init(own), own)
                return optimizer.update(grads, state, own)[0]

        found.append(two(*jax.device_put((grads, weights), (places, places))))
    layouts.close_leaves(found[1], found[0], 1e-4)


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("dense", "two axes of heads", "flashcomm1"),
        slow("moge", "h2p-8", "flashcomm1"),
        slow("moge", "h2p-8", "all_reduce"),
        slow("moge", "fsdp-h2p-4x2", "all_reduce"),
        slow("moge", "ep8", "flashcomm1"),
        slow("moge", "another order", "flashcomm1"),
        slow("tied", "tp8", "flashcomm1"),
        slow("tied", "fsdp", "flashcomm1"),
        slow("dense", "nothing shared", "all_reduce"),
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
        loss = lambda own, like=like: objectives.objective(
            build.with_weights(like, own), batch, WEIGHTED
        )[0]
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
    layouts.close_steps(a, b)
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
