"""Layout: the mesh and the role of its axes in every module.

`configs/layouts/*.toml` holds them.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from pangu_jax import config, strict
from pangu_jax.errors import ConfigError

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AttentionRoles:
    """Axes that split the sequences among attention replicas, and axes that split the heads."""

    batch: Axes
    heads: Axes


@dataclasses.dataclass(frozen=True)
class ExpertRoles:
    """Axes that split the routed experts (whole groups), and axes that split their width."""

    expert: Axes
    ffn: Axes


@dataclasses.dataclass(frozen=True)
class FFNRoles:
    """Axes that split the width of an MLP every token passes through."""

    ffn: Axes


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes, outermost first."""

    data: int = 1
    x: int = 1
    y: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axis splits what. Static and hashable: it is part of a model's type."""

    mesh: MeshShape
    attention: AttentionRoles
    experts: ExpertRoles
    shared: FFNRoles
    vocab: Axes

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self.mesh)
        if any(size < 1 for size in sizes.values()):
            raise ConfigError(f"mesh sizes must be at least 1, not {sizes}")
        roles = (self.attention.batch, self.attention.heads, self.experts.expert, self.experts.ffn)
        for axes in (*roles, self.shared.ffn, self.vocab):
            for axis in axes:
                if axis not in sizes:
                    raise ConfigError(f"unknown mesh axis {axis}; there are {', '.join(sizes)}")
        if self.num_devices > 1:
            # The blocks call their boundaries already; placing weights on several devices comes
            # with layouts.
            raise ConfigError(
                f"a mesh of {self.num_devices} devices is not supported yet; use layout 'single'"
            )

    @property
    def num_devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(dataclasses.astuple(self.mesh))

    def split(self, axes: Axes) -> Axes:
        """The axes among `axes` that really split something: collectives over the others are the
        identity.
        """
        return tuple(axis for axis in axes if getattr(self.mesh, axis) > 1)

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over the given devices, by default the first ones JAX sees.

        Raises ConfigError.
        """
        devices = default_devices() if devices is None else devices
        if len(devices) < self.num_devices:
            raise ConfigError(
                f"the layout needs {self.num_devices} devices; JAX sees {len(devices)}"
            )
        names = tuple(field.name for field in dataclasses.fields(self.mesh))
        grid = np.array(devices[: self.num_devices]).reshape(dataclasses.astuple(self.mesh))
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def default_devices() -> Sequence[Any]:
    """The devices a model goes to when none are named: `jax.default_device` is respected."""
    chosen: Any = getattr(jax.config, "jax_default_device")  # noqa: B009 (unknown to type checkers)
    if chosen is not None and not isinstance(chosen, str):
        return [chosen]
    try:
        return jax.devices(chosen)
    except (RuntimeError, AssertionError) as error:  # JAX asserts when a platform has no plugin
        wanted = chosen or getattr(jax.config, "jax_platforms")  # noqa: B009
        raise ConfigError(
            f"JAX has no usable {wanted or 'default'} device here; is the extra for it installed "
            "(pangu-jax[gpu], pangu-jax[tpu]), and JAX_PLATFORMS right?"
        ) from error


def load(name: "str | Path | Layout | None") -> Layout:
    """A Layout from its name, a TOML file, or itself; None is one device. Raises ConfigError."""
    if isinstance(name, Layout):
        return name
    path = config.named_file("layouts", "single" if name is None else name)
    return strict.build(Layout, strict.read_toml(path), str(path))
