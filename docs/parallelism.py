"""Writes the tables of parallelism.md: python docs/parallelism.py (--check: only compares).

Every row is counted in lowered programs of the real shapes (no devices, no weights) and must equal
the formula of `pangu_jax.plan.cost`.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

import pangu_jax
from pangu_jax import model as models
from pangu_jax.model import Pangu
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Boundary, Layout
from pangu_jax.plan import stablehlo
from pangu_jax.plan.cost import Share, Work
from pangu_jax.plan.hlo import KINDS, Traffic

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- written by parallelism.py: begin -->", "<!-- end -->"
BOUNDARIES = {
    "all_reduce": Boundary("all_reduce"),
    "flashcomm1": Boundary("flashcomm1"),
    "flashcomm1, int8": Boundary("flashcomm1", "int8"),
}
LAYOUTS = {"pro-moe-72b": ("tp8", "h2p-8", "ep8"), "embedded-7b": ("tp8", "h2p-8")}
BATCH, LENGTH = 8, 2048
SIZE = 2


def counted(name: str, where: Layout) -> dict[str, Traffic]:
    """Of one layer: what a model of two layers has more than one of one."""
    one, two = (_counted(name, where, layers) for layers in (1, 2))
    return {
        kind: Traffic(more.count - one[kind].count, more.bytes - one[kind].bytes)
        for kind, more in two.items()
        if more.count > one[kind].count
    }


def _counted(name: str, where: Layout, layers: int) -> dict[str, Traffic]:
    config = dataclasses.replace(pangu_jax.preset(name), num_layers=layers)
    model = Pangu(config, "separate", jnp.bfloat16, where, where.abstract_mesh())
    grid = lambda dtype: jax.ShapeDtypeStruct((BATCH, LENGTH), dtype)
    traced = models.full_pass.trace(model, grid(jnp.int32), grid(jnp.bool_))
    lowered = traced.lower(lowering_platforms=("tpu",))
    mesh = dataclasses.asdict(where.mesh)
    return {kind: Traffic() for kind in KINDS} | stablehlo.traffic(lowered, mesh)


def by_formula(name: str, where: Layout) -> dict[str, Traffic]:
    """Of one layer."""
    share = Share(pangu_jax.preset(name), where, Work("prefill", BATCH, LENGTH))
    return share.layer_traffic(SIZE)


def rows(name: str) -> Iterator[tuple[str, ...]]:
    """The rows of a model's table. Raises AssertionError where count and formula differ."""
    for file in LAYOUTS[name]:
        for title, boundary in BOUNDARIES.items():
            where = dataclasses.replace(layout.load(file), boundary=boundary)
            found, formula = counted(name, where), by_formula(name, where)
            assert found == formula, f"{name}, {file}, {title}: {found}, but {formula}"
            cells = (_cell(found.get(kind)) for kind in KINDS[:3])
            total = sum(traffic.bytes for traffic in found.values())
            yield file, title, *cells, f"{total / 2**20:,.1f}"


def tables() -> str:
    """Both tables as Markdown."""
    parts = []
    for name in LAYOUTS:
        head = ("layout", "boundary", *KINDS[:3], "MiB in all")
        lines = [head, ("---",) * len(head), *rows(name)]
        parts += [f"{name}:", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts)


def _cell(found: Traffic | None) -> str:
    return "" if found is None else f"{found.count}, {found.bytes / 2**20:,.1f} MiB"


def main() -> int:
    """Writes the page, or with --check says whether it is up to date."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    new = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
