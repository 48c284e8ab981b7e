"""Making models: the abstract tree, and what fills or reshapes it by leaf name.

`abstract` is the one truth about a model's leaves. Initialising, loading, converting and saving all
go through their names, such as `blocks.3.attention.qkv`; a leaf of stacked layers stands for one
such name per layer.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from pangu_jax.config import DType, ModelConfig
from pangu_jax.errors import ConfigError
from pangu_jax.model import Form, Pangu
from pangu_jax.origin import Origin
from pangu_jax.parallel import fit, layout
from pangu_jax.parallel.layout import Layout
from pangu_jax.quant import leaves, weight
from pangu_jax.quant import scheme as schemes
from pangu_jax.quant.scheme import FLOAT, CacheNumbers, Recipe
from pangu_jax.quant.weight import Weight


def default_form(mesh: Mesh) -> Form:
    """Separate layers on CPU and GPU, stacked ones on TPU (measured; see docs/architecture.md)."""
    return "stacked" if mesh.devices.flat[0].platform == "tpu" else "separate"


def abstract(
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    where: Layout | str | None = None,
    form: Form | None = None,
    origin: Origin = Origin(),
    recipe: Recipe = FLOAT,
    devices: Sequence[Any] | None = None,
) -> Pangu:
    """The model as shapes, dtypes and places, no data: what loading, initialising and planning fill
    or read.

    recipe: what is held in fewer bits
    devices: those of the mesh, by default the first ones JAX sees
    Raises ConfigError, also where the model does not fit the layout.
    """
    check_choices(form, dtype)
    devices = layout.default_devices() if devices is None else devices
    placed = layout.load(where).over(len(devices))
    kind = jnp.dtype(config.dtype if dtype is None else dtype)
    mesh = placed.make_mesh(devices)
    return Pangu(config, form or default_form(mesh), kind, placed, mesh, origin, recipe)


def check_choices(form: Any, dtype: Any) -> None:
    """Raises ConfigError for a form or dtype that no model has; None is a default."""
    if form not in (None, *get_args(Form)):
        raise ConfigError(f"form must be {' or '.join(get_args(Form))}, not {form}")
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
        native = dtype is None or jnp.dtype(dtype).isnative
    except TypeError:
        name, native = str(dtype), False
    if name is not None and (name not in get_args(DType) or not native):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(DType))}, not {name}")


def own_shapes(model: Pangu) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf without what its layout adds (see `parallel.fit`), by name."""
    one = layout.load(None)
    mesh, recipe = one.abstract_mesh(), model.recipe
    bare = Pangu(model.config, model.form, model.dtype, one, mesh, recipe=recipe)
    return {name: leaf.shape for name, leaf in named_leaves(bare)}


def named_leaves(model: Pangu) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted name, such as `blocks.0.attention.qkv`, in tree order; of a
    quantised leaf its parts, such as `blocks.0.attention.qkv.scale`.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
        yield ".".join(key for key in keys if key != "value"), leaf


