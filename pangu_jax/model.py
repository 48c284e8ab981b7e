"""Pangu, readable from top to bottom: embed -> blocks -> norm -> head.

One network for both families. A block is

    x = x + attention(norm(x))        grouped-query attention with RoPE and biases (attention.py)
    x = x + mlp(norm(x))              dense SwiGLU (mlp.py) or Mixture of Grouped Experts (moge.py)

Modules are immutable pytrees of weights with a pure `__call__`: apply `jax.jit`, `jax.grad`,
`jax.tree.map` to them directly. Everything that changes (cache, keys, optimizer state) is an
argument and a result.

`forward` is written for one device and runs under one `jax.shard_map`; the residual stream is flat
tokens [N, D]. Training, full passes, prefill and decode all call it, with other metadata and
caches. `Pangu.__call__` is the door for users and opens that shard_map.

Layers come in two forms. "separate": one module per layer and an unrolled loop (decode on CPU and
GPU, where scanning copies every layer's weights). "stacked": runs of equal layers as leaves with a
leading axis, under `lax.scan` (training, TPU: the program stays small). `convert` in build.py turns
one into the other.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pangu_jax import adapted, rope, tokens_and_mask
from pangu_jax import cache as caches
from pangu_jax.adapted import Adapters
from pangu_jax.attention import ATTENTION_OUTPUT, Attention
from pangu_jax.cache import Cache, LayerCache, Meta
from pangu_jax.config import ModelConfig
from pangu_jax.kernels.experts import Experts
from pangu_jax.kernels.experts.blocks import EXPERTS_OUTPUT
from pangu_jax.linear import linear
from pangu_jax.mlp import MLP
from pangu_jax.moge import MoGE, Routing
from pangu_jax.norm import RMSNorm
from pangu_jax.origin import Origin
from pangu_jax.paged import AnyMeta
from pangu_jax.parallel import boundary, fit
from pangu_jax.parallel.layout import Layout, Role
from pangu_jax.parallel.on_mesh import on_mesh, pad_rows
from pangu_jax.precision import exact_if_float32
from pangu_jax.quant import leaves
from pangu_jax.quant.scheme import FLOAT, Recipe

Form = Literal["separate", "stacked"]
Remat = Literal["dots", "full"]
Tap = Callable[[Array, Routing | None], Any]


class Block(nnx.Module):
    """One decoder layer, on this device's shard of the weights."""

    def __init__(self, config: ModelConfig, param: Any):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, param)
        self.attention = Attention(config, param)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, param)
        if config.moge is not None:
            self.mlp = MoGE(config, param)
        else:
            assert config.intermediate_size is not None
            self.mlp = MLP(config.hidden_size, config.intermediate_size, param)

    def __call__(
        self,
        x: Float[Array, "N D"],
        angles: rope.Table,
        meta: AnyMeta,
        cache: LayerCache | None,
        where: Layout,
        stack: Experts | None = None,
    ) -> tuple[Float[Array, "N D"], LayerCache | None, Routing | None]:
        """The residual stream and the cache after this layer, and the routing of a MoGE layer."""
        with jax.named_scope("attention"):
            axes = where.of("heads")
            h = boundary.enter(self.attention_norm(x), axes, where)[: meta.positions.size]
            h, cache = self.attention(h, angles, meta, cache)
            h = boundary.leave(boundary.pad(h, where), axes, where)
            if self.attention.out_bias is not None:
                h = h + self.attention.out_bias[...][None, :]
            x = x + h
        with jax.named_scope("mlp"):
            h, routing = self.mlp_norm(x), None
            if isinstance(self.mlp, MoGE):
                h, routing = self.mlp(h, meta, where, stack)
            else:
                axes = where.of("ffn")
                h = boundary.leave(self.mlp(boundary.enter(h, axes, where)), axes, where)
            x = x + h
        return x, cache, routing


