"""The model as a pytree: transforms, forms, cached decoding, and what it refuses."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import pangu_jax
from pangu_jax import build, tokens_and_mask
from pangu_jax import cache as caches
from pangu_jax import model as models
from pangu_jax.cache import Meta
from pangu_jax.model import Pangu
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh
from tests import folders, layouts


@pytest.fixture(scope="module", params=[folders.DENSE, folders.MOGE], ids=["dense", "moge"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    folders.write(path, request.param)
    return path


@pytest.fixture(scope="module", params=["separate", "stacked"])
def model(request: pytest.FixtureRequest, folder: Path) -> Pangu:
    return pangu_jax.load(folder, form=request.param)


def some_tokens(B: int = 2, T: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (B, T)).astype(np.int32)


def equal_trees(a: object, b: object) -> None:
    chex.assert_trees_all_equal(a, b)


def test_jit_and_tree_map(model: Pangu) -> None:
    tokens = some_tokens()
    np.testing.assert_allclose(jax.jit(model)(tokens), model(tokens), atol=1e-5)
    doubled = jax.tree.map(lambda w: w * 2, model)
    assert isinstance(doubled, Pangu)
    np.testing.assert_array_equal(doubled.embed[...], model.embed[...] * 2)


def test_grad_through_the_model(model: Pangu) -> None:
    tokens = jnp.asarray(some_tokens())

    def loss(m: Pangu) -> jax.Array:
        z = jax.nn.log_softmax(m(tokens)[:, :-1])
        return -jnp.take_along_axis(z, tokens[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(loss))(model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    # Against a central difference along the gradient itself.
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    step = lambda s: jax.tree.map(lambda w, g: w + s * g / norm, model, gradient)
    slope = (loss(step(1e-2)) - loss(step(-1e-2))) / 2e-2
    np.testing.assert_allclose(slope, norm, rtol=2e-2)


def test_forms_convert_both_ways_and_agree(model: Pangu) -> None:
    other = "stacked" if model.form == "separate" else "separate"
    converted = pangu_jax.convert(model, other)
    assert converted.form == other
    np.testing.assert_array_equal(converted(some_tokens()), model(some_tokens()))
    equal_trees(pangu_jax.convert(converted, model.form), model)
    equal_trees(jax.jit(lambda m: pangu_jax.convert(m, other))(model), converted)
    assert pangu_jax.convert(model, model.form) is model


def test_gradients_of_the_two_forms_are_the_same(model: Pangu) -> None:
    loss = lambda m: (m(some_tokens()) ** 2).mean()
    own = jax.jit(jax.grad(loss))(model)
    other = jax.jit(jax.grad(lambda m: loss(pangu_jax.convert(m, "stacked"))))(model)
    jax.tree.map(layouts.close, own, other)


def run_cached(model: Pangu, tokens: np.ndarray, pieces: list[int], mask: np.ndarray) -> np.ndarray:
    """Logits of a pass in pieces of the given widths through one cache."""

    def piece(model, cache, tokens, mask):
        def local(model, cache, tokens, mask):
            meta = Meta.from_mask(mask, start=cache.length)
            hidden, cache = models.forward(model, tokens.reshape(-1), meta, cache)
            hidden = boundary.whole(hidden, tokens.size, where)
            return cache, models.logits(model, hidden).reshape(*tokens.shape, -1)

        where, held = model.layout, caches.specs(cache, model.layout)
        in_specs, out_specs = (held, where.rows, where.rows), (held, where.rows)
        return on_mesh(model, local, in_specs, out_specs)(model, cache, tokens, mask)

    cache, out, at = model.empty_cache(len(tokens), tokens.shape[1] + 3), [], 0
    for width in pieces:
        cut = slice(at, at + width)
        cache, logits = jax.jit(piece)(model, cache, tokens[:, cut], mask[:, cut])
        out.append(np.asarray(logits))
        at += width
    np.testing.assert_array_equal(cache.length, mask.sum(1))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [6, 1, 1, 1]], ids=str)
def test_cached_equals_full(model: Pangu, pieces: list[int]) -> None:
    tokens = some_tokens(3, 9)
    mask = np.ones((3, 9), bool)
    np.testing.assert_allclose(run_cached(model, tokens, pieces, mask), model(tokens), atol=1e-4)


@pytest.mark.parametrize("pieces", [[9], [4, 5], [1] * 9], ids=str)
def test_cached_with_padding_anywhere(model: Pangu, pieces: list[int]) -> None:
    """Left padding, right padding and holes: the cache holds tokens only, in the slots of their
    positions.
    """
    tokens, mask = some_tokens(3, 9), np.ones((3, 9), bool)
    mask[0, :4] = mask[1, 6:] = mask[2, [0, 3, 4, 8]] = False
    got = run_cached(model, tokens, pieces, mask)
    np.testing.assert_allclose(got[mask], np.asarray(model(tokens, mask))[mask], atol=1e-4)


def test_a_grown_cache_holds_the_same(model: Pangu) -> None:
    cache = model.empty_cache(2, 4)
    filled = jax.tree.map(lambda a: a + 1, cache)
    grown = caches.grow(filled, 10)
    assert grown.capacity == 10
    for small, large in zip(filled.keys + filled.values, grown.keys + grown.values, strict=True):
        np.testing.assert_array_equal(large[..., :4, :], small)
        assert not large[..., 4:, :].any()


def test_masked_places_are_finite_even_when_nothing_is_real(model: Pangu) -> None:
    assert np.isfinite(np.asarray(model(some_tokens(), np.zeros((2, 7), bool)))).all()


def test_calls_of_one_shape_trace_once(folder: Path) -> None:
    """Models of one type share a compiled function, wherever they were loaded from."""
    a, b = pangu_jax.load(folder), pangu_jax.load(folder)
    counted = jax.jit(chex.assert_max_traces(lambda m, t: m(t), n=1))
    for model in (a, b, jax.tree.map(lambda w: w + 1, a)):
        counted(model, some_tokens())
    chex.clear_trace_counter()


@pytest.mark.parametrize(
    ("tokens", "mask", "complaint"),
    [
        (np.zeros(3, int), None, r"integer array \[B, T\], not int64\[3\]"),
        (np.zeros((1, 3)), None, "integer array"),
        ([[1, 2]], None, "integer array"),
        (np.zeros((1, 0), int), None, "hold no token"),
        (np.full((1, 3), 96), None, "token id 96 is outside the vocabulary of 96"),
        (np.full((1, 3), -1), None, "token id -1 is outside"),
        (jnp.full((1, 3), 96), None, "token id 96 is outside the vocabulary of 96"),
        (np.full((1, 3), 96), jnp.ones((1, 3), bool), "token id 96 is outside"),
        (np.zeros((1, 3), int), np.ones((1, 4), bool), "must have the tokens' shape"),
        (np.zeros((1, 3), int), np.zeros((1, 3)), "must be bool, or 0 and 1 as integers"),
        (np.zeros((1, 3), int), np.full((1, 3), 7), "must hold 0 and 1 only"),
    ],
)
def test_bad_tokens_get_one_line(model: Pangu, tokens, mask, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint) as caught:
        tokens_and_mask.check(model.config, tokens, mask)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_padding_may_hold_any_id(model: Pangu) -> None:
    tokens = some_tokens()
    tokens[:, 5:] = -100
    mask = np.ones((2, 7), bool)
    mask[:, 5:] = False
    assert np.isfinite(np.asarray(model(tokens, mask))).all()


def test_a_mesh_set_by_the_caller_is_one_clear_error(model: Pangu) -> None:
    mesh = jax.make_mesh((2,), ("other",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):  # noqa: TID251
        with pytest.raises(ValueError, match=r"leave jax\.set_mesh before"):
            model(some_tokens())


def test_inside_a_shard_map_it_says_what_to_call(model: Pangu) -> None:
    mesh = jax.make_mesh((1,), ("other",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(lambda m, t: m(t), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(ValueError, match=r"call pangu_jax\.model\.forward"):
        run(model, jnp.asarray(some_tokens()))


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", ">f4"])
def test_dtypes_and_forms_no_model_has(model: Pangu, dtype: str) -> None:
    with pytest.raises(pangu_jax.ConfigError, match="dtype must be one of float32, bfloat16"):
        build.check_choices(None, dtype)
    with pytest.raises(pangu_jax.ConfigError, match="form must be separate or stacked"):
        build.check_choices("scanned", None)


def test_init_is_the_same_in_both_forms() -> None:
    config = pangu_jax.preset("nano-moge")
    key = jax.random.key(3)
    a = pangu_jax.init(config, key, form="separate")
    b = pangu_jax.init(config, key, form="stacked")
    equal_trees(pangu_jax.convert(b, "separate"), a)
    weights = np.asarray(a.blocks[1].mlp.gate_up[...])
    np.testing.assert_allclose(weights.std(), config.init_range, rtol=0.02)
    assert not (weights == np.asarray(a.blocks[2].mlp.gate_up[...])).any()
    np.testing.assert_array_equal(a.blocks[0].mlp.router_scale[...], 1)
    np.testing.assert_array_equal(a.blocks[0].attention.qkv_bias[...], 0)


def test_the_same_model_on_another_device(folder: Path) -> None:
    with jax.default_device(jax.devices()[3]):
        model = pangu_jax.load(folder)
        logits = model(some_tokens())
    assert {d.id for leaf in jax.tree.leaves(model) for d in leaf.devices()} == {3}
    np.testing.assert_allclose(logits, pangu_jax.load(folder)(some_tokens()), atol=1e-5)
