"""Every layout gives the numbers of one device: logits, gradients, traces; and moves what it says.

One program per layout gives logits and gradients of all numbers that the model itself has (what a
layout repeats is one number, whose gradients add up). It takes the mask as data.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pangu_jax
from pangu_jax import build
from pangu_jax.model import Pangu
from tests import folders, layouts, reference

KINDS = ("flashcomm1", "all_reduce")
RAW = {
    **folders.MOGE,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 11,
    "vocab_size": 97,
}


def program(like: Pangu) -> Callable[..., tuple[Any, Any]]:
    """(logits, gradients by leaf name) of the weights, tokens and mask."""

    def loss(weights: Any, tokens: Any, mask: Any) -> Any:
        logits = build.with_weights(like, weights)(tokens, mask)
        return jnp.where(mask[..., None], jnp.sin(logits), 0).mean(), logits

    @jax.jit
    def run(weights: Any, tokens: Any, mask: Any) -> Any:
        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(weights, tokens, mask)
        return logits, grads

    return run


@functools.cache
def weights_of(name: str, layers: int, form: str) -> dict[str, np.ndarray]:
    config = dataclasses.replace(layouts.MODELS[name], num_layers=layers)
    return layouts.lively(layouts.init(config, form=form))


@functools.cache
def single(name: str, layers: int, form: str) -> Callable[..., tuple[Any, Any]]:
    config = dataclasses.replace(layouts.MODELS[name], num_layers=layers)
    return program(layouts.abstract(config, form=form))


def masks(shape: tuple[int, int]) -> list[np.ndarray]:
    """No padding; and, where there is room, padding to the left, to the right and in between."""
    full = np.ones(shape, bool)
    if shape[0] < 3 or shape[1] < 5:
        return [full]
    ragged = full.copy()
    ragged[0, :2] = ragged[1, -3:] = ragged[2, [1, 3]] = False
    return [full, ragged]


def check(
    name: str,
    where: str,
    kind: str,
    shape: tuple[int, int] = (3, 5),
    form: str = "stacked",
    layers: int = 1,
) -> None:
    """Logits of real tokens and gradients are those of one device."""
    config = dataclasses.replace(layouts.MODELS[name], num_layers=layers)
    like = layouts.abstract(config, layouts.named(where, kind), form)
    numbers, tokens = weights_of(name, layers, form), layouts.random_tokens(*shape)
    placed = jax.device_put(numbers, build.places(like))
    run, one = program(like), single(name, layers, form)
    for mask in masks(shape):
        logits, grads = run(placed, tokens, mask)
        wanted_logits, wanted_grads = one(numbers, tokens, mask)
        layouts.close(np.asarray(logits)[mask], np.asarray(wanted_logits)[mask])
        layouts.close_leaves(grads, wanted_grads)


def some(always: set[tuple[str, ...]]) -> list[Any]:
    """The product of both families, all layouts and boundaries: all but `always` are slow."""
    every = [(m, w, k) for m in ("dense", "moge") for w in layouts.NAMES for k in KINDS]
    assert always <= set(every)
    return [
        pytest.param(*case, marks=() if case in always else pytest.mark.slow, id="-".join(case))
        for case in every
    ]


FAST = {
    ("dense", "tp8", "flashcomm1"),
    ("dense", "fsdp-h2p-4x2", "flashcomm1"),
    ("moge", "h2p-8", "flashcomm1"),
    ("moge", "h2p-8", "all_reduce"),
    ("moge", "fsdp", "flashcomm1"),
    ("moge", "fsdp-h2p-4x2", "flashcomm1"),
}


@pytest.mark.parametrize(("name", "where", "kind"), some(FAST))
def test_every_layout_is_one_device(name: str, where: str, kind: str) -> None:
    check(name, where, kind)


@pytest.mark.parametrize("where", ["h2p-8", "ep8"])
def test_the_topk_router(where: str) -> None:
    check("topk", where, "flashcomm1")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param("tied", "h2p-8", marks=pytest.mark.slow),
        pytest.param("tied", "tp8", marks=pytest.mark.slow),
        pytest.param("pairs", "h2p-8", marks=pytest.mark.slow),
        ("voted", "h2p-8"),
        pytest.param("voted", "ep8", marks=pytest.mark.slow),
        pytest.param("voted", "tp8", marks=pytest.mark.slow),
    ],
)
def test_other_models(name: str, where: str) -> None:
    """Tied and without biases; two experts of a group; a vote over the tokens of all devices."""
    check(name, where, "flashcomm1")


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("moge", "two axes of heads", "flashcomm1"),
        pytest.param("moge", "two axes of heads", "all_reduce", marks=pytest.mark.slow),
        pytest.param("moge", "nothing shared", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("moge", "nothing shared", "all_reduce", marks=pytest.mark.slow),
        ("moge", "another order", "flashcomm1"),
        pytest.param("moge", "another order", "all_reduce", marks=pytest.mark.slow),
        pytest.param("dense", "two axes of heads", "flashcomm1", marks=pytest.mark.slow),
        pytest.param("dense", "another order", "flashcomm1", marks=pytest.mark.slow),
    ],
)
def test_layouts_that_nobody_published(name: str, where: str, kind: str) -> None:
    check(name, where, kind)


@pytest.mark.parametrize(
    ("name", "where", "kind", "shape"),
    [
        ("moge", "h2p-8", "flashcomm1", (1, 1)),
        pytest.param("moge", "ep8", "flashcomm1", (1, 1), marks=pytest.mark.slow),
        pytest.param("moge", "h2p-8", "all_reduce", (1, 1), marks=pytest.mark.slow),
        pytest.param("dense", "tp8", "flashcomm1", (1, 2), marks=pytest.mark.slow),
        pytest.param("dense", "fsdp-h2p-4x2", "flashcomm1", (1, 2), marks=pytest.mark.slow),
        pytest.param("moge", "fsdp", "flashcomm1", (1, 2), marks=pytest.mark.slow),
        pytest.param("moge", "h2p-4x2", "flashcomm1", (5, 1), marks=pytest.mark.slow),
        pytest.param("moge", "two axes of heads", "flashcomm1", (1, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fewer_tokens_than_devices(
    name: str, where: str, kind: str, shape: tuple[int, int]
) -> None:
    check(name, where, kind, shape)


@pytest.mark.parametrize(
    ("name", "where", "kind", "form"),
    [
        pytest.param("moge", "h2p-8", "flashcomm1", "separate", marks=pytest.mark.slow),
        pytest.param("moge", "fsdp-h2p-4x2", "flashcomm1", "stacked", marks=pytest.mark.slow),
        pytest.param("dense", "tp8", "all_reduce", "separate", marks=pytest.mark.slow),
        pytest.param("dense", "fsdp-h2p-4x2", "flashcomm1", "separate", marks=pytest.mark.slow),
        pytest.param("moge", "ep8", "flashcomm1", "separate", marks=pytest.mark.slow),
        pytest.param("moge", "h2p-8", "flashcomm1", "stacked", marks=pytest.mark.slow),
        pytest.param("topk", "h2p-8", "all_reduce", "stacked", marks=pytest.mark.slow),
    ],
)
def test_two_layers(name: str, where: str, kind: str, form: str) -> None:
    check(name, where, kind, form=form, layers=2)


# --- against the independent reference, and what else a forward pass gives


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of a MoGE model, and what it holds."""
    path = tmp_path_factory.mktemp("moge")
    return path, folders.write(path, RAW)


