"""Whole models with quantised leaves: against the float model that they stand for, in both forms,
under layouts, with other schemes in other layers, and with an int8 cache.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import pangu_jax
from infer import Sampling
from pangu_jax import build
from pangu_jax.errors import ConfigError
from pangu_jax.model import Pangu
from pangu_jax.quant import leaves, scheme
from pangu_jax.quant.scheme import Recipe, Scheme
from tests import layouts

# Widths that int4's groups of inputs divide, under eight devices too.
SIZES = dict(num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
DENSE = dataclasses.replace(layouts.DENSE, **SIZES, intermediate_size=128)
MOGE = dataclasses.replace(
    layouts.MOGE,
    **SIZES,
    moge=dataclasses.replace(layouts.MOGE.moge, expert_width=64, shared_width=128),
)
CONFIGS = {"dense": DENSE, "moge": MOGE}
TOKENS = layouts.random_tokens(2, 7)

SLOW = pytest.mark.slow

run = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def floats(name: str, form: str = "separate") -> Pangu:
    model = pangu_jax.init(CONFIGS[name], jax.random.key(3), form="separate")
    numbers = jax.tree.map(jnp.asarray, layouts.lively(model))
    return build.convert(build.with_weights(model, numbers), form)


def dequantised(model: Pangu) -> Pangu:
    """The float model that a quantised one stands for."""
    bare = build.abstract(model.config, form=model.form, where=model.layout)
    whole = {".".join(path): leaf for path, leaf in _leaves(model)}
    return build.fill(
        bare,
        lambda name, like: (
            leaf.floats(jnp.float32) if hasattr(leaf := whole[name], "floats") else leaf
        ),
    )


def _leaves(model: Pangu) -> list[tuple[list[str], jax.Array]]:
    is_weight = lambda x: hasattr(x, "floats")
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)[0]
    keys = lambda path: [jax.tree_util.keystr((key,), simple=True) for key in path]
    return [([key for key in keys(path) if key != "value"], leaf) for path, leaf in found]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("dense", "w4a16"),
        ("moge", "w8a16"),
        pytest.param("dense", "w8a16", marks=SLOW),
        pytest.param("moge", "w4a16", marks=SLOW),
    ],
)
def test_weight_only_is_the_float_model_it_stands_for(name: str, recipe: str) -> None:
    model = build.quantize(floats(name), recipe)
    layouts.close(run(model, TOKENS), run(dequantised(model), TOKENS), 1e-5)


@pytest.mark.parametrize(
    ("name", "recipe", "bound"),
    [
        ("moge", "w8a8", 0.15),
        ("dense", "fp8", 0.5),
        pytest.param("dense", "w8a8", 0.15, marks=SLOW),
        pytest.param("moge", "w8a16", 0.1, marks=SLOW),
        pytest.param("moge", "fp8", 0.5, marks=SLOW),
    ],
)
def test_near_to_the_model_before(name: str, recipe: str, bound: float) -> None:
    """Of the spread of the logits of a network that doubles every error; a wrong scale or order of
    numbers gives more than 1.
    """
    before, after = (run(m, TOKENS) for m in (floats(name), build.quantize(floats(name), recipe)))
    assert jnp.std(after - before) < bound * jnp.std(before)


@pytest.mark.parametrize("recipe", ["w8a8", pytest.param("w4a16", marks=SLOW)])
def test_both_forms_hold_the_same(recipe: str) -> None:
    one = build.quantize(floats("moge"), recipe)
    stacked = build.quantize(floats("moge", "stacked"), recipe)
    for a, b in zip(
        jax.tree.leaves(stacked), jax.tree.leaves(build.convert(one, "stacked")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    layouts.close(run(stacked, TOKENS), run(one, TOKENS), 1e-6)


def test_init_rounds_what_it_draws() -> None:
    drawn = build.init(MOGE, jax.random.key(0), recipe="w8a8")
    rounded = build.quantize(build.init(MOGE, jax.random.key(0)), "w8a8")
    for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_may_differ() -> None:
    """Runs of equal layers in the stacked form: int8, float, int4 and static-free mixtures."""
    config = dataclasses.replace(DENSE, num_layers=4)
    model = pangu_jax.init(config, jax.random.key(1), form="stacked")
    layer = tuple((leaf, Scheme("int8")) for leaf in scheme.matrices(config))
    four = (("mlp.down", Scheme("int4", group=16)),)
    recipe = Recipe.of_layers([layer, layer, (), four])
    mixed = build.quantize(model, recipe)
    assert mixed.runs == (2, 1, 1)
    separate = build.convert(mixed, "separate")
    layouts.close(run(mixed, TOKENS), run(separate, TOKENS), 1e-6)
    layouts.close(run(mixed, TOKENS), run(dequantised(separate), TOKENS), 1e-5)
    back = build.convert(separate, "stacked")
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("dense", "tp8", "flashcomm1"),
        ("moge", "h2p-8", "flashcomm1"),
        pytest.param("moge", "tp8", "all_reduce", marks=SLOW),
        pytest.param("moge", "ep8", "all_reduce", marks=SLOW),
        pytest.param("dense", "fsdp", "all_reduce", marks=SLOW),
        pytest.param("moge", "fsdp-h2p-4x2", "flashcomm1", marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [("w8a16", 1e-5), ("w8a8", 0.15), pytest.param("int4", 1e-5, marks=SLOW)],
)
def test_layouts(name: str, where: str, kind: str, recipe: str | Recipe, tolerance: float) -> None:
    """Weights are rounded before they are split: weight-only logits are those of one device. Each
    device rounds its own part of activations, so w8a8 is near.
    """
    if recipe == "int4":  # of w4a16, but in groups that eight devices do not split
        recipe = _int4(scheme.matrices(CONFIGS[name]), 8)
    form = "stacked" if name == "moge" else "separate"
    one = floats(name, form)
    like = build.abstract(CONFIGS[name], where=layouts.named(where, kind), form=form)
    many = build.quantize(build.with_weights(like, build.weights(one)), recipe)
    alone = build.quantize(one, recipe)
    if where in ("tp8", "h2p-8"):  # rounding is by output channel: the same in parts
        own = build.weights(many)
        for leaf, numbers in build.weights(alone).items():
            if leaves.split(leaf)[1] == "numbers":
                np.testing.assert_array_equal(own[leaf], numbers, err_msg=leaf)
    layouts.close(run(many, TOKENS), run(alone, TOKENS), tolerance)


def test_int4_groups_that_devices_would_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp.down: 128 inputs in groups of 32 cannot be split"):
        build.abstract(DENSE, where="tp8", recipe=_int4(["mlp.down"], 32))


def _int4(leaves: Iterable[str], group: int) -> Recipe:
    return Recipe.of_layers([tuple((leaf, Scheme("int4", group=group)) for leaf in leaves)] * 2)


def test_rounding_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        build.quantize(build.quantize(floats("dense"), "w8a8"), "w8a16")


def test_a_recipe_for_another_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match="a recipe for 3 layers"):
        build.quantize(floats("dense"), Recipe.of_layers([(("mlp.down", Scheme("int8")),)] * 3))


def test_gradients_pass_through_to_what_is_float() -> None:
    """Those of the float model that a weight-only one stands for; none for quantised parts."""
    model = build.quantize(floats("dense", "stacked"), "w8a16")
    free = lambda m: {n: x for n, x in build.weights(m).items() if not leaves.is_fixed(n)}

    def loss(trained: dict, model: Pangu) -> jax.Array:
        own = {**build.weights(model), **trained}
        return jnp.sum(jnp.sin(build.with_weights(model, own)(TOKENS)))

    own, other = free(model), dequantised(model)
    got = jax.jit(jax.grad(loss))(own, model)
    wanted = jax.jit(jax.grad(loss))({n: build.weights(other)[n] for n in own}, other)
    layouts.close_leaves(got, wanted, 1e-4)


@pytest.mark.parametrize(
    ("name", "form", "recipe", "where"),
    [
        pytest.param("dense", "separate", None, None, marks=SLOW),
        ("moge", "stacked", "w8a8", None),
        pytest.param("moge", "stacked", None, "h2p-8", marks=SLOW),
    ],
)
def test_an_int8_cache_generates_nearly_the_same(
    name: str, form: str, recipe: str | None, where: str | None
) -> None:
    model = floats(name, form)
    if where is not None:
        like = build.abstract(CONFIGS[name], where=layouts.named(where), form=form)
        model = build.with_weights(like, build.weights(model))
    model = model if recipe is None else build.quantize(model, recipe)
    sampling = Sampling(5, ignore_eos=True, temperature=0.0)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    exact = infer.generate(model, prompts, sampling)
    rounded = infer.generate(build.with_cache(model, "int8"), prompts, sampling)
    for a, b in zip(exact, rounded, strict=True):
        assert a.token_ids[0] == b.token_ids[0]
        np.testing.assert_allclose(a.logprobs[0], b.logprobs[0], atol=0.05)


def test_an_int8_cache_takes_half_the_bytes() -> None:
    config = dataclasses.replace(DENSE, head_dim=128)
    bytes_of = lambda model: sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(lambda: model.empty_cache(2, 64)))
    )
    model = build.abstract(config, dtype="bfloat16")
    half = build.abstract(config, dtype="bfloat16", recipe=Recipe(cache="int8"))
    assert bytes_of(half) / bytes_of(model) == pytest.approx(132 / 256, abs=1e-3)
