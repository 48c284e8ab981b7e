"""Training adapters: gradients by the chain rule through merged weights, steps that leave the base
as it is under every layout, and whole runs.
"""

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jaxtyping import Array

import pangu_jax
from infer import check
from pangu_jax import build, lora
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.errors import CheckpointError
from pangu_jax.model import Pangu
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import FLOAT
from pangu_jax.text.tokenizer import write_preset
from tests import layouts
from tests.pangu_jax.test_lora import CONFIGS, base, float_model, lively, together
from tests.train import batches
from train import __main__ as door
from train import objectives
from train.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    StepSection,
)
from train.objectives import Batch, Objective
from train.recipe import Recipe
from train.record import Record
from train.step import Metrics

SLOW = pytest.mark.slow
SCALE = 0.7

# As large as the cross-entropy, so that nothing can hide behind it.
WEIGHTED = Objective(z_loss=0.5, balance=20.0)


@functools.cache
def batch() -> Batch:
    """Three rows of several examples each, with padding and prompts."""
    return batches.packed(batches.examples((5, 12, 1, 9, 16, 2), vocab=97, learnt=0.6), 20)


# --- gradients


def of_adapters(model: Pangu, wanted: Objective = WEIGHTED) -> Any:
    """The objective, its parts and the adapters' gradients, as a function of these."""

    def of(own: Mapping[str, Array]) -> Any:
        held = lora.held(model, own, SCALE)
        return objectives.objective(model, batch(), wanted, adapters=held)

    return jax.jit(jax.value_and_grad(of, has_aux=True))


@functools.cache
def of_one_device(name: str, numbers: str | None) -> Any:
    """The same beside one of `base`."""
    return of_adapters(base(name, numbers))


@functools.cache
def alone(name: str, numbers: str | None) -> Any:
    """Of lively adapters."""
    return of_one_device(name, numbers)(lively(base(name, numbers)))


@functools.cache
def of_merged(config: ModelConfig) -> Any:
    """The same of a float model without adapters, and all of its weights."""
    like = layouts.abstract(config)
    of = lambda own: objectives.objective(build.with_weights(like, own), batch(), WEIGHTED)
    return jax.jit(jax.value_and_grad(of, has_aux=True))