PROMPTS = ([3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 0]], bool)


def padded_prompts() -> np.ndarray:
    tokens = np.zeros(MASK.shape, np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, MASK[row]] = prompt
    return tokens


def test_a_trace_is_the_references_and_that_of_one_device(tensors: Any) -> None:
    folder, stored = tensors
    wanted = pangu_jax.trace(pangu_jax.load(folder, form="stacked"), padded_prompts(), MASK)
    model = pangu_jax.load(folder, layout=layouts.named("h2p-8"), form="stacked")
    trace = pangu_jax.trace(model, padded_prompts(), MASK)
    for field in ("hidden", "final_norm", "router_logits", "weights"):
        got, own = (np.asarray(getattr(each, field)) for each in (trace, wanted))
        places = MASK if field == "final_norm" else np.s_[:, MASK]
        layouts.close(got[places], own[places], what=field)
    np.testing.assert_array_equal(trace.experts[:, MASK], wanted.experts[:, MASK])
    for row, prompt in enumerate(PROMPTS):
        truth = reference.forward(stored, RAW, prompt)
        of_row = lambda found, row=row: np.asarray(found[:, row])[:, MASK[row]]
        layouts.close(of_row(trace.hidden), truth["hidden"], 1e-4)
        layouts.close(np.asarray(trace.final_norm)[row, MASK[row]], truth["final_norm"], 1e-4)
        for i, (logits, experts, weights) in enumerate(truth["routing"]):
            layouts.close(of_row(trace.router_logits)[i], logits, 1e-4)
            layouts.close(of_row(trace.weights)[i], weights, 1e-4)
            np.testing.assert_array_equal(of_row(trace.experts)[i], experts)


