"""Layout: the mesh and the role of its axes in every module.

`configs/layouts/*.toml` holds them. A layout knows nothing of models; whether a model fits one is
fit.py's business.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from pangu_jax import config, strict
from pangu_jax.errors import ConfigError

Axes = tuple[str, ...]
Role = Literal["batch", "heads", "expert", "expert_ffn", "ffn", "vocab", "fsdp"]

MAX_DEVICES = 2**20


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes, outermost first; one of them may be -1: whatever devices are left."""

    data: int = 1
    x: int = 1
    y: int = 1


@dataclasses.dataclass(frozen=True)
class AttentionRoles:
    """Axes that split the sequences among attention replicas, and axes that split the heads.

    Together they name every axis of the mesh, and say how tokens are spread over devices.
    """

    batch: Axes
    heads: Axes


@dataclasses.dataclass(frozen=True)
class ExpertRoles:
    """Axes that split the routed experts (whole groups), and axes that split their width."""

    expert: Axes
    ffn: Axes


@dataclasses.dataclass(frozen=True)
class FFNRoles:
    """Axes that split the width of an MLP every token passes through: a dense model's, or the
    shared experts of a MoGE.
    """

    ffn: Axes


@dataclasses.dataclass(frozen=True)
class ParamRoles:
    """Axes over which weights are kept in parts and gathered layer by layer (FSDP, for training).

    They split sequences too: each of their ranks works on its own.
    """

    fsdp: Axes = ()