def chain_rule(
    model: Pangu, own: Mapping[str, Any], whole: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Of W + scale * B A, a layer and an expert at a time: with G the gradient of a matrix, that of
    B is scale * G A^T, and that of A is scale * B^T G, in float64.

    whole: the gradients of a float model's weights, all layers in one stack
    """
    found, first = {}, np.cumsum([0, *model.runs])
    for name in own:
        if not name.endswith(".lora_a"):
            continue
        leaf = name.removesuffix(".lora_a")
        _, run, kind = leaf.split(".", 2)
        a, b = (np.asarray(own[f"{leaf}.lora_{x}"], np.float64) for x in "ab")
        to_a, to_b = np.zeros_like(a), np.zeros_like(b)
        for layer in range(len(a)):
            grads = np.asarray(whole[f"blocks.0.{kind}"][first[int(run)] + layer], np.float64)
            for expert in np.ndindex(*a.shape[1:-2]):
                at, g = (layer, *expert), grads[expert]
                to_b[at] = SCALE * np.tensordot(g, a[at], (-1, -1))
                outputs = tuple(range(g.ndim - 1))
                to_a[at] = SCALE * np.tensordot(b[at], g, (outputs, outputs))
        found[f"{leaf}.lora_a"], found[f"{leaf}.lora_b"] = to_a, to_b
    return found


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        pytest.param("moge", "w8a16", marks=SLOW),
        pytest.param("dense", None, marks=SLOW),
        pytest.param("moge", None, marks=SLOW),
        pytest.param("tied", "w8a16", marks=SLOW),
        pytest.param("one even moge", "w4a16", marks=SLOW),
        pytest.param("mixed", "mixed", marks=SLOW),
        pytest.param("topk", "w8a16", marks=SLOW),
        pytest.param("pairs", None, marks=SLOW),
    ],
)
def test_gradients_follow_from_those_of_merged_weights(name: str, numbers: str | None) -> None:
    """The objective, its parts, and gradients to 1e-4 of the largest number of each leaf: merged
    weights are rounded once more, in networks that make errors larger.
    """
    model = base(name, numbers)
    own = lively(model)
    (total, parts), grads = alone(name, numbers)
    merged = build.convert(float_model(CONFIGS[name], together(model, own, SCALE)), "stacked")
    (expected, same), whole = of_merged(CONFIGS[name])(build.weights(merged))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(layouts.close, parts, same)
    layouts.close_leaves(grads, chain_rule(model, own, whole), 1e-4)
    assert all(np.asarray(grad).any() for grad in grads.values())


FAST = {
    ("moge", "w8a16", "h2p-8", "flashcomm1"),
    ("one dense", None, "fsdp", "all_reduce"),
    ("one dense", None, "tp8", "flashcomm1"),
    ("one dense", None, "tp8", "all_reduce"),
}
MORE = {
    ("one moge", None, "fsdp", "flashcomm1"),
    ("one moge", None, "fsdp-h2p-4x2", "all_reduce"),
    ("one topk", None, "ep8", "flashcomm1"),
    ("one topk", None, "h2p-8", "all_reduce"),
    ("one even", "int4", "two axes of heads", "flashcomm1"),
}


def cases() -> list[Any]:
    """Every layout, with a dense model and experts in int8, and MORE: all but FAST are slow."""
    every = MORE | {
        (*model, where, kind)
        for model in (("one dense", None), ("moge", "w8a16"))
        for where in (*layouts.NAMES, *layouts.ODD)
        for kind in ("flashcomm1", "all_reduce")
    }
    assert every >= FAST
    return [
        pytest.param(*case, marks=() if case in FAST else SLOW, id="-".join(map(str, case)))
        for case in sorted(every, key=str)
    ]


@pytest.mark.parametrize(("name", "numbers", "where", "kind"), cases())
def test_gradients_under_a_layout(name: str, numbers: str | None, where: str, kind: str) -> None:
    """Objective, its parts and every gradient are those of one device."""
    model = base(name, numbers, layouts.named(where, kind))
    own = lively(model)
    (total, parts), grads = of_adapters(model)(jax.device_put(own, lora.places(model, own)))
    (expected, same), exact = alone(name, numbers)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(layouts.close, parts, same)
    layouts.close_leaves(grads, exact)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("name", ["one dense", "one moge"])
def test_what_is_computed_again_changes_nothing(name: str, remat: Any) -> None:
    model = base(name, "w8a16")
    of = of_adapters(model, dataclasses.replace(WEIGHTED, remat=remat))
    (total, _), grads = of(lively(model))
    (same, _), exact = alone(name, "w8a16")
    np.testing.assert_allclose(total, same, rtol=1e-6)
    layouts.close_leaves(grads, exact)


# --- what the program of a gradient holds

WIDE = ModelConfig(
    **{**layouts.BASE, "num_layers": 4, "hidden_size": 128, "head_dim": 16},
    moge=MoGEConfig(8, 4, 64, 64),
)

# The smallest matrices of WIDE: attention.out of all its layers, mlp.down of all experts of one.
ALL_OF_THEM = min(4 * 128 * 128, 8 * 128 * 64)


def buffers(numbers: str | None, *targets: str) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of all arrays in the compiled gradient of a model's adapters, by dtype."""
    recipe = FLOAT if numbers is None else scheme.named(numbers, WIDE)
    model = build.abstract(WIDE, dtype="float32", form="stacked", recipe=recipe)
    own = jax.eval_shape(lambda: lora.init(model, 1, targets, jax.random.key(0)))
    rows = batches.packed(batches.examples([10, 6], vocab=97), 16)

    def of(own: Mapping[str, Array], model: Pangu) -> Array:
        held = lora.held(model, own, SCALE)
        return objectives.objective(model, rows, WEIGHTED, adapters=held)[0]

    text = jax.jit(jax.grad(of)).lower(own, model).compile().as_text()
    found: dict[str, set[tuple[int, ...]]] = {}
    for kind, sizes in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text):
        found.setdefault(kind, set()).add(tuple(map(int, sizes.split(","))))
    return found


