"""Machines to plan for: their figures, and their compilers' view of them.

JAX is imported when devices are asked for: what it must know of the machine is in the environment
by then (`environment`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pangu_jax import config, strict
from pangu_jax.errors import ConfigError

MOST_CHIPS = 2**20

# What `pip install` brings each platform's compiler.
EXTRAS = {"tpu": "pangu-jax[tpu]", "cuda": "pangu-jax[gpu]"}


class NoCompiler(ConfigError):
    """The compiler of a target is not installed here."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its vendor describes it (configs/targets).

    tflops_float32: of full precision; on a TPU, six bf16 products for one
    """

    name: str
    platform: Literal["tpu", "cuda", "cpu"]
    memory_gib: float
    memory_gb_per_s: float
    tflops_float32: float
    tflops_bf16: float
    tflops_int8: float
    link_gb_per_s: float
    description: str = ""

    def tflops(self, itemsize: int) -> float:
        """Of products of numbers of so many bytes."""
        return {1: self.tflops_int8, 2: self.tflops_bf16, 4: self.tflops_float32}[itemsize]


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips, and how they are wired: `shape` is the topology's, without the chip's name."""

    chip: Chip
    kind: str
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)

    @property
    def environment(self) -> dict[str, str]:
        """What must be in the environment when JAX starts, for a compiler without its machine."""
        match self.chip.platform:
            case "tpu":
                quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
                return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", **quiet}
            case "cuda":
                return {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
            case "cpu":
                return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.num_devices)}

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> Sequence[Any]:
        """The devices, for compiling: none of them can run anything.

        Raises NoCompiler, and ConfigError for a shape that the platform does not have.
        """
        import jax

        if self.chip.platform == "cpu":
            found = jax.devices("cpu")
            if len(found) < self.num_devices:
                raise NoCompiler(
                    f"{self} needs JAX_NUM_CPU_DEVICES={self.num_devices} in the environment"
                )
            return found[: self.num_devices]
        from jax.experimental import topologies

        platform: str = self.chip.platform
        name, options = str(self), {}
        if platform == "cuda":
            hosts, each = (1, *self.shape)[-2:]
            name = self.kind
            options = {
                "target_config": self.chip.description,
                "topology": f"1x{hosts}x{each}",
            }
        try:
            return topologies.get_topology_desc(
                platform=platform, topology_name=name, **options
            ).devices
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if _is_missing(text):
                raise NoCompiler(
                    f"the compiler for {self} is not installed here ({EXTRAS[platform]})"
                ) from None
            raise ConfigError(f"{self}: no such topology ({text})") from None


def _is_missing(text: str) -> bool:
    return any(
        sign in text for sign in ("not installed", "not implemented for", "Unknown platform")
    )


def load(name: str) -> Target:
    """The target of a name such as v5p:2x2x2, v5e:4x4, h200, h200:8 or h200:2x8 (hosts x GPUs), or
    of a TOML file of the same form: mine.toml:2x2.

    Raises ConfigError.
    """
    file, _, size = name.rpartition(":") if re.search(r":[0-9x]*$", name) else (name, "", "1")
    path = config.named_file("targets", file)
    chip = strict.build(Chip, strict.read_toml(path), str(path))
    for field in dataclasses.fields(Chip):
        value = getattr(chip, field.name)
        if isinstance(value, float) and not 0 < value < 1e9:
            raise ConfigError(f"{path}: {field.name} must be a positive number")
    if not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5}){0,3}", size):
        raise ConfigError(f"{strict.shorten(name)}: a target's size is such as 8, 4x4 or 2x2x2")
    shape = tuple(int(part) for part in size.split("x"))
    if math.prod(shape) > MOST_CHIPS or (chip.platform == "cuda" and len(shape) > 2):
        raise ConfigError(f"{strict.shorten(name)}: no machine has this size")
    return Target(chip, Path(file).stem, shape)