class Pangu(nnx.Module):
    """A Pangu language model: a pytree with static config, form, layout and mesh."""

    def __init__(
        self,
        config: ModelConfig,
        form: Form,
        dtype: DTypeLike,
        where: Layout,
        mesh: Mesh | AbstractMesh,
        origin: Origin = Origin(),
        recipe: Recipe = FLOAT,
    ):
        self.config, self.layout, self.mesh, self.origin = config, where, mesh, origin
        self.recipe = recipe
        self.form: Form = form
        held, L = fit.held(config, where), config.num_layers
        one = _maker(dtype, where, mesh)
        vocab = lambda: one(held.vocab_size, held.hidden_size, vocab=0, fsdp=1)
        self.embed = vocab()
        layers = [(None, schemes) for schemes in recipe.layers(L)]
        runs = (recipe.runs or ((L, ()),)) if form == "stacked" else layers
        self.blocks = nnx.List([])
        for length, schemes in runs:
            block = Block(held, one if length is None else _maker(dtype, where, mesh, length))
            lead, experts = int(length is not None), config.moge is not None
            leaves.hold(block, schemes, lead=lead, experts=experts)
            if recipe.cache_scales:
                leaves.hold_cache_scale(block, lead=lead)
            self.blocks.append(block)
        self.norm = RMSNorm(held.hidden_size, held.norm_eps, one)
        self.head = None if config.tie_embeddings else vocab()

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        attention_mask: Bool[Array | np.ndarray, "B T"]
        | Int[Array | np.ndarray, "B T"]
        | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of a full causal pass.

        attention_mask: True or 1 for tokens, False or 0 for padding on either side; logits at
            padding are finite and otherwise unspecified. Positions are `max(cumsum(mask) - 1, 0)`.

        Raises ValueError for shapes or dtypes that do not fit, token ids outside the vocabulary,
        masks of anything but 0 and 1 (both are looked for outside transforms only), or a mesh
        entered by the caller.
        """
        return full_pass(self, *tokens_and_mask.check(self.config, tokens, attention_mask))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations, and of the weights that are not quantised."""
        return self.embed.dtype

    @property
    def runs(self) -> tuple[int | None, ...]:
        """Length of every run of stacked layers, None for a separate one: the shape of a cache."""
        if self.form == "separate":
            return (None,) * len(self.blocks)
        return tuple(block.attention_norm.weight.shape[0] for block in self.blocks)

    @property
    def specs(self) -> Any:
        """How the mesh splits every leaf: a tree like the model with PartitionSpecs."""
        specs = _specs(self.config, self.form, self.layout, self.mesh, self.recipe)
        return jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(specs))

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A KV cache for this model with `capacity` slots per sequence, on its devices."""
        held = fit.held(self.config, self.layout)
        blank = caches.empty(held, self.runs, batch, capacity, self.dtype, self.recipe)
        place = lambda leaf, spec: lax.with_sharding_constraint(
            leaf, NamedSharding(self.mesh, spec)
        )
        return jax.tree.map(place, blank, caches.specs(blank, self.layout))


def forward(
    model: Pangu,
    tokens: Int[Array, " N"],
    meta: AnyMeta,
    cache: Cache | None = None,
) -> tuple[Float[Array, "shard D"], Cache | None]:
    """Final hidden states (normalised) of flat tokens, and the updated cache.

    Runs on one device's shards, under `on_mesh`: the tokens, metadata and cache are those of one
    replica of attention, the states this device's part of the stream (`boundary.whole` has them
    all). Without a cache the tokens attend to each other; with one they are written to their slots
    and attend to everything cached at or before their positions.
    """
    hidden, cache, _ = tapped_forward(model, tokens, meta, cache, lambda x, routing: None)
    return hidden, cache


def tapped_forward(
    model: Pangu,
    tokens: Int[Array, " N"],
    meta: AnyMeta,
    cache: Cache | None,
    tap: Tap,
    remat: Remat | None = None,
    adapters: Adapters | None = None,
) -> tuple[Float[Array, "shard D"], Cache | None, list[Any]]:
    """`forward`, and what `tap(x, routing)` keeps of every layer: one stacked pytree per run of
    layers.

    remat: what of a layer the backward pass computes again: all but its products ("dots"), or all
        of it; None is whatever suits the layout
    adapters: low-rank ones beside its matrices (lora.py), as this device has them; not with a cache
    """
    assert adapters is None or cache is None
    where, specs = model.layout, model.specs
    with exact_if_float32(model.dtype):
        x = boundary.varying(embed(model, tokens), where.stream)
        config = model.config
        angles = rope.table(meta.positions, config.rope_theta, config.head_dim, model.dtype)

        again = _again(remat or default_remat(where)) if cache is None else lambda layer: layer
        run_layers = _scan_run if model.form == "stacked" else _single_layer
        keys, values, kept = [], [], []
        for i, (block, spec) in enumerate(zip(model.blocks, specs.blocks, strict=True)):
            if adapters is not None:
                block, spec = (adapted.attach(each, adapters, i) for each in (block, spec))

            def layer(
                block: Block,
                x: Array,
                cache: LayerCache | None,
                stack: Experts | None,
                spec: Any = spec,
            ) -> tuple:
                block = boundary.unshard(block, spec, where)
                return block(x, angles, meta, cache, where, stack)

            pair = (cache.keys[i], cache.values[i]) if cache is not None else None
            x, pair, taps = run_layers(again(layer), block, x, pair, tap, where)
            kept.append(taps)
            if pair is not None:
                keys.append(pair[0])
                values.append(pair[1])
        if cache is not None:
            cache = Cache(tuple(keys), tuple(values), meta.lengths(cache.length))
        return model.norm(x), cache, kept


def default_remat(where: Layout) -> Remat:
    """What a layout computes again by itself: under fsdp everything, as weights are gathered again;
    else all but products, which keeps about half of what nothing would (docs/benchmarks.md).
    """
    return "full" if where.of("fsdp") else "dots"


def _again(remat: Remat) -> Callable[[Callable], Callable]:
    """A layer as `remat` wants it."""
    if remat == "full":
        return jax.checkpoint
    policies = jax.checkpoint_policies
    products = policies.dots_with_no_batch_dims_saveable  # of attention's scores no more
    outputs = policies.save_only_these_names(ATTENTION_OUTPUT, EXPERTS_OUTPUT)
    keep = policies.save_from_both_policies(products, outputs)
    return functools.partial(jax.checkpoint, policy=keep)


def _single_layer(
    layer: Callable, block: Block, x: Array, pair: Any, tap: Tap, where: Layout
) -> tuple:
    """One separate layer: x, its (keys, values) and its tap with a leading axis of one."""
    x, cache, routing = layer(block, x, LayerCache(*pair, layer=None) if pair else None, None)
    taps = jax.tree.map(lambda leaf: leaf[None], tap(x, routing))
    return x, (cache.keys, cache.values) if cache else None, taps


def _scan_run(
    layer: Callable, blocks: Block, x: Array, pair: Any, tap: Tap, where: Layout
) -> tuple:
    """A run of stacked layers.

    The cache rides in the carry: as scan inputs and outputs it would be copied. Nor are the routed
    experts inputs of the scan when there is a cache; without one (in training) they are, because
    their gradients belong to one layer.
    """
    in_place = pair is not None and isinstance(blocks.mlp, MoGE) and not where.of("fsdp")

    def step(carry: tuple, block_and_index: tuple) -> tuple:
        (x, pair), (block, index) = carry, block_and_index
        stack = Experts(blocks.mlp.gate_up[...], blocks.mlp.down[...], index) if in_place else None
        x, cache, routing = layer(block, x, LayerCache(*pair, layer=index) if pair else None, stack)
        return (x, (cache.keys, cache.values) if cache else None), tap(x, routing)

    length = blocks.attention_norm.weight.shape[0]
    (x, pair), taps = lax.scan(step, (x, pair), (blocks, jnp.arange(length)))
    return x, pair, taps


def embed(model: Pangu, tokens: Int[Array, " N"]) -> Float[Array, "shard D"]:
    """The first state of the residual stream; an id outside the vocabulary (padding) is clipped."""
    where, table = model.layout, model.embed[...]
    axes = where.of("vocab")
    with jax.named_scope("embed"):
        ids = boundary.spread(tokens, axes, where)
        ids = jnp.clip(ids, 0, model.config.vocab_size - 1)
        mine = None
        if axes:
            ids = ids - lax.axis_index(axes) * table.shape[0]
            mine = (ids >= 0) & (ids < table.shape[0])
        x = boundary.look_up(table, ids, where)
        if mine is not None:
            x = jnp.where(mine[:, None], x, 0)
        return boundary.leave(x, axes, where)


def logits(model: Pangu, rows: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """Float32 logits of a replica's hidden states, which every rank of its heads has."""
    where = model.layout
    axes = where.of("vocab")
    replicas = tuple(axis for axis in axes if axis in where.of("batch"))
    heads = tuple(axis for axis in axes if axis in where.of("heads"))
    with jax.named_scope("head"):
        if replicas:  # each has a part of the vocabulary, for the rows of all of them
            rows = lax.all_gather(rows, replicas, axis=0, tiled=True)
        with exact_if_float32(model.dtype):
            z = linear(rows, head(model), jnp.float32)
        if replicas:
            z = lax.all_to_all(z, replicas, split_axis=0, concat_axis=1, tiled=True)
        if heads:
            z = lax.all_gather(z, heads, axis=1, tiled=True, to="invarying")
        return z[:, : model.config.vocab_size]