@pytest.mark.parametrize("numbers", ["w8a16", pytest.param("w4a16", marks=SLOW)])
def test_a_quantised_base_is_never_all_floats(numbers: str) -> None:
    """The largest array of floats, forward and backward, has less numbers than the smallest matrix
    of all layers, and than that of all experts of a layer: floats are of one expert, or one layer.
    """
    found = buffers(numbers)
    held = (4, 8, 2, 64, 128) if numbers == "w8a16" else (4, 8, 2, 64, 64)
    assert held in found["s8" if numbers == "w8a16" else "u8"]
    assert max(math.prod(shape) for shape in found["f32"]) < ALL_OF_THEM
    assert {(2 * 64, 128), (128, 64)} <= found["f32"]  # an expert at a time
    assert not found.keys() & {"f64", "f16", "bf16"}


@pytest.mark.slow
def test_a_float_base_has_them_all() -> None:
    """So the test before can fail."""
    assert max(math.prod(shape) for shape in buffers(None)["f32"]) >= 4 * 8 * 2 * 64 * 128


# --- steps


def recipe(model: Pangu, step: dict[str, Any] = {}, **optimizer: Any) -> Recipe:  # noqa: B006
    """Adapters of rank 3 and a scale of 0.7 beside the matrices of a model."""
    section: dict[str, Any] = dict(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
    config = Config(
        ModelSection(path="base"),
        DataSection(path="data.jsonl"),
        RunSection(output="run", steps=10),
        StepSection(**{"z_loss": 0.5, "balance": 20.0, **step}),
        OptimizerSection(**{**section, **optimizer}),
        LoraSection(rank=3, alpha=2.1),
    )
    return Recipe(config, model)


class Trained:
    """Two steps of a recipe."""

    def __init__(self, model: Pangu, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.step = jax.jit(recipe.step())
        self.states, self.metrics = [recipe.start(model)], list[Metrics]()
        for _ in range(2):
            state, metrics = self.step(self.states[-1], batch())
            self.states.append(state)
            self.metrics.append(metrics)


@functools.cache
def trained(name: str, where: str | None = None) -> Trained:
    """Beside a base of int8, with a running mean."""
    model = base(name, "w8a16", None if where is None else layouts.named(where))
    return Trained(model, recipe(model, ema=0.75))


def total(metrics: Metrics) -> float:
    """What `recipe` minimises."""
    balance = 0.0 if metrics.balance is None else float(metrics.balance)
    return float(metrics.loss) + 0.5 * float(metrics.z) + 20 * balance


def test_the_base_stays_and_only_adapters_are_trained() -> None:
    """Every leaf of the model is frozen, bit for bit; the optimizer has two moments of adapters and
    of nothing else.
    """
    run = trained("one dense")
    first, _, last = run.states
    weights = build.weights(run.model)
    assert set(first.frozen) == set(weights)
    for name, leaf in last.frozen.items():
        np.testing.assert_array_equal(leaf, weights[name])
        assert leaf.dtype == weights[name].dtype
    assert set(last.trainable) == {
        f"blocks.0.{kind}.lora_{part}"
        for kind in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
        for part in "ab"
    }
    for name, leaf in last.trainable.items():
        assert leaf.dtype == jnp.float32
        assert (np.asarray(leaf) != np.asarray(first.trainable[name])).any(), name
    moments = [leaf for leaf in jax.tree.leaves(last.optimizer) if leaf.ndim]
    sizes = sum(leaf.size for leaf in last.trainable.values())
    assert sum(leaf.size for leaf in moments) == 2 * sizes
    assert total(run.metrics[1]) < total(run.metrics[0])


def test_the_first_step_is_of_b_alone() -> None:
    """A has no gradient while B is 0; the norm is that of all gradients."""
    run = trained("one dense")
    (value, _), grads = of_one_device("one dense", "w8a16")(run.states[0].trainable)
    for name, grad in grads.items():
        assert np.asarray(grad).any() == name.endswith("lora_b"), name
    size = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
    assert float(run.metrics[0].grad_norm) == pytest.approx(size, rel=1e-5)
    assert total(run.metrics[0]) == pytest.approx(float(value), rel=1e-5)


def test_the_running_mean_is_of_adapters_alone() -> None:
    """A number at a time: 0.75 of what was, 0.25 of what is; a state's model is merged from it."""
    run = trained("one dense")
    mean = {n: np.asarray(x, np.float64) for n, x in run.states[0].trainable.items()}
    layouts.close_leaves(run.states[0].ema, mean, 0)
    for state in run.states[1:]:
        mean = {n: 0.75 * x + 0.25 * np.asarray(state.trainable[n]) for n, x in mean.items()}
        layouts.close_leaves(state.ema, mean, 1e-6)
    merged = build.weights(run.recipe.model(run.states[-1]))
    layouts.close_leaves(merged, together(run.model, mean, SCALE), 1e-6)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("one dense", "h2p-8"),
        *(
            pytest.param("one moge", where, marks=SLOW)
            for where in ("h2p-8", "ep8", "fsdp-h2p-4x2")
        ),
    ],
)
def test_steps_under_a_layout(name: str, where: str) -> None:
    """They are those of one device, compile once, and leave everything in its place. Adam makes
    whole steps of gradients that are next to nothing, so that adapters are less alike than these.
    """
    many, one = trained(name, where), trained(name)
    for got, wanted in zip(many.metrics, one.metrics, strict=True):
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(got.grad_norm, wanted.grad_norm, rtol=1e-4)
    for got, wanted in zip(many.states, one.states, strict=True):
        layouts.close_leaves(got.trainable, wanted.trainable, 1e-3)
        layouts.close_leaves(got.ema, wanted.ema, 1e-3)
    layouts.close_leaves(many.states[-1].frozen, build.weights(one.model), 0)
    assert many.step._cache_size() == one.step._cache_size() == 1
    places = [leaf.sharding for leaf in jax.tree.leaves(many.states[0])]
    for state in many.states[1:]:
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == places


