"""Formulas against what they stand for: real models' bytes, and programs' products and traffic.

Programs are only lowered. Their products are counted in their text, loops' bodies once: a decode
step, or the layers of a model that has them one by one.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pangu_jax
from infer.plan import programs, report
from pangu_jax import build
from pangu_jax import model as models
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.errors import ConfigError
from pangu_jax.model import Pangu
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Layout
from pangu_jax.plan import cost, stablehlo
from pangu_jax.plan import target as targets
from pangu_jax.plan.cost import Cost, Work
from pangu_jax.plan.hlo import Traffic
from pangu_jax.plan.target import Chip
from pangu_jax.precision import same_bits
from pangu_jax.pytree import unchecked
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import Recipe
from tests import layouts
from train import objectives

SINGLE = layout.load("single")
EIGHT = targets.load("cpu:8")
DECODE, PREFILL, TRAIN = Work("decode", 5, 16), Work("prefill", 3, 6), Work("train", 3, 6)

# --- what is held


def on_the_first_device(tree: Any) -> int:
    """Bytes of the parts of arrays that lie there."""
    first = jax.devices()[0]
    return sum(
        part.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for part in leaf.addressable_shards
        if part.device == first
    )


def zeros(config: ModelConfig, where: Layout) -> Pangu:
    """A model on real devices, made without compiling anything."""
    blank = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return build.fill(layouts.abstract(config, where), lambda name, leaf: blank(leaf))


@pytest.mark.slow
def test_weights_are_those_of_a_random_model() -> None:
    where = layouts.named("h2p-4x2")
    held = on_the_first_device(layouts.init(layouts.MOGE, where))
    assert cost.weight_bytes(layouts.MOGE, where, "float32") == held


@pytest.mark.parametrize("where", ["single", *layouts.NAMES, *layouts.ODD])
@pytest.mark.parametrize("name", ["dense", "moge"])
def test_weights_are_those_of_a_model(name: str, where: str) -> None:
    config = dataclasses.replace(layouts.MODELS[name], num_layers=2)
    placed = SINGLE if where == "single" else layouts.named(where)
    held = on_the_first_device(zeros(config, placed))
    assert cost.weight_bytes(config, placed, "float32") == held
    assert cost.weight_bytes(config, placed, "float32", "separate") == held
    assert cost.weight_bytes(config, placed, "bfloat16") == held // 2
    assert cost.of(config, placed, "float32", DECODE).weights == held
    assert cost.of(config, placed, "float32", TRAIN).weights == 4 * held


@pytest.mark.parametrize(
    "where",
    [
        "single",
        "h2p-4x2",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in layouts.NAMES
            if each != "h2p-4x2"
        ),
    ],
)
def test_the_cache_is_that_of_a_model(where: str) -> None:
    config = dataclasses.replace(layouts.DENSE, num_layers=2)
    placed = SINGLE if where == "single" else layouts.named(where)
    model = layouts.abstract(config, placed)
    cache = model.empty_cache(placed.round_rows(5), 16)
    held = on_the_first_device((cache.keys, cache.values))
    assert cost.of(config, placed, "float32", DECODE).cache == held
    assert cost.of(config, placed, "float32", Work("prefill", 5, 16)).cache == held
    assert cost.of(config, placed, "float32", Work("train", 5, 16)).cache == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("embedded-1b", 2 * 1_155_912_192),
        ("embedded-7b", 2 * 8_030_887_936),
        ("pro-moe-72b", 143_977_562_112),
    ],
)
def test_published_models_on_one_device(name: str, size: int) -> None:
    assert cost.weight_bytes(pangu_jax.preset(name), SINGLE, "bfloat16") == size


def test_the_72b_on_eight_devices() -> None:
    """H2P: attention in four parts; experts, the shared ones, and the vocabulary in eight."""
    D, heads, vocabulary = 5120, 40, 153_376
    attention = (heads + 2 * 8) * 128 * (D + 1) // 4 + D * heads * 128 // 4 + D
    experts = 3 * D * (64 * 1344 + 4 * 1344) // 8
    layer = attention + experts + 64 * D + 64 + 2 * D
    numbers = 48 * layer + 2 * vocabulary * D // 8 + D
    config = pangu_jax.preset("pro-moe-72b")
    assert cost.weight_bytes(config, layout.load("h2p-8"), "bfloat16") == 2 * numbers


@pytest.mark.parametrize(
    ("recipe", "number"), [("w8a8", 1.0), ("w8a16", 1.0), ("fp8", 1.0), ("w4a16", 0.5)]
)
def test_a_quantised_72b(recipe: str, number: float) -> None:
    """Bytes of the matrices' numbers, four of each scale, two of what stays float."""
    config = pangu_jax.preset("pro-moe-72b")
    held = scheme.named(recipe, config)
    D, E, F, S, heads = 5120, 64, 1344, 4 * 1344, 40
    rows = [(D, (heads + 16) * 128 + 2 * F * E + 2 * S), (heads * 128, D), (F, D * E), (S, D)]
    matrices = sum(width * count for width, count in rows)
    group = held.runs[0][1][0][1].group
    scales = sum(count * (width // group if group else 1) for width, count in rows)
    other = config.num_parameters - 48 * matrices
    size = 48 * (number * matrices + 4 * scales) + 2 * other
    assert cost.weight_bytes(config, SINGLE, "bfloat16", recipe=held) == size
    read = cost.of(config, SINGLE, "bfloat16", Work("prefill", 1, 4096), held).read
    passed = size - 2 * config.vocab_size * D
    assert read - 4096 * 196_608 == pytest.approx(passed, rel=0.12 if group else 2e-3)


@pytest.mark.parametrize(("fixed", "of_head"), [(False, 132), (True, 128)])
def test_an_int8_cache(fixed: bool, of_head: int) -> None:
    config, work = pangu_jax.preset("pro-moe-72b"), Work("decode", 16, 2048)
    recipe = Recipe(cache="int8", cache_scales=fixed)
    found = cost.of(config, SINGLE, "bfloat16", work, recipe).cache
    assert found == 48 * 2 * 8 * 16 * 2048 * of_head
    model = build.abstract(config, where=SINGLE, form="stacked", recipe=recipe)
    held = jax.eval_shape(lambda: model.empty_cache(16, 2048))
    leaves = jax.tree.leaves((held.keys, held.values))
    assert found == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_the_72bs_cache() -> None:
    config = pangu_jax.preset("pro-moe-72b")
    work = Work("decode", 256, 2048)
    assert cost.of(config, SINGLE, "bfloat16", work).cache == 196_608 * 256 * 2048
    # A half of the sequences and a quarter of the heads; as one replica, an eighth of the heads.
    for name in ("h2p-8", "tp8", "ep8"):
        held = cost.of(config, layout.load(name), "bfloat16", work).cache
        assert held == 196_608 * 256 * 2048 // 8


def test_what_must_fit_is_all_of_it() -> None:
    found = cost.of(layouts.DENSE, SINGLE, "float32", DECODE)
    assert found.working > 0
    assert found.held == found.weights + found.cache + found.working


# --- products

SHAPE = re.compile(r"tensor<([^>]*)>")
DOT = re.compile(r"contracting_dims = \[([\d, ]*)\].*: \((.*)\) -> (.*)")


def sizes_of(tensor: str) -> list[int]:
    return [int(size) for size in tensor.split("x")[:-1]]


def flops_of(line: str) -> int:
    """Multiplications and additions of one product."""
    found = DOT.search(line)
    assert found, line
    left, out = (sizes_of(SHAPE.findall(part)[0]) for part in found.groups()[1:])
    contracted = [left[int(axis)] for axis in found[1].split(",")]
    return 2 * math.prod(out) * math.prod(contracted)


def products(lowered: Any) -> int:
    """Multiplications and additions of a device's products, by function of the program."""
    functions: dict[str, list[str]] = {}
    for line in lowered.as_text().splitlines():
        if head := re.search(r"func\.func .*@(\"[^\"]*\"|[\w.]+)\(", line):
            current = functions.setdefault(head[1], [])
        elif functions:
            current.append(line)

    def total(name: str) -> int:
        found = 0
        for line in functions[name]:
            if "stablehlo.dot_general" in line:
                found += flops_of(line)
            elif called := re.search(r"call @(\"[^\"]*\"|[\w.]+)\(", line):
                found += total(called[1])
        return found

    return total("main")


@functools.cache
def model_of(name: str, layers: int) -> ModelConfig:
    return dataclasses.replace(layouts.MODELS[name], num_layers=layers)


@functools.cache
def lowered(name: str, where: Layout, work: Work, layers: int) -> Any:
    """The program of generation: the very one that the command compiles."""
    config = model_of(name, layers)
    target = targets.load(f"cpu:{where.num_devices}")
    plan = report.of(name, config, target, "", where, "float32", 4, work)
    return programs.lower(plan, "separate")


def unseen(config: ModelConfig, where: Layout, work: Work) -> int:
    """FLOPs of scores above the diagonal and their mixing: they count as nothing, but are made."""
    tokens = where.round_rows(work.batch) // where.size(where.of("batch")) * work.length
    heads = config.num_heads // where.size(where.of("heads"))
    half = work.context / 2 if work.length > 1 else 0
    return int(4 * config.num_layers * tokens * heads * config.head_dim * half)


@pytest.mark.parametrize(
    ("where", "work"),
    [
        ("single", PREFILL),
        ("h2p-8", DECODE),
        pytest.param("single", DECODE, marks=pytest.mark.slow),
        pytest.param("h2p-8", PREFILL, marks=pytest.mark.slow),
        pytest.param("tp8", DECODE, marks=pytest.mark.slow),
        pytest.param("tp8", PREFILL, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_flops_are_the_products_of_a_dense_model(where: str, work: Work, plain_xla: None) -> None:
    placed = SINGLE if where == "single" else layouts.named(where)
    with same_bits():  # as rows: columns would be padded
        made = products(lowered("dense", placed, work, 1))
    config = model_of("dense", 1)
    found = cost.of(config, placed, "float32", work).flops
    assert found == made - unseen(config, placed, work)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_training_step(tied: bool, plain_xla: None) -> None:
    """A full pass makes the logits of all tokens, as a training step does."""
    config = model_of("tied" if tied else "dense", 2)
    model = layouts.abstract(config, SINGLE, "separate")
    grid = jax.ShapeDtypeStruct((3, 6), jnp.int32)
    with same_bits():
        full = models.full_pass.lower(model, grid, jax.ShapeDtypeStruct((3, 6), jnp.bool_))
    forward = products(full) - unseen(config, SINGLE, TRAIN)
    assert cost.of(config, SINGLE, "float32", TRAIN).flops == 3 * forward


def test_fsdp_computes_layers_again() -> None:
    """Four passes of an eighth instead of three of all."""
    work = Work("train", 8, 6)
    one = cost.of(layouts.DENSE, SINGLE, "float32", work).flops
    eighth = cost.of(layouts.DENSE, layouts.named("fsdp"), "float32", work).flops
    assert 8 * eighth / 4 == one / 3


def test_flops_of_the_72b_are_those_of_its_active_weights() -> None:
    config = pangu_jax.preset("pro-moe-72b")
    work = Work("decode", 4, 1000)
    found = cost.of(config, SINGLE, "bfloat16", work).flops
    passed = config.num_active_parameters - config.vocab_size * config.hidden_size
    scores = 4 * config.num_layers * config.num_heads * config.head_dim * 1000
    assert found == pytest.approx(4 * (2 * passed + scores), rel=1e-4)  # norms and biases


EVEN = dataclasses.replace(
    layouts.MOGE, vocab_size=96, num_kv_heads=8, moge=MoGEConfig(16, 8, 16, 24)
)


@pytest.mark.parametrize("where", ["tp8", "h2p-8", "ep8"])
@pytest.mark.parametrize("work", [Work("decode", 8, 16), Work("prefill", 8, 6)])
def test_devices_share_the_products(where: str, work: Work) -> None:
    """Where nothing is padded, all of them together make those of one, and the router eight times:
    every device decides for all tokens.
    """
    one = cost.of(EVEN, SINGLE, "float32", work).flops
    eighth = cost.of(EVEN, layouts.named(where), "float32", work).flops
    router = 2 * work.tokens * EVEN.hidden_size * 16
    assert 8 * eighth == one + 7 * router


# --- bytes read


def test_one_token_reads_the_active_weights() -> None:
    config = pangu_jax.preset("pro-moe-72b")
    found = cost.of(config, SINGLE, "bfloat16", Work("decode", 1, 100)).read
    passed = config.num_active_parameters - config.vocab_size * config.hidden_size
    assert found - 100 * 196_608 == pytest.approx(2 * passed, rel=1e-4)


def test_many_tokens_read_all_weights() -> None:
    config = pangu_jax.preset("pro-moe-72b")
    found = cost.of(config, SINGLE, "bfloat16", Work("prefill", 1, 4096)).read
    passed = config.num_parameters - config.vocab_size * config.hidden_size
    assert found - 4096 * 196_608 == pytest.approx(2 * passed, rel=1e-4)


def test_a_step_of_training_reads_weights_gradients_and_moments() -> None:
    found = cost.of(layouts.DENSE, SINGLE, "float32", TRAIN)
    assert found.read == 6 * 4 * layouts.DENSE.num_parameters


# --- what crosses devices

BOUNDARIES = [
    (kind, gather) for kind in ("flashcomm1", "all_reduce") for gather in ("exact", "int8")
]
GENERATION = [
    (name, where, *boundary)
    for name in ("moge", "dense")
    for where in (*layouts.NAMES, *layouts.ODD)
    for boundary in BOUNDARIES
]
QUICK = {
    ("moge", "h2p-8", "flashcomm1", "exact"),
    ("dense", "h2p-4x2", "all_reduce", "int8"),
    ("dense", "fsdp-h2p-4x2", "flashcomm1", "int8"),
}
QUICKEST = {("moge", "ep8", "flashcomm1", "int8"), ("dense", "fsdp", "all_reduce", "exact")}


def cases() -> list[Any]:
    """Every layout and boundary; all but the quick ones, which have one layer, are slow."""
    slow = [pytest.param(*case, 2, marks=pytest.mark.slow) for case in GENERATION]
    return [*(pytest.param(*case, 1) for case in GENERATION if case in QUICK), *slow]


@pytest.mark.parametrize(("name", "where", "kind", "gather", "layers"), cases())
def test_traffic_of_generation(name: str, where: str, kind: str, gather: str, layers: int) -> None:
    placed = layouts.named(where, kind, gather)
    for work in (DECODE, PREFILL):
        program = lowered(name, placed, work, layers)
        counted = stablehlo.traffic(program, dataclasses.asdict(placed.mesh))
        found = cost.of(model_of(name, layers), placed, "float32", work).traffic
        assert found == counted, work.phase


def training(config: ModelConfig, where: Layout, work: Work) -> Any:
    """The objective of a training step, lowered; every row is a sequence."""
    model = Pangu(config, "separate", jnp.float32, where, where.abstract_mesh())
    size = (work.batch, work.context)
    ids, weights = (jax.ShapeDtypeStruct(size, dtype) for dtype in (jnp.int32, jnp.float32))
    names = ("tokens", "targets", "segments", "positions")
    batch = unchecked(objectives.Batch, **dict.fromkeys(names, ids), weights=weights)
    whole = lambda model, batch: objectives.objective(model, batch, objectives.Objective())
    traced = jax.jit(whole).trace(model, batch)
    return traced.lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize(
    ("name", "where", "kind", "gather"),
    [
        pytest.param(*case, marks=() if case in QUICKEST else pytest.mark.slow)
        for case in [*GENERATION, ("tied", "fsdp", "flashcomm1", "exact")]
    ],
)
def test_traffic_of_a_training_steps_loss(name: str, where: str, kind: str, gather: str) -> None:
    placed, config = layouts.named(where, kind, gather), model_of(name, 2)
    program = training(config, placed, TRAIN)
    counted = stablehlo.traffic(program, dataclasses.asdict(placed.mesh))
    assert cost.of(config, placed, "float32", TRAIN).traffic == counted


def test_a_loss_in_chunks_moves_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three all-reduces for each chunk; 24 tokens here, in chunks of at most five."""
    assert cost.LOSS_ROWS == objectives.CHUNK
    placed = layouts.named("tp8")
    of = lambda: cost.of(layouts.DENSE, placed, "float32", TRAIN).traffic["all-reduce"]
    assert of() == Traffic(3, 3 * 168)
    monkeypatch.setattr(cost, "LOSS_ROWS", 5)
    assert of() == Traffic(15, 15 * 35)


def test_one_device_receives_nothing() -> None:
    for work in (DECODE, PREFILL, TRAIN):
        assert cost.of(layouts.MOGE, SINGLE, "float32", work).traffic == {}


# --- time, and what holds for any size


def test_seconds_of_every_unit() -> None:
    chip = Chip("mine", "tpu", 8.0, 100.0, 2.0, 6.0, 12.0, 10.0)
    moved = {"all-gather": Traffic(2, 3 * 10**10), "all-reduce": Traffic(1, 10**10)}
    found = Cost(0, 0, 0, 12e12, 5e11, moved)
    assert found.seconds(chip, 2) == {"compute": 2.0, "memory": 5.0, "network": 4.0}
    assert found.seconds(chip, 1)["compute"] == 1.0
    assert found.seconds(chip, 4)["compute"] == 6.0


def test_a_model_that_does_not_fit_its_layout() -> None:
    config = dataclasses.replace(layouts.DENSE, num_heads=6)
    with pytest.raises(ConfigError, match="cannot split 6 query"):
        cost.of(config, layouts.named("tp8"), "float32", DECODE)


PLACES = {name: layouts.named(name, kind) for name in layouts.NAMES for kind in ("flashcomm1",)}


@settings(max_examples=20, deadline=None)
@given(
    where=st.sampled_from(sorted(PLACES)),
    phase=st.sampled_from(["decode", "prefill", "train"]),
    batch=st.integers(1, 300),
    more=st.integers(0, 300),
    context=st.integers(1, 600),
    longer=st.integers(0, 600),
)
def test_more_never_needs_less(
    where: str, phase: Any, batch: int, more: int, context: int, longer: int
) -> None:
    of = lambda *work: cost.of(layouts.MOGE, PLACES[where], "float32", Work(phase, *work))
    received = lambda found: sum(traffic.bytes for traffic in found.traffic.values())
    few, many = of(batch, context), of(batch + more, context + longer)
    assert few.weights == many.weights
    assert few.cache <= many.cache
    assert few.working <= many.working
    assert few.flops <= many.flops
    assert few.read <= many.read
    assert received(few) <= received(many)
