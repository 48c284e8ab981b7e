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

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pangu_jax import cache as caches
from pangu_jax import rope
from pangu_jax.attention import Attention
from pangu_jax.cache import Cache, LayerCache, Meta
from pangu_jax.config import ModelConfig
from pangu_jax.linear import exact_if_float32, linear
from pangu_jax.mlp import MLP
from pangu_jax.moge import MoGE, Routing
from pangu_jax.norm import RMSNorm
from pangu_jax.origin import Origin
from pangu_jax.parallel import boundary
from pangu_jax.parallel.layout import Layout

Form = Literal["separate", "stacked"]
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
        meta: Meta,
        cache: LayerCache | None,
        where: Layout,
    ) -> tuple[Float[Array, "N D"], LayerCache | None, Routing | None]:
        """The residual stream and the cache after this layer, and the routing of a MoGE layer."""
        with jax.named_scope("attention"):
            axes = where.split(where.attention.heads)
            h = boundary.enter(self.attention_norm(x), axes)
            h, cache = self.attention(h, angles, meta, cache)
            h = boundary.leave(h, axes)
            if self.attention.out_bias is not None:
                h = h + self.attention.out_bias[...][None, :]
            x = x + h
        with jax.named_scope("mlp"):
            axes = where.split(where.shared.ffn)
            h = boundary.enter(self.mlp_norm(x), axes)
            h, routing = self.mlp(h) if isinstance(self.mlp, MoGE) else (self.mlp(h), None)
            x = x + boundary.leave(h, axes)
        return x, cache, routing