def head(model: Pangu) -> Float[Array, "part D"]:
    """This device's rows of the output matrix, which may end in padding; a tied head is the
    embedding itself.
    """
    specs = model.specs
    held, spec = (model.embed, specs.embed) if model.head is None else (model.head, specs.head)
    return boundary.unshard(held, spec, model.layout)[...]


@functools.lru_cache(maxsize=64)
def _specs(
    config: ModelConfig, form: Form, where: Layout, mesh: Mesh | AbstractMesh, recipe: Recipe
) -> Any:
    abstract = Pangu(config, form, jnp.float32, where, mesh, recipe=recipe)
    return jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)


@jax.jit
def full_pass(
    model: Pangu, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T V"]:
    """`Pangu.__call__` of checked arguments."""
    where = model.layout
    tokens, mask, count = pad_rows(where, tokens, mask)

    def local(model: Pangu, tokens: Array, mask: Array) -> Array:
        hidden, _ = forward(model, tokens.reshape(-1), Meta.from_mask(mask))
        rows = boundary.whole(hidden, tokens.size, where)
        return logits(model, rows).reshape(*tokens.shape, -1)

    run = on_mesh(model, local, (where.rows, where.rows), where.rows)
    return run(model, tokens, mask)[:count]


def _maker(
    dtype: DTypeLike, where: Layout, mesh: Mesh | AbstractMesh, *lead: int
) -> Callable[..., nnx.Param]:
    """A maker of parameters that have a shape, dtype and place but no data yet; `lead` axes come
    first.

    It is called with a shape and, by keyword, which of its axes each role of the layout splits.
    """

    def param(*shape: int, **split: int) -> nnx.Param:
        parts: list[Any] = [None] * len(shape)
        for role, axis in split.items():
            parts[axis] = where.of(cast(Role, role)) or None
        place: Any = NamedSharding(mesh, PartitionSpec(*[None] * len(lead), *parts))
        if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu":
            # Left to itself, XLA lays matrices whose width is no multiple of 128 out by columns,
            # and copies all of them back in every call.
            rows_first = tuple(range(len(lead) + len(shape)))
            place = Format(MemoryLayout(major_to_minor=rows_first), place)
        return nnx.Param(jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=place))

    return param
