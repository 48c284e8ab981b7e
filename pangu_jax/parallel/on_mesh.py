"""From global arrays to the program of one device and back: the only shard_map of a call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from pangu_jax.parallel.layout import Layout


def on_mesh(model: Any, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local(model, ...)`, written for one device, as a function of global arrays on the model's
    mesh.

    model: a Pangu
    in_specs: of the arguments after the model
    Raises ValueError inside of another mesh or shard_map.
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
    return jax.shard_map(
        local, mesh=model.mesh, in_specs=(model.specs, *in_specs), out_specs=out_specs
    )


def pad_rows(where: Layout, tokens: Array, mask: Array) -> tuple[Array, Array, int]:
    """Tokens and mask with rows of padding, as many as the replicas of attention can share; and how
    many there were.
    """
    count = tokens.shape[0]
    more = [(0, where.round_rows(count) - count), (0, 0)]
    return jnp.pad(tokens, more), jnp.pad(mask, more), count