def test_logits_are_the_references(tensors: Any) -> None:
    folder, stored = tensors
    model = pangu_jax.load(folder, layout="h2p-8", form="separate")
    logits = np.asarray(model(padded_prompts(), MASK))
    for row, prompt in enumerate(PROMPTS):
        truth = reference.forward(stored, RAW, prompt)["logits"]
        layouts.close(logits[row, MASK[row]], truth, 1e-4)


def test_bfloat16(tensors: Any) -> None:
    folder, stored = tensors
    model = pangu_jax.load(folder, "bfloat16", "h2p-8", "stacked")
    logits = np.asarray(model(padded_prompts(), MASK))
    assert logits.dtype == np.float32
    for row, prompt in enumerate(PROMPTS):
        truth = reference.forward(stored, RAW, prompt)["logits"]
        assert np.abs(logits[row, MASK[row]] - truth).mean() < 0.15 * truth.std()


@pytest.mark.parametrize("kind", ["flashcomm1", pytest.param("all_reduce", marks=pytest.mark.slow)])
def test_int8_gathers_are_near(kind: str) -> None:
    """And not equal: else nothing was rounded. The gradient is straight through."""
    like = layouts.abstract(layouts.MOGE, layouts.named("h2p-8", kind, "int8"))
    numbers, tokens, mask = (
        weights_of("moge", 1, "stacked"),
        layouts.random_tokens(3, 5),
        masks((3, 5))[1],
    )
    logits, grads = program(like)(jax.device_put(numbers, build.places(like)), tokens, mask)
    wanted, exact = single("moge", 1, "stacked")(numbers, tokens, mask)
    logits, wanted = np.asarray(logits)[mask], np.asarray(wanted)[mask]
    error = np.abs(logits - wanted).mean() / wanted.std()
    assert 1e-4 < error < 0.03
    for name, grad in grads.items():
        one, other = np.asarray(grad).ravel(), np.asarray(exact[name]).ravel()
        assert np.isfinite(one).all()
        assert one @ other > 0.9 * np.linalg.norm(one) * np.linalg.norm(other), name


# --- what crosses devices

COLLECTIVE = re.compile(r"stablehlo\.(all_gather|reduce_scatter|all_reduce|all_to_all)\b")
SHORT = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "all_to_all": "A2A"}


def collectives(name: str, where: str, kind: str, layers: int) -> list[str]:
    """Those of a full pass, in the order of the program."""
    config = dataclasses.replace(layouts.MODELS[name], num_layers=layers)
    like = layouts.abstract(config, layouts.named(where, kind), "separate")
    tokens = jax.ShapeDtypeStruct((2, 16), np.int32)
    text = jax.jit(lambda model, tokens: model(tokens)).lower(like, tokens).as_text()
    return [SHORT[each] for each in COLLECTIVE.findall(text)]


@pytest.mark.parametrize(
    ("name", "where", "kind", "layer"),
    [
        ("moge", "h2p-8", "flashcomm1", "AG RS AG RS"),
        ("dense", "h2p-8", "flashcomm1", "AG RS AG RS"),
        ("moge", "h2p-8", "all_reduce", "AR AG AR"),
        ("moge", "tp8", "flashcomm1", "AG RS AG RS"),
        ("dense", "tp8", "all_reduce", "AR AR"),
        ("moge", "ep8", "flashcomm1", "AG RS"),
        ("dense", "ep8", "flashcomm1", ""),
    ],
)
def test_a_layers_collectives(name: str, where: str, kind: str, layer: str) -> None:
    one, two = (collectives(name, where, kind, layers) for layers in (1, 2))
    before = next(
        i for i in range(len(one) + 1) if one[i : i + len(layer.split())] == layer.split()
    )
    assert two == one[:before] + layer.split() + one[before:]
    if kind == "flashcomm1":
        assert "AR" not in two


def test_a_layer_of_fsdp_gathers_weights_and_nothing_else() -> None:
    one, two = (collectives("moge", "fsdp", "flashcomm1", layers) for layers in (1, 2))
    assert set(two) <= {"AG", "A2A"}  # the embedding is looked up where it lies
    assert one.count("A2A") == two.count("A2A")
    own = layouts.abstract(layouts.MOGE, layouts.named("fsdp"), "separate")
    split = [name for name, place in build.places(own).items() if any(place.spec)]
    assert len(two) - len(one) == sum(name.startswith("blocks.0.") for name in split)
