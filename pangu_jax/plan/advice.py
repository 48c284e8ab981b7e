"""What to change when something does not fit, in order of effect; by formula."""

import dataclasses
from collections.abc import Iterator

from pangu_jax.config import ModelConfig, configs_folder
from pangu_jax.errors import ConfigError
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Layout
from pangu_jax.plan import cost
from pangu_jax.plan.cost import Work
from pangu_jax.plan.target import Target
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import FLOAT, Recipe

MOST_SEQUENCES = 2**20


@dataclasses.dataclass(frozen=True)
class Change:
    """A change, and the bytes of each device that it saves."""

    what: str
    saved: int


def changes(
    config: ModelConfig,
    where: Layout,
    dtype: str,
    work: Work,
    target: Target,
    recipe: Recipe = FLOAT,
) -> list[Change]:
    """Those that save anything, the one that saves most first."""
    now = cost.of(config, where, dtype, work, recipe).held
    found = []
    alternatives = [
        (*change, recipe) for change in _alternatives(where, dtype, work, target.num_devices)
    ]
    for what, other in _recipes(config, work, recipe):
        alternatives.append((what, where, dtype, work, other))
    for what, other, kind, less, held in alternatives:
        try:
            saved = now - cost.of(config, other, kind, less, held).held
        except ConfigError:  # a layout that the model does not fit
            continue
        if saved > 0:
            found.append(Change(what, saved))
    return sorted(found, key=lambda change: -change.saved)


def _recipes(config: ModelConfig, work: Work, now: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Fewer bits of what is not trained."""
    if work.phase == "train":
        if work.adapters is not None and not now.runs:
            own = scheme.named("w8a16", config)
            yield "int8 weights (lora.base w8a16)", dataclasses.replace(now, runs=own.runs)
        return
    if not now.runs:
        own = scheme.named("w8a8", config)
        yield "int8 weights (recipe w8a8)", dataclasses.replace(now, runs=own.runs)
    if now.cache is None:
        yield "an int8 cache", dataclasses.replace(now, cache="int8")


def _alternatives(
    where: Layout, dtype: str, work: Work, devices: int
) -> Iterator[tuple[str, Layout, str, Work]]:
    if dtype == "float32":
        yield "bfloat16 instead of float32", where, "bfloat16", work
    if work.phase == "train":
        yield from _of_training(where, dtype, work)
    if work.batch > 1:
        half = dataclasses.replace(work, batch=-(-work.batch // 2))
        yield f"{half.batch:,} sequences instead of {work.batch:,}", where, dtype, half
    if work.context > 1:
        half = dataclasses.replace(work, context=-(-work.context // 2))
        yield f"{half.context:,} tokens instead of {work.context:,}", where, dtype, half
    for file in sorted((configs_folder() / "layouts").glob("*.toml")):
        try:
            other = layout.load(file.stem).over(devices)
        except ConfigError:
            continue
        if other.num_devices == devices and other != where:
            yield f"layout {file.stem}", other, dtype, work
    for axis, ranks in dataclasses.asdict(where.mesh).items():
        mesh = dataclasses.replace(where.mesh, **{axis: 2 * ranks})
        twice = dataclasses.replace(where, mesh=mesh)
        yield f"{2 * devices} devices (mesh.{axis} = {2 * ranks})", twice, dtype, work


def _of_training(where: Layout, dtype: str, work: Work) -> Iterator[tuple[str, Layout, str, Work]]:
    if work.remat != "full":
        yield "step.remat full", where, dtype, dataclasses.replace(work, remat="full")
    if (parts := 2 * work.parts) <= work.batch:
        yield f"step.accumulate {parts}", where, dtype, dataclasses.replace(work, parts=parts)


def largest_batch(
    config: ModelConfig,
    where: Layout,
    dtype: str,
    work: Work,
    memory: int,
    recipe: Recipe = FLOAT,
) -> int | None:
    """The most sequences that so many bytes of each device have room for; None if not even one."""
    fits = lambda batch: (
        cost.of(config, where, dtype, dataclasses.replace(work, batch=batch), recipe).held <= memory
    )
    if not fits(1):
        return None
    low, high = 1, MOST_SEQUENCES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