def test_parts_of_a_batch_are_the_whole_batch() -> None:
    """Also where no running mean is kept: the model of a state is then that of its adapters."""
    model = base("one dense", "w8a16")
    parts = Trained(model, recipe(model, {"accumulate": 3}))
    for got, wanted in zip(parts.metrics, trained("one dense").metrics, strict=True):
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(got.grad_norm, wanted.grad_norm, rtol=1e-5)
    layouts.close_leaves(parts.states[1].trainable, trained("one dense").states[1].trainable, 1e-3)
    last = parts.states[-1]
    assert last.ema == {}
    merged = build.weights(parts.recipe.model(last))
    layouts.close_leaves(merged, together(model, last.trainable, SCALE), 1e-6)


MUON = {"name": "muon", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("name", "numbers", "step", "optimizer"),
    [
        ("one dense", "w8a16", {"compute": "bfloat16"}, MUON),
        pytest.param("one moge", "w8a16", {"compute": "bfloat16"}, {}, marks=SLOW),
        pytest.param("one moge", None, {"accumulate": 2}, MUON, marks=SLOW),
        pytest.param("mixed", "mixed", {"compute": "bfloat16", "remat": "dots"}, {}, marks=SLOW),
        pytest.param("one dense", "fp8", {}, MUON, marks=SLOW),
        pytest.param("one dense", "w8a8", {"compute": "bfloat16"}, {}, marks=SLOW),
    ],
)
def test_all_that_a_step_can_be(
    name: str, numbers: str | None, step: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    """Its numbers are finite and float32, every adapter moves, and the loss falls."""
    model = base(name, numbers)
    run = Trained(model, recipe(model, step, **optimizer))
    for leaf in jax.tree.leaves((run.states[-1].trainable, run.states[-1].optimizer, run.metrics)):
        assert np.isfinite(np.asarray(leaf)).all()
        assert leaf.dtype in (jnp.float32, jnp.int32)
    for key, leaf in run.states[-1].trainable.items():
        assert (np.asarray(leaf) != np.asarray(run.states[0].trainable[key])).any(), key
    for key, leaf in run.states[-1].frozen.items():
        np.testing.assert_array_equal(leaf, run.states[0].frozen[key])
    assert total(run.metrics[1]) < total(run.metrics[0])


# --- whole runs


def write_base(folder: Path, like: ModelConfig, numbers: str | None = None) -> None:
    """A model folder with the nano tokenizer."""
    small = dict(vocab_size=1024, num_heads=4, head_dim=8, eos_token_ids=(15,))
    model = layouts.init(dataclasses.replace(like, **small))
    pangu_jax.save_hf(model if numbers is None else build.quantize(model, numbers), folder)
    write_preset("nano", folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one layer, texts, and a configuration: six steps beside int8, a
    checkpoint after every second.
    """
    home = tmp_path_factory.mktemp("home")
    write_base(home / "base", layouts.DENSE)
    lines = [json.dumps({"text": f"The number {a} comes before {a + 1}."}) for a in range(40)]
    (home / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (home / "run.toml").write_text(
        f"""
[model]
path = "{home / "base"}"
[data]
path = "{home / "texts.jsonl"}"
length = 48
batch = 2
[optimizer]
warmup_steps = 2
learning_rate = 1e-2
[lora]
rank = 2
base = "w8a16"
[run]
output = "{home / "unused"}"
steps = 6
save_every = 2
"""
    )
    return home


def pretrain(home: Path, output: Path, *more: str) -> int:
    argv = ["pretrain", str(home / "run.toml"), "--run.output", str(output), *more]
    return door.main(argv)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Of every step, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "weight_norm", "tokens")
    return [{name: line[name] for name in kept} for line in lines]


def adapters_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Those in a checkpoint, by Orbax alone."""
    state, reader = folder / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointHandler()
    plain = lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(plain, reader.metadata(state).tree))
    return reader.restore(state, args=args)["trainable"]


def merged(folder: Path, own: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A folder's model in int8 and adapters, in float64."""
    model = pangu_jax.load(folder, form="stacked")
    model = model if model.recipe.runs else build.quantize(model, "w8a16")
    return together(model, own, 16 / 2)


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """A run that nothing stopped."""
    assert pretrain(home, home / "whole") == 0
    return home / "whole"


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def killed(home: Path) -> Path:
    """A run that was killed in its fifth step."""
    add = Record.add

    def kill(self: Record, taken: Any, metrics: Metrics) -> None:
        add(self, taken, metrics)
        if taken.step == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "add", kill)
        with pytest.raises(Killed):
            pretrain(home, home / "killed")
    return home / "killed"


def test_the_end_is_a_folder_like_any_other(home: Path, whole: Path) -> None:
    """A float model: base and adapters of the last checkpoint together, leaf by leaf and in its
    logits.
    """
    assert all(finding.ok for finding in check.inspect(whole / "final"))
    assert (whole / "final" / "tokenizer.model").is_file()
    model = pangu_jax.load(whole / "final", form="separate")
    assert not model.recipe.runs
    wanted = merged(home / "base", adapters_of(whole, 6))
    layouts.close_leaves(build.weights(model), wanted, 1e-6)
    tokens = layouts.random_tokens(2, 7)
    exact = build.with_weights(model, {n: jnp.asarray(x, jnp.float32) for n, x in wanted.items()})
    layouts.close(model(tokens), exact(tokens))
    losses = [line["loss"] for line in metrics(whole)]
    assert losses[-1] < losses[0]


def test_a_run_opens_before_its_end(home: Path, killed: Path) -> None:
    """As the model of its newest checkpoint, in either form."""
    assert not (killed / "final").exists()
    model = pangu_jax.load(killed, form="separate")
    own = adapters_of(killed, 4)
    layouts.close_leaves(build.weights(model), merged(home / "base", own), 1e-6)
    assert all(np.asarray(leaf).any() for leaf in own.values())
    stacked = build.convert(pangu_jax.load(killed, form="stacked"), "separate")
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_holds_adapters_alone(killed: Path) -> None:
    """And no copy of the base lies in the folder."""
    own = adapters_of(killed, 4)
    assert len(own) == 2 * 4
    assert all(re.search(r"lora_[ab]$", name) for name in own)
    assert not (killed / "frozen").exists()
    assert not [*killed.rglob("*.safetensors")]


def test_a_killed_run_goes_on_to_the_same_bits(
    home: Path, whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    assert pretrain(home, tmp_path / "run") == 0
    assert "going on after step 4" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == metrics(whole)
    for name, leaf in adapters_of(whole, 6).items():
        np.testing.assert_array_equal(adapters_of(tmp_path / "run", 6)[name], leaf)
    ends = [pangu_jax.load(folder / "final") for folder in (tmp_path / "run", whole)]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_goes_on_under_a_layout(
    home: Path, whole: Path, killed: Path, tmp_path: Path
) -> None:
    """It opens there, too, and ends nearly the same."""
    many, one = (pangu_jax.load(killed, layout=where, form="separate") for where in ("h2p-8", None))
    layouts.close_leaves(build.weights(many), build.weights(one), 1e-6)
    shutil.copytree(killed, tmp_path / "run")
    assert pretrain(home, tmp_path / "run", "--model.layout", "h2p-8") == 0
    got, wanted = (pangu_jax.load(folder / "final") for folder in (tmp_path / "run", whole))
    layouts.close_leaves(build.weights(got), build.weights(wanted), 1e-3)


def test_what_has_no_adapter_stays_as_the_folder_has_it(home: Path, tmp_path: Path) -> None:
    """Whatever the dtype of a step's products: final/ has the embedding's own bits."""
    flags = ("--step.compute", "bfloat16", "--run.steps", "1", "--optimizer.warmup_steps", "0")
    targets = ("--lora.targets", "attention.out", "--lora.targets", "attention.qkv")
    (home / "float.toml").write_text((home / "run.toml").read_text().replace("base =", "# base ="))
    argv = ["pretrain", str(home / "float.toml"), "--run.output", str(tmp_path / "run")]
    assert door.main([*argv, *flags, *targets]) == 0
    before, after = (
        build.weights(pangu_jax.load(folder)) for folder in (home / "base", tmp_path / "run/final")
    )
    for name, leaf in before.items():
        changed = bool((np.asarray(after[name]) != np.asarray(leaf)).any())
        assert changed == name.endswith(("attention.qkv", "attention.out")), name


@pytest.mark.slow
def test_a_folder_that_is_quantised_already(home: Path, tmp_path: Path) -> None:
    """It is the base as it is, also of a MoGE, and the run ends as a float model."""
    write_base(tmp_path / "base", layouts.MOGE, "w8a16")
    text = (home / "run.toml").read_text().replace("base =", "# base =")
    (tmp_path / "run.toml").write_text(text.replace(str(home / "base"), str(tmp_path / "base")))
    argv = ["pretrain", str(tmp_path / "run.toml"), "--run.output", str(tmp_path / "run")]
    assert door.main([*argv, "--run.steps", "2"]) == 0
    end = pangu_jax.load(tmp_path / "run" / "final", form="separate")
    assert not end.recipe.runs
    wanted = merged(tmp_path / "base", adapters_of(tmp_path / "run", 2))
    layouts.close_leaves(build.weights(end), wanted, 1e-6)
    shutil.rmtree(tmp_path / "run" / "final")
    again = pangu_jax.load(tmp_path / "run", form="separate")
    layouts.close_leaves(build.weights(again), wanted, 1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--lora.targets", "mlp.dwn"), "no matrix matches 'mlp.dwn'; did you mean mlp.down?"),
        (("--optimizer.freeze", "embed"), "with lora.rank all but the adapters is frozen"),
        (("--model.preset", "nano", "--model.tokenizer", "nano"), "lora.rank needs a model.path"),
        (("--lora.rank", "0"), "rank must be from 1 to 4096, not 0"),
        (("--lora.alpha", "0"), "alpha must be above 0"),
    ],
)
def test_a_mistake_is_one_line(
    flags: tuple[str, ...], complaint: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    """And the command with other settings is not another run's."""
    for more in ((), ("--run.seed", "1")):
        assert pretrain(home, tmp_path / "run", *flags, *more) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert complaint in line


@pytest.fixture(scope="module")
def hostile(home: Path, killed: Path) -> Path:
    """A run whose base.json is anybody's."""
    return shutil.copytree(killed, home / "hostile")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": None, "scale": None}, "base.json: missing rank, scale"),
        ({"path": None}, "base.json: missing path"),
        ({"extra": 1}, "base.json: unknown key 'extra'"),
        ({"rank": "2"}, "base.json: rank must be an integer"),
        ({"rank": 3}, "not the adapters that"),
        ({"rank": 0}, "base.json: rank must be at least 1, not 0"),
        ({"rank": -1}, "base.json: rank must be at least 1, not -1"),
        ({"rank": 10**30}, "not the adapters that"),
        ({"scale": "8"}, "base.json: scale must be a number"),
        ({"targets": ["mlp.*"]}, "not the adapters that"),
        ({"targets": ["nothing"]}, "base.json: lora.targets: no matrix matches 'nothing'"),
        ({"quantize": "w1a1"}, "base.json: no recipe named 'w1a1'"),
        ({"path": "nowhere"}, "nowhere: does not exist"),
        ({"path": "{home}"}, "config.json: no such file"),
        ({"path": "{home}/texts.jsonl"}, "is not a folder"),
        ({"path": "{home}/hostile"}, "base.json: "),
    ],
    ids=str,
)
def test_a_hostile_base_is_one_line(
    change: dict[str, Any], complaint: str, home: Path, killed: Path, hostile: Path
) -> None:
    said = json.loads((killed / "base.json").read_text())
    for key, value in change.items():
        said[key] = value.format(home=home) if isinstance(value, str) else value
    kept = {key: value for key, value in said.items() if value is not None or key == "quantize"}
    (hostile / "base.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError) as caught:
        pangu_jax.load(hostile)
    assert complaint in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"path": 1e999}'])
def test_a_damaged_base_is_one_line(text: str | None, hostile: Path) -> None:
    (hostile / "base.json").unlink(missing_ok=True)
    if text is not None:
        (hostile / "base.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        pangu_jax.load(hostile)
    wanted = "is no leaf of this model" if text is None else f"{hostile / 'base.json'}: "
    assert wanted in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_another_base_of_other_widths_is_one_line(
    killed: Path, hostile: Path, tmp_path: Path
) -> None:
    write_base(tmp_path / "other", dataclasses.replace(layouts.DENSE, intermediate_size=48))
    said = json.loads((killed / "base.json").read_text()) | {"path": str(tmp_path / "other")}
    (hostile / "base.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError) as caught:
        pangu_jax.load(hostile)
    assert "not the adapters that" in str(caught.value)
    assert str(caught.value).isprintable()
