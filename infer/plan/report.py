"""Plans as tables, JSON and charts. Everything in them is planned; nothing was measured."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pangu_jax.config import ModelConfig
from pangu_jax.parallel.layout import Layout
from pangu_jax.plan import advice, cost
from pangu_jax.plan.cost import Cost, Work
from pangu_jax.plan.hlo import Traffic
from pangu_jax.plan.program import Compiled
from pangu_jax.plan.target import Target
from pangu_jax.quant.scheme import FLOAT, Recipe

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program of one model on one target; `compiled` is None where only formulas were asked
    for, or no compiler is installed.
    """

    model: str
    config: ModelConfig
    target: Target
    layout: str
    where: Layout
    dtype: str
    itemsize: int
    work: Work
    cost: Cost
    recipe: Recipe = FLOAT
    held_as: str = ""
    """The recipe's name, and the cache's numbers, where they are not the dtype's."""
    compiled: Compiled | None = None
    refused: str = ""
    """Why the target's compiler gave up: most often, too much memory."""

    @property
    def needed(self) -> int:
        """Bytes of a device's memory: as compiled, or by formula."""
        if self.compiled is None:
            return self.cost.held
        return self.compiled.resident + self.compiled.temporary

    @property
    def fits(self) -> bool:
        """Whether they are there."""
        return not self.refused and self.needed <= self.target.chip.memory_gib * GIB

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of a step that each unit of the chip needs."""
        return self.cost.seconds(self.target.chip, self.itemsize)

    @property
    def bound(self) -> tuple[str, float]:
        """The unit that takes longest, and the tokens/s of all devices that it allows."""
        unit, seconds = max(self.seconds.items(), key=lambda item: item[1])
        return unit, self.work.tokens / seconds

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        chip, compiled = self.target.chip, self.compiled
        return {
            "label": "planned",
            "model": self.model,
            "target": str(self.target),
            "layout": self.layout,
            "boundary": dataclasses.asdict(self.where.boundary),
            "dtype": self.dtype,
            "quantised": self.held_as or None,
            **self._work(),
            "memory_bytes": int(chip.memory_gib * GIB),
            "needed_bytes": self.needed,
            "fits": self.fits,
            "formula": dataclasses.asdict(self.cost),
            "refused": self.refused or None,
            "compiled": None if compiled is None else dataclasses.asdict(compiled),
            "seconds": self.seconds,
            "bound": self.bound[0],
            "tokens_per_s_at_most": self.bound[1],
            "advice": advise(self),
        }

    def _work(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.work)
        if self.work.phase != "train":
            of_training = ("copies", "adapters", "remat", "parts")
            fields = {n: x for n, x in fields.items() if n not in of_training}
        return fields


def advise(plan: Plan) -> list[str]:
    """What would make it fit, in order of effect; or what there is room for."""
    chip = plan.target.chip
    if plan.fits:
        if plan.work.phase != "decode":
            return []
        beside = plan.needed - plan.cost.held
        room = advice.largest_batch(
            plan.config,
            plan.where,
            plan.dtype,
            plan.work,
            int(chip.memory_gib * GIB) - beside,
            plan.recipe,
        )
        return [f"room for {room:,} sequences of {plan.work.context:,} tokens"] if room else []
    changes = advice.changes(
        plan.config, plan.where, plan.dtype, plan.work, plan.target, plan.recipe
    )
    lack = plan.needed - chip.memory_gib * GIB
    # How much the compiler lacked it does not say in a form to rely on.
    fits = lambda change: ", fits" if change.saved >= lack and not plan.refused else ""
    return [f"{change.what}: saves {_gib(change.saved)}{fits(change)}" for change in changes]


def details(plan: Plan) -> str:
    """One plan as a Markdown table: by formula, and as compiled."""
    made, work = plan.compiled, plan.work
    rows = [*_memory(plan), *_collectives(plan), *_times(plan)]
    if made is None:
        rows = [row[:2] for row in rows if row[1]]
    head = [("per device", "formula", "compiled"), ("---",) * 3]
    new = f"{work.length:,} of {work.context:,}" if work.length == 1 else f"{work.context:,}"
    title = (
        f"Planned: {work.phase}, {plan.model}, {plan.layout} on {plan.target} "
        f"({plan.target.chip.name}), {_numbers(plan)}, {work.batch:,} x {new} tokens: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}{'' if made else ', by formula only'}"
    )
    shown = table([line[: len(rows[0])] for line in head] + rows)
    return "\n".join([title, "", shown, *_notes(plan)])


def _numbers(plan: Plan) -> str:
    adapters = plan.work.adapters
    beside = "" if adapters is None else f"LoRA of rank {adapters.rank}"
    return ", ".join(part for part in (plan.dtype, plan.held_as, beside) if part)


Row = tuple[str, ...]


def _memory(plan: Plan) -> list[Row]:
    made, cost = plan.compiled, plan.cost
    share = lambda size: (
        f"{_gib(size)}, {size / GIB / plan.target.chip.memory_gib:.0%} of "
        f"{plan.target.chip.memory_gib:g}"
    )
    training = plan.work.phase == "train"
    rows = [("weights, gradients, moments" if training else "weights", _gib(cost.weights), "")]
    if not training:
        rows.append(("cache", _gib(cost.cache), ""))
    rows.append(("arguments and results", "", _gib(made.resident) if made else ""))
    by_formula = f"{_gib(cost.working)} (estimate)"
    rows.append(("working memory", by_formula, _gib(made.temporary) if made else ""))
    total = share(made.resident + made.temporary) if made else ""
    return [*rows, ("in all", share(cost.held), total)]


def _collectives(plan: Plan) -> list[Row]:
    formula, compiled = plan.cost.traffic, plan.compiled.collectives if plan.compiled else {}
    kinds = {**formula, **compiled}
    return [(kind, _traffic(formula.get(kind)), _traffic(compiled.get(kind))) for kind in kinds]


def _times(plan: Plan) -> list[Row]:
    rows = [
        ("FLOPs", f"{plan.cost.flops / 1e12:,.2f} T", ""),
        ("bytes read", _gib(plan.cost.read), ""),
    ]
    for unit, seconds in plan.seconds.items():
        rows.append((f"{unit}, at least", f"{seconds * 1e3:,.2f} ms", ""))
    unit, rate = plan.bound
    rows.append(("tokens/s of all, at most", f"{rate:,.0f} ({unit})", ""))
    if plan.compiled is not None:
        rows.append(("compile time", "", f"{plan.compiled.compile_s:.0f} s"))
    return rows


def _notes(plan: Plan) -> list[str]:
    lines = [f"- the compiler: {plan.refused}"] if plan.refused else []
    lines += [f"- {line}" for line in advise(plan)]
    if (made := plan.compiled) is not None:
        lines += [
            f"- intermediate: {_gib(b.bytes)} {b.op} {b.type} {b.source}".rstrip()
            for b in made.buffers
        ]
        count = lambda kinds: getattr(kinds.get("reduce-scatter"), "count", 0)
        if count(made.collectives) < count(plan.cost.traffic):
            lines.append("- the compiler made all-reduces of some reduce-scatters: twice the bytes")
    return ["", *lines] if lines else []


def sweep(plans: Sequence[Plan]) -> str:
    """Several plans, a row each."""
    head = ("program", "layout", "dtype", "batch", "context", "weights", "cache", "working")
    rows = [(*head, "of memory", "ms", "tokens/s at most", "bound by"), ("---",) * 12]
    for plan in plans:
        unit, rate = plan.bound
        working = plan.cost.working if plan.compiled is None else plan.compiled.temporary
        share = plan.needed / GIB / plan.target.chip.memory_gib
        rows.append(
            (
                plan.work.phase,
                plan.layout,
                _numbers(plan),
                f"{plan.work.batch:,}",
                f"{plan.work.context:,}",
                _gib(plan.cost.weights),
                _gib(plan.cost.cache),
                _gib(working),
                f"{share:.0%}" + ("" if plan.fits else " TOO MUCH"),
                f"{max(plan.seconds.values()) * 1e3:,.2f}",
                f"{rate:,.0f}",
                unit,
            )
        )
    first = plans[0]
    title = f"Planned: {first.model} on {first.target} ({first.target.chip.name}), per device"
    return f"{title}\n\n{table(rows)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown with aligned columns; a row of dashes is a rule."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    fill = lambda cell, width: "-" * width if cell == "---" else cell.ljust(width)
    line = lambda row: " | ".join(fill(*pair) for pair in zip(row, widths, strict=True))
    return "\n".join(f"| {line(row)} |" for row in rows)


def to_json(plans: Sequence[Plan]) -> str:
    """One JSON object."""
    return json.dumps({"plans": [plan.as_json() for plan in plans]})


def chart(plans: Sequence[Plan]) -> Any:
    """Two bars for every plan: memory by use beside what there is, and the time of each unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * len(plans)), layout="constrained")
    memory, times = figure.subplots(1, 2, sharey=True)
    places, left = range(len(plans)), [0.0] * len(plans)
    for part in ("weights", "cache", "working"):
        sizes = [_part(plan, part) / GIB for plan in plans]
        memory.barh(places, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.set_yticks(places, [_name(plan, plans) for plan in plans])
    memory.axvline(plans[0].target.chip.memory_gib, color="black", linestyle="--", label="there is")
    memory.set_xlabel("GiB per device")
    for i, unit in enumerate(("compute", "memory", "network")):
        values = [plan.seconds[unit] * 1e3 for plan in plans]
        rows = [place + (i - 1) * 0.27 for place in places]
        times.barh(rows, values, height=0.25, label=unit, color=f"C{3 + i}")
    times.set_xlabel("ms per step, at least")
    for axis in (memory, times):
        axis.legend(
            fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False
        )
    memory.invert_yaxis()
    first = plans[0]
    figure.suptitle(f"Planned, not measured: {first.model} on {first.target}")
    return figure


def _part(plan: Plan, part: str) -> int:
    if plan.compiled is None:
        return getattr(plan.cost, part)
    if part == "working":
        return plan.compiled.temporary
    cache = plan.cost.cache if plan.work.phase == "decode" else 0
    return cache if part == "cache" else plan.compiled.resident - cache


def _name(plan: Plan, plans: Sequence[Plan]) -> str:
    """What tells a plan from the others."""
    work = plan.work
    parts = {
        "phase": work.phase,
        "layout": plan.layout,
        "dtype": plan.dtype,
        "held_as": plan.held_as or "float",
        "batch": f"batch {work.batch:,}",
        "context": f"context {work.context:,}",
    }
    value = lambda p, part: getattr(p, part) if hasattr(p, part) else getattr(p.work, part)
    kept = [text for part, text in parts.items() if len({value(p, part) for p in plans}) > 1]
    return ", ".join(kept or [work.phase])


def _gib(size: float | int) -> str:
    return (
        f"{size / GIB:,.2f} GiB" if size >= GIB / 100 or size == 0 else f"{size / 2**20:,.2f} MiB"
    )


def _traffic(found: Traffic | None) -> str:
    return "none" if found is None else f"{found.count:,}, {_gib(found.bytes)}"


def of(
    model: str,
    config: ModelConfig,
    target: Target,
    layout: str,
    where: Layout,
    dtype: str,
    itemsize: int,
    work: Work,
    recipe: Recipe = FLOAT,
    held_as: str = "",
) -> Plan:
    """A plan by formula. Raises ConfigError where the model does not fit the layout."""
    return Plan(
        model,
        config,
        target,
        layout,
        where,
        dtype,
        itemsize,
        work,
        cost.of(config, where, dtype, work, recipe),
        recipe,
        held_as,
    )