@dataclasses.dataclass(frozen=True)
class Boundary:
    """How tokens cross devices (boundary.py).

    kind: "all_reduce" is the baseline: every device of the heads' axes holds all of its tokens'
        states. "flashcomm1" splits them over those axes too.
    gather: "int8" sends gathered activations as int8 with a float32 scale per token, which is not
        exact
    """

    kind: Literal["all_reduce", "flashcomm1"] = "flashcomm1"
    gather: Literal["exact", "int8"] = "exact"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axis splits what. Static and hashable: it is part of a model's type.

    Raises ConfigError for roles that contradict each other.
    """

    mesh: MeshShape
    attention: AttentionRoles
    experts: ExpertRoles
    shared: FFNRoles
    vocab: Axes
    params: ParamRoles = ParamRoles()
    boundary: Boundary = Boundary()

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self.mesh)
        if list(sizes.values()).count(-1) > 1 or any(n != -1 and n < 1 for n in sizes.values()):
            raise ConfigError(f"mesh sizes must be at least 1, and one may be -1, not {sizes}")
        if math.prod(abs(size) for size in sizes.values()) > MAX_DEVICES:
            raise ConfigError(f"a mesh of more than {MAX_DEVICES} devices: {sizes}")
        for name, axes in self._named_roles():
            for axis in axes:
                if axis not in sizes:
                    raise ConfigError(
                        f"{name}: unknown mesh axis {strict.shorten(axis)}; "
                        f"there are {', '.join(sizes)}"
                    )
        tokens = (*self.attention.batch, *self.attention.heads)
        if sorted(tokens) != sorted(sizes):
            raise ConfigError(
                "attention.batch and attention.heads must together name every mesh axis once "
                f"({', '.join(sizes)}), not {', '.join(tokens) or 'none'}"
            )
        for name, axes in (
            ("experts.expert and experts.ffn", self.experts.expert + self.experts.ffn),
            ("shared.ffn", self.shared.ffn),
            ("vocab", self.vocab),
            ("params.fsdp", self.params.fsdp),
        ):
            if len(set(axes)) != len(axes):
                raise ConfigError(f"{name}: an axis is named twice: {', '.join(axes)}")
        self._check_shared()
        self._check_fsdp()

    def _named_roles(self) -> list[tuple[str, Axes]]:
        return [
            ("attention.batch", self.attention.batch),
            ("attention.heads", self.attention.heads),
            ("experts.expert", self.experts.expert),
            ("experts.ffn", self.experts.ffn),
            ("shared.ffn", self.shared.ffn),
            ("vocab", self.vocab),
            ("params.fsdp", self.params.fsdp),
        ]

    def _check_shared(self) -> None:
        """The shared experts' partial sums leave with the routed ones', or there are none."""
        routed, shared = (
            self.split(self.experts.expert + self.experts.ffn),
            self.split(self.shared.ffn),
        )
        if routed and shared and set(routed) != set(shared):
            raise ConfigError(
                f"shared.ffn ({', '.join(shared)}) must be the axes of the routed experts "
                f"({', '.join(routed)}), or none"
            )

    def _check_fsdp(self) -> None:
        for axis in self.params.fsdp:
            if axis not in self.attention.batch:
                raise ConfigError(
                    f"params.fsdp: {axis} must be one of attention.batch "
                    f"({', '.join(self.attention.batch)}): every one of its ranks gathers the "
                    "weights for sequences of its own"
                )
            for name, axes in self._named_roles()[1:-1]:
                if axis in axes:
                    raise ConfigError(
                        f"params.fsdp: {axis} splits the weights already ({name}); take another "
                        "axis for one of them"
                    )

    @property
    def num_devices(self) -> int:
        """How many devices the mesh has; the others' product while one size is -1."""
        return math.prod(size for size in dataclasses.astuple(self.mesh) if size != -1)

    def over(self, devices: int) -> "Layout":
        """The layout with a size of -1 replaced: as many as `devices` have room for.

        Raises ConfigError when they have none, or some would be left over.
        """
        sizes = dataclasses.asdict(self.mesh)
        left = [name for name, size in sizes.items() if size == -1]
        if not left:
            return self
        if devices < 1 or devices % self.num_devices:
            raise ConfigError(
                f"the layout's mesh {sizes} needs a multiple of {self.num_devices} devices, "
                f"not {devices}"
            )
        filled = dataclasses.replace(self.mesh, **{left[0]: devices // self.num_devices})
        return dataclasses.replace(self, mesh=filled)

    def split(self, axes: Iterable[str]) -> Axes:
        """The axes among `axes` that really split something, in the order of the tokens:
        collectives over the others are the identity.
        """
        order = (*self.attention.batch, *self.attention.heads)
        return tuple(a for a in order if a in axes and getattr(self.mesh, a) != 1)

    def size(self, axes: Iterable[str]) -> int:
        """How many ranks the axes have together."""
        return math.prod(getattr(self.mesh, axis) for axis in axes)

    def of(self, role: Role) -> Axes:
        """The axes of a role that really split something.

        Heads come before replicas in the order of the vocabulary: then its parts are in order after
        an exchange among replicas and a gather among heads.
        """
        match role:
            case "batch":
                return self.split(self.attention.batch)
            case "heads":
                return self.split(self.attention.heads)
            case "expert":
                return self.split(self.experts.expert)
            case "expert_ffn":
                return self.split(self.experts.ffn)
            case "ffn":
                return self.split(self.shared.ffn)
            case "fsdp":
                return self.split(self.params.fsdp)
            case "vocab":
                axes = self.split(self.vocab)
                heads = tuple(axis for axis in axes if axis in self.attention.heads)
                return heads + tuple(axis for axis in axes if axis in self.attention.batch)

    @property
    def stream(self) -> Axes:
        """The axes over which the residual stream's tokens are spread, outermost first."""
        if self.boundary.kind == "all_reduce":
            return self.of("batch")
        return self.of("batch") + self.of("heads")

    @property
    def routed(self) -> Axes:
        """The axes whose ranks share the work of the routed experts."""
        return self.split(self.experts.expert + self.experts.ffn)

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays with an axis of sequences in front."""
        return PartitionSpec(self.of("batch") or None)

    def round_rows(self, batch: int) -> int:
        """The number of sequences, rounded up to one that the replicas of attention can share."""
        ranks = self.size(self.of("batch"))
        return -(-batch // ranks) * ranks

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over the given devices, by default the first ones JAX sees.

        Raises ConfigError.
        """
        devices = default_devices() if devices is None else devices
        if len(devices) < self.num_devices:
            hint = ""
            if self.num_devices > 1 and (not devices or devices[0].platform == "cpu"):
                hint = f"; JAX_NUM_CPU_DEVICES={self.num_devices} makes as many of one CPU"
            raise ConfigError(
                f"the layout needs {self.num_devices} devices; JAX sees {len(devices)}{hint}"
            )
        sizes, names = dataclasses.astuple(self.mesh), tuple(dataclasses.asdict(self.mesh))
        # In JAX's order: neighbours on a TPU's torus.
        return jax.make_mesh(
            sizes,
            names,
            axis_types=(AxisType.Auto,) * len(names),
            devices=list(devices[: self.num_devices]),
        )

    def abstract_mesh(self) -> AbstractMesh:
        """The same mesh without devices: enough to say what each would hold, and to lower programs
        that are not to be compiled.
        """
        sizes, names = dataclasses.astuple(self.mesh), dataclasses.asdict(self.mesh)
        return AbstractMesh(sizes, tuple(names), axis_types=(AxisType.Auto,) * len(names))


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
