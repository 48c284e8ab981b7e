"""Whether a model fits a layout, and what its weights are padded to.

Refused: what would split a head or a group of experts. Padded with zeros, which change nothing: the
vocabulary and the widths of MLPs. Repeated: key and value heads, where there are more ranks than
heads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError
from pangu_jax.parallel.layout import Axes, Layout
from pangu_jax.quant import leaves


def held(config: ModelConfig, where: Layout) -> ModelConfig:
    """The model as devices hold it: heads repeated, vocabulary and widths padded.

    Raises ConfigError where the model does not fit.
    """
    _check_heads(config, where)
    _check_fsdp(config, where)
    moge = config.moge
    if moge is not None:
        _check_experts(config, where)
        moge = dataclasses.replace(
            moge,
            expert_width=_padded(moge.expert_width, where.of("expert_ffn"), where),
            shared_width=_padded(moge.shared_width, where.of("ffn"), where),
        )
    width = config.intermediate_size
    return dataclasses.replace(
        config,
        vocab_size=_padded(config.vocab_size, where.of("vocab"), where),
        num_kv_heads=max(config.num_kv_heads, where.size(where.of("heads"))),
        intermediate_size=None if width is None else _padded(width, where.of("ffn"), where),
        moge=moge,
    )


def _padded(size: int, axes: Axes, where: Layout) -> int:
    ranks = where.size(axes)
    return -(-size // ranks) * ranks


def _check_heads(config: ModelConfig, where: Layout) -> None:
    ranks, Q, K = where.size(where.of("heads")), config.num_heads, config.num_kv_heads
    right = lambda n: Q % n == 0 and (n % K == 0 or K % n == 0)
    if not right(ranks):
        fits = [n for n in range(1, Q + 1) if right(n)]
        raise ConfigError(
            f"attention.heads ({', '.join(where.of('heads'))}: {ranks} ranks) cannot split {Q} "
            f"query and {K} key/value heads evenly; the nearest number that can is "
            f"{_nearest(ranks, fits)}"
        )


def _check_experts(config: ModelConfig, where: Layout) -> None:
    assert config.moge is not None
    ranks, E, G = where.size(where.of("expert")), config.moge.num_experts, config.moge.num_groups
    grouped = config.moge.router == "grouped"
    pieces, what = (G, "groups of experts") if grouped else (E, "experts")
    if pieces % ranks:
        fits = [n for n in range(1, pieces + 1) if pieces % n == 0]
        raise ConfigError(
            f"experts.expert ({', '.join(where.of('expert'))}: {ranks} ranks) cannot hold "
            f"{pieces} whole {what} evenly; the nearest number that can is "
            f"{_nearest(ranks, fits)}"
        )


def _check_fsdp(config: ModelConfig, where: Layout) -> None:
    ranks, D = where.size(where.of("fsdp")), config.hidden_size
    if D % ranks:
        fits = [n for n in range(1, D + 1) if D % n == 0]
        raise ConfigError(
            f"params.fsdp ({', '.join(where.of('fsdp'))}: {ranks} ranks) cannot split a hidden "
            f"size of {D} evenly; the nearest number that can is {_nearest(ranks, fits)}"
        )


def _nearest(wanted: int, choices: list[int]) -> int:
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


def hold(name: str, whole: Any, shape: tuple[int, ...]) -> Any:
    """A leaf as devices hold it, in `shape`, from the model's own numbers; differentiable.

    name: such as `blocks.0.attention.qkv`; of NumPy arrays and of JAX's
    """
    if whole.shape == tuple(shape):
        return whole
    xp: Any = jnp if isinstance(whole, jax.Array) else np
    axis = _heads_axis(name, whole)
    if axis is not None:
        queries, pairs = xp.split(whole, [whole.shape[axis + 1] - 2], axis=axis + 1)
        queries = queries.reshape(*shape[: axis + 1], shape[axis + 1] - 2, *whole.shape[axis + 2 :])
        pairs = xp.repeat(pairs, shape[axis] // whole.shape[axis], axis=axis)
        whole = xp.concatenate([queries, pairs], axis=axis + 1)
    return xp.pad(whole, [(0, more - size) for size, more in zip(whole.shape, shape, strict=True)])


def own_numbers(name: str, held: Any, shape: tuple[int, ...]) -> Any:
    """A leaf without what `hold` added: `shape` is the model's own."""
    if held.shape == tuple(shape):
        return held
    axis = _heads_axis(name, held)
    if axis is None:
        return held[tuple(slice(size) for size in shape)]
    held = held[(..., *(slice(size) for size in shape[axis + 2 :]))]
    xp: Any = jnp if isinstance(held, jax.Array) else np
    repeats = held.shape[axis] // shape[axis]
    queries, pairs = xp.split(held, [held.shape[axis + 1] - 2], axis=axis + 1)
    queries = queries.reshape(*shape[: axis + 1], shape[axis + 1] - 2, *shape[axis + 2 :])
    first = (slice(None),) * axis + (slice(None, None, repeats),)
    return xp.concatenate([queries, pairs[first]], axis=axis + 1)


def _heads_axis(name: str, leaf: Any) -> int | None:
    """The axis of key/value heads, before that of their queries, key and value; None for leaves
    that have no such axes.
    """
    leaf_name, _ = leaves.split(name)
    if leaf_name.endswith("attention.qkv"):
        return leaf.ndim - 4
    return leaf.ndim - 3 if name.endswith(("qkv_bias", "cache_scale")) else None