class Pangu(nnx.Module):
    """A Pangu language model: a pytree with static config, form, layout and mesh."""

    def __init__(
        self,
        config: ModelConfig,
        form: Form,
        dtype: DTypeLike,
        where: Layout,
        mesh: Mesh,
        origin: Origin = Origin(),
    ):
        self.config, self.form, self.layout, self.mesh = config, form, where, mesh
        self.origin = origin
        one, L = _abstract_param(dtype), config.num_layers
        self.embed = one(config.vocab_size, config.hidden_size)
        if form == "stacked":
            self.blocks = nnx.List([Block(config, _abstract_param(dtype, L))])
        else:
            self.blocks = nnx.List([Block(config, one) for _ in range(L)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, one)
        self.head = None if config.tie_embeddings else one(config.vocab_size, config.hidden_size)

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
        return _logits(self, *check_tokens(self.config, tokens, attention_mask))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embed.dtype

    @property
    def runs(self) -> tuple[int | None, ...]:
        """Length of every run of stacked layers, None for a separate one: the shape of a cache."""
        if self.form == "separate":
            return (None,) * len(self.blocks)
        return tuple(block.attention_norm.weight.shape[0] for block in self.blocks)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A KV cache for this model with `capacity` slots per sequence."""
        return caches.empty(self.config, self.runs, batch, capacity, self.dtype)


def forward(
    model: Pangu,
    tokens: Int[Array, " N"],
    meta: Meta,
    cache: Cache | None = None,
) -> tuple[Float[Array, "N D"], Cache | None]:
    """Final hidden states (normalised, ready for `logits`) of flat tokens, and the updated cache.

    Runs on one device's shards, under `on_mesh`. Without a cache the tokens attend to each other;
    with one they are written to their slots and attend to everything cached at or before their
    positions.
    """
    hidden, cache, _ = tapped_forward(model, tokens, meta, cache, lambda x, routing: None)
    return hidden, cache


def tapped_forward(
    model: Pangu, tokens: Int[Array, " N"], meta: Meta, cache: Cache | None, tap: Tap
) -> tuple[Float[Array, "N D"], Cache | None, list[Any]]:
    """`forward`, and what `tap(x, routing)` keeps of every layer: one stacked pytree per run of
    layers.
    """
    with exact_if_float32(model.dtype):
        x = embed(model, tokens)
        config = model.config
        angles = rope.table(meta.positions, config.rope_theta, config.head_dim, model.dtype)
        run_layers = _scan_run if model.form == "stacked" else _single_layer
        keys, values, kept = [], [], []
        for i, block in enumerate(model.blocks):
            pair = (cache.keys[i], cache.values[i]) if cache is not None else None
            layer = lambda block, x, layer_cache: block(x, angles, meta, layer_cache, model.layout)
            x, pair, taps = run_layers(layer, block, x, pair, tap)
            kept.append(taps)
            if pair is not None:
                keys.append(pair[0])
                values.append(pair[1])
        if cache is not None:
            filled = jnp.max(jnp.where(meta.valid, meta.positions + 1, 0), axis=1)
            cache = Cache(tuple(keys), tuple(values), jnp.maximum(cache.length, filled))
        return model.norm(x), cache, kept


def _single_layer(layer: Callable, block: Block, x: Array, pair: Any, tap: Tap) -> tuple:
    """One separate layer: x, its (keys, values) and its tap with a leading axis of one."""
    x, cache, routing = layer(block, x, LayerCache(*pair, layer=None) if pair else None)
    taps = jax.tree.map(lambda leaf: leaf[None], tap(x, routing))
    return x, (cache.keys, cache.values) if cache else None, taps


def _scan_run(layer: Callable, blocks: Block, x: Array, pair: Any, tap: Tap) -> tuple:
    """A run of stacked layers.

    The cache rides in the carry: as scan inputs and outputs it would be copied.
    """

    def step(carry: tuple, block_and_index: tuple) -> tuple:
        (x, pair), (block, index) = carry, block_and_index
        x, cache, routing = layer(block, x, LayerCache(*pair, layer=index) if pair else None)
        return (x, (cache.keys, cache.values) if cache else None), tap(x, routing)

    length = blocks.attention_norm.weight.shape[0]
    (x, pair), taps = lax.scan(step, (x, pair), (blocks, jnp.arange(length)))
    return x, pair, taps


def embed(model: Pangu, tokens: Int[Array, " N"]) -> Float[Array, "N D"]:
    """The first state of the residual stream; an id outside the vocabulary (padding) is clipped."""
    with jax.named_scope("embed"):
        return jnp.take(model.embed[...], tokens, axis=0, mode="clip")


def logits(model: Pangu, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """Float32 logits of final hidden states; a tied head is the embedding itself."""
    head = model.embed if model.head is None else model.head
    with exact_if_float32(model.dtype), jax.named_scope("head"):
        return linear(hidden, head[...], jnp.float32)


def on_mesh(model: Pangu, local: Callable) -> Callable:
    """`local(model, ...)`, written for one device, as a function of global arrays on the model's
    mesh.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in ambient.axis_types:
        raise ValueError(
            "this call is inside a shard_map; a model opens its own: call pangu_jax.model.forward "
            "there, or the model outside"
        )
    if not ambient.empty:
        raise ValueError(
            f"a mesh {dict(ambient.shape)} is set around this call; pangu_jax passes its own: "
            "leave jax.set_mesh before calling the model, and choose devices with a layout"
        )
    spec = PartitionSpec()  # a mesh of ones: every array is whole
    return jax.shard_map(local, mesh=model.mesh, in_specs=spec, out_specs=spec)


@jax.jit
def _logits(model: Pangu, tokens: Array, mask: Array) -> Array:
    def local(model: Pangu, tokens: Array, mask: Array) -> Array:
        hidden, _ = forward(model, tokens.reshape(-1), Meta.from_mask(mask))
        return logits(model, hidden).reshape(*tokens.shape, -1)

    return on_mesh(model, local)(model, tokens, mask)


def check_tokens(config: ModelConfig, tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Tokens as int32 [B, T] and the mask as bool [B, T], all True when it is None.

    Raises ValueError.
    """
    if getattr(tokens, "ndim", None) != 2 or not np.issubdtype(tokens.dtype, np.integer):
        kind = (
            f"{getattr(tokens, 'dtype', type(tokens).__name__)}{list(getattr(tokens, 'shape', []))}"
        )
        raise ValueError(f"tokens must be an integer array [B, T], not {kind}")
    if 0 in tokens.shape:
        raise ValueError(f"tokens {list(tokens.shape)} hold no token")
    if mask is None:
        mask = np.ones(tokens.shape, bool)
    if getattr(mask, "shape", None) != tokens.shape:
        raise ValueError(f"attention_mask must have the tokens' shape {list(tokens.shape)}")
    if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"attention_mask must be bool, or 0 and 1 as integers, not {mask.dtype}")
    if not isinstance(mask, Tracer):
        mask = np.asarray(mask)
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask must hold 0 and 1 only")
        if not isinstance(tokens, Tracer):
            _check_ids(config, np.where(mask, np.asarray(tokens), 0))
    return tokens.astype(np.int32), mask.astype(bool)


def _check_ids(config: ModelConfig, tokens: np.ndarray) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")


def _abstract_param(dtype: DTypeLike, *lead: int) -> Callable[..., nnx.Param]:
    """A maker of parameters that have a shape and dtype but no data yet; `lead` axes come first."""
    return lambda *shape: nnx.Param(jax.ShapeDtypeStruct((*lead, *shape), dtype))
