"""Schemes that exist, and recipes of them layer by layer."""

import dataclasses
import itertools
from typing import Any

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_jax.errors import ConfigError
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import FLOAT, Recipe, Scheme
from tests import layouts

EXIST = {
    ("int8", "float", None),
    ("int8", "dynamic", None),
    ("int8", "static", None),
    ("int4", "float", 8),
    ("fp8", "float", None),
    ("fp8", "dynamic", None),
}
# The suite is also run with types checked, and then that check comes first.
REFUSED = (ConfigError, jaxtyping.TypeCheckError)

W8, W4 = Scheme("int8", "dynamic"), Scheme("int4", group=4)
CHOICES = [
    (),
    (("attention.qkv", W8),),
    (("attention.qkv", W4),),
    (("attention.qkv", W8), ("mlp.down", W4)),
]
models_layers = st.lists(st.sampled_from(CHOICES), min_size=1, max_size=9)


@pytest.mark.parametrize(
    "said",
    [*itertools.product(("int8", "int4", "fp8"), ("float", "dynamic", "static"), (None, 8))],
    ids=str,
)
def test_combinations_that_exist(said: tuple[Any, Any, int | None]) -> None:
    if said in EXIST:
        assert dataclasses.astuple(Scheme(*said)) == said
    else:
        with pytest.raises(ConfigError):
            Scheme(*said)


@pytest.mark.parametrize("group", [-2, 0, 1, 3, 7])
def test_odd_groups_are_refused(group: int) -> None:
    with pytest.raises(ConfigError, match="even number"):
        Scheme("int4", group=group)


@pytest.mark.parametrize("said", [("int2", "float"), ("int8", "rounded"), ("", ""), (None, None)])
def test_unknown_words_are_refused(said: tuple[Any, Any]) -> None:
    with pytest.raises(REFUSED):
        Scheme(*said)


@given(models_layers)
def test_a_recipe_is_its_layers(layers: list[Any]) -> None:
    recipe = Recipe.of_layers(layers)
    assert list(recipe.layers(len(layers))) == layers
    for i, schemes in enumerate(layers):
        for leaf in ("attention.qkv", "mlp.down", "mlp.router"):
            assert recipe.scheme(f"blocks.{i}.{leaf}") == dict(schemes).get(leaf)
    assert recipe.scheme(f"blocks.{len(layers)}.attention.qkv") is None
    assert all(one != two for (_, one), (_, two) in itertools.pairwise(recipe.runs))
    assert hash(recipe) == hash(Recipe.of_layers(tuple(layers)))


@given(models_layers, st.integers(1, 12))
def test_a_recipe_fits_models_of_its_own_size_alone(layers: list[Any], count: int) -> None:
    recipe = Recipe.of_layers(layers)
    if count == len(layers) or not any(layers):
        assert len(list(recipe.layers(count))) == count
    else:
        with pytest.raises(ConfigError, match="does not fit"):
            list(recipe.layers(count))


def test_float_layers_are_a_float_recipe() -> None:
    assert Recipe.of_layers([(), ()]) == Recipe.of_layers([]) == FLOAT
    assert Recipe.of_layers([()], "int8") == Recipe(cache="int8")
    assert list(FLOAT.layers(3)) == [(), (), ()]


@pytest.mark.parametrize("leaf", ["embed", "head", "norm", "attention.qkv", "block.0.mlp.down"])
def test_only_layers_have_schemes(leaf: str) -> None:
    assert scheme.named("w8a8", layouts.DENSE).scheme(leaf) is None


def test_the_cache_is_int8_or_float() -> None:
    for cache in ("int4", "fp8", ""):
        with pytest.raises(REFUSED):
            Recipe(cache=cache)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache_scales"):
        Recipe(cache_scales=True)
    assert Recipe(cache="int8", cache_scales=True) != Recipe(cache="int8")


@pytest.mark.parametrize("config", [layouts.DENSE, layouts.MOGE], ids=["dense", "moge"])
def test_widths_are_those_of_the_models_leaves(config: Any) -> None:
    block = layouts.abstract(config, form="separate").blocks[0]
    for name, inputs in scheme.matrices(config).items():
        leaf = block
        for part in name.split("."):
            leaf = getattr(leaf, part)
        assert leaf.shape[-1] == inputs, name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("w8a8", ("int8", "dynamic", None)),
        ("w8a16", ("int8", "float", None)),
        ("w4a16", ("int4", "float", 4)),
        ("fp8", ("fp8", "dynamic", None)),
    ],
)
def test_named_recipes(name: str, wanted: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheme, "GROUPS", (16, 4, 2))  # widths are 32 and 44
    config = dataclasses.replace(layouts.DENSE, num_layers=3)
    recipe = scheme.named(name, config, "int8")
    assert recipe.cache == "int8"
    assert not recipe.cache_scales
    for layer in recipe.layers(3):
        assert [leaf for leaf, _ in layer] == list(scheme.matrices(config))
        assert {dataclasses.astuple(found) for _, found in layer} == {wanted}


@given(st.integers(1, 40), st.integers(1, 40))
def test_groups_divide_every_width(hidden: int, width: int) -> None:
    config = dataclasses.replace(layouts.DENSE, hidden_size=8 * hidden, intermediate_size=8 * width)
    (_, layer), *_ = scheme.named("w4a16", config).runs
    group = layer[0][1].group
    widths = (8 * hidden, 8 * width, 32)
    assert all(n % group == 0 for n in widths)
    assert group == max(g for g in (8, 16, 32, 64, 128) if not any(n % g for n in widths))


def test_what_cannot_be_named() -> None:
    with pytest.raises(ConfigError, match="no recipe named 'w2'; known: w8a8"):
        scheme.named("w2", layouts.DENSE)
    with pytest.raises(ConfigError, match="11, 20, 32"):
        scheme.named("w4a16", layouts.MOGE)