def fill(model: Pangu, leaf: Callable[[str, Any], Array]) -> Pangu:
    """A model of the same structure whose leaves are `leaf(name, old leaf)`."""
    leaves = [leaf(name, old) for name, old in named_leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def weights(model: Pangu) -> dict[str, Array]:
    """The model's own numbers by leaf name: the same whatever its layout, on the model's devices.

    Parts of them lie where the layout puts them, except along axes that it had to pad or repeat.
    """
    shapes, where, found = own_shapes(model), places(model), {}
    for name, held in named_leaves(model):
        found[name] = own = fit.own_numbers(name, held, shapes[name])
        if own is not held:
            found[name] = lax.with_sharding_constraint(own, where[name])
    return found


def places(model: Pangu) -> dict[str, NamedSharding]:
    """Where `weights` puts each leaf."""
    shapes, found = own_shapes(model), {}
    for (name, held), spec in zip(named_leaves(model), jax.tree.leaves(model.specs), strict=True):
        kept = [
            part if size == own else None
            for part, size, own in zip(spec, held.shape, shapes[name], strict=True)
        ]
        while kept and kept[-1] is None:  # as XLA says it of a result: else a step compiles twice
            kept.pop()
        found[name] = NamedSharding(model.mesh, PartitionSpec(*kept))
    return found


def with_weights(like: Pangu, own: Mapping[str, Array]) -> Pangu:
    """The model of `like`'s structure and layout with these weights; differentiable."""
    return fill(like, lambda name, held: fit.hold(name, own[name], held.shape))


def with_voting(model: Pangu, voted_experts: int | None) -> Pangu:
    """The same weights with `MoGEConfig.voted_experts`, which is LOSSY; None is exact routing.

    Raises ConfigError.
    """
    if model.config.moge is None:
        raise ConfigError("voted_experts: the model has no experts")
    moge = dataclasses.replace(model.config.moge, voted_experts=voted_experts)
    config = dataclasses.replace(model.config, moge=moge)
    return _restructured(model, config, model.recipe)


def _restructured(model: Pangu, config: ModelConfig, recipe: Recipe) -> Pangu:
    """The same leaves under another config or recipe."""
    where, mesh, origin = model.layout, model.mesh, model.origin
    like = Pangu(config, model.form, model.dtype, where, mesh, origin, recipe)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def with_cache(model: Pangu, numbers: CacheNumbers | None) -> Pangu:
    """The same weights with another kind of KV cache: "int8", or None for the activations' dtype.

    Raises ConfigError, also for a model whose cache has calibrated scales.
    """
    if model.recipe.cache_scales and numbers is None:
        raise ConfigError("the model was calibrated for an int8 cache")
    recipe = dataclasses.replace(model.recipe, cache=numbers)
    return _restructured(model, model.config, recipe)


def quantize(model: Pangu, recipe: Recipe | str) -> Pangu:
    """A model with the matrices of `recipe` rounded to nearest: a recipe, or the name of one (w8a8,
    w8a16, w4a16, fp8).

    Leaf by leaf; what stays float is shared with `model`. The result is frozen in training.
    Raises ConfigError for a recipe that does not fit, or a model that is quantised already.
    """
    if isinstance(recipe, str):
        recipe = schemes.named(recipe, model.config)
        kept: Any = dict(cache=model.recipe.cache, cache_scales=model.recipe.cache_scales)
        recipe = dataclasses.replace(recipe, **kept)
    if model.recipe.runs:
        raise ConfigError("the model is quantised already: its float weights are gone")
    where, mesh, origin = model.layout, model.mesh, model.origin
    like = Pangu(model.config, model.form, model.dtype, where, mesh, origin, recipe)
    of_layer, whole = _slices(model), dict(named_leaves(model))

    def floats(name: str) -> Array:
        names = layer_names(like, name)
        if names is None or whole.get(name, np.zeros(0)).shape[0] == len(names):
            return whole[name]
        return jnp.stack([of_layer[own]() for own in names])

    return fill(like, _rounded(like, floats))


def _rounded(like: Pangu, floats: Callable[[str], Array]) -> Callable[[str, Any], Array]:
    """What `fill` wants of a quantised model: leaves by name from those of a float one."""
    last: dict[str, Weight] = {}  # the parts of a leaf follow each other

    def leaf(name: str, held: Any) -> Array:
        own, part = leaves.split(name)
        if part is None:
            return floats(name)
        if own not in last:
            last.clear()
            scheme = like.recipe.scheme((layer_names(like, own) or [own])[0])
            last[own] = _quantize(floats(own), scheme)
        return jax.device_put(fit.hold(name, getattr(last[own], part), held.shape), held.format)

    return leaf


_quantize = jax.jit(weight.quantize, static_argnums=1)


def layer_names(model: Pangu, name: str) -> list[str] | None:
    """For a leaf of a run of stacked layers, the names its slices have as separate layers; else
    None.
    """
    if model.form == "separate" or not name.startswith("blocks."):
        return None
    _, run, rest = name.split(".", 2)
    lengths = [length or 1 for length in model.runs]
    first = sum(lengths[: int(run)])
    return [f"blocks.{first + i}.{rest}" for i in range(lengths[int(run)])]


def convert(model: Pangu, form: Form) -> Pangu:
    """The same model with its layers in the other form; pure, and usable under `jax.jit` and
    `jax.grad`.
    """
    check_choices(form, None)
    if form == model.form:
        return model
    slices = _slices(model)
    where, mesh, origin = model.layout, model.mesh, model.origin
    target = Pangu(model.config, form, model.dtype, where, mesh, origin, model.recipe)

    def leaf(name: str, like: Any) -> Array:
        names = layer_names(target, name)
        return slices[name]() if names is None else jnp.stack([slices[own]() for own in names])

    return fill(target, leaf)


def _slices(model: Pangu) -> dict[str, Callable[[], Array]]:
    """Every leaf by its name in separate form, cut out of its stack when it is called."""
    found: dict[str, Callable[[], Array]] = {}
    for name, held in named_leaves(model):
        names = layer_names(model, name)
        for i, own in enumerate(names or [name]):
            found[own] = (
                (lambda held=held: held) if names is None else lambda held=held, i=i: held[i]
            )
    return found


def init(
    config: ModelConfig,
    key: Array,
    *,
    dtype: DTypeLike | None = None,
    where: Layout | str | None = None,
    form: Form | None = None,
    recipe: Recipe | str = FLOAT,
) -> Pangu:
    """A randomly initialised model: matrices normal with `init_range`, norms and router_scale 1,
    biases 0.

    Both forms hold the same numbers, and so does every layout: the key of a layer's leaf is folded
    from its name. With a recipe (or the name of one) each leaf is rounded as soon as it is drawn.
    """
    if isinstance(recipe, str):
        recipe = schemes.named(recipe, config)
    model = abstract(config, dtype=dtype, where=where, form=form, recipe=recipe)
    one = layout.load(None)
    shapes = own_shapes(Pangu(config, "separate", model.dtype, one, one.abstract_mesh()))

    def draw(name: str) -> Array:
        shape = shapes[name]
        if name.endswith(("norm.weight", "router_scale")):
            return jnp.ones(shape, model.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, model.dtype)
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        return _normal(own, np.float32(config.init_range), shape, model.dtype)

    def floats(name: str) -> Array:
        names = layer_names(model, name)
        return draw(name) if names is None else jnp.stack([draw(own) for own in names])

    own = _rounded(model, floats)
    put = lambda name, held: jax.device_put(
        fit.hold(name, own(name, held), held.shape), held.format
    )
    return fill(model, put)


@jax.jit(static_argnames=("shape", "dtype"))
def _normal(key: Array, scale: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)
