"""Advice: every change saves what it says, and the largest batch is the largest."""

import contextlib
import dataclasses

import pytest

import pangu_jax
from pangu_jax.config import configs_folder
from pangu_jax.errors import ConfigError
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Layout
from pangu_jax.plan import advice, cost
from pangu_jax.plan import target as targets
from pangu_jax.plan.cost import Adapters, Work
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import Recipe
from tests import layouts

# Layers of the large model, fewer of them: there is nothing else to a layer.
LARGE = dataclasses.replace(pangu_jax.preset("pro-moe-72b"), num_layers=2)
H2P = layout.load("h2p-8")
V5E = targets.load("v5e:2x4")
FILES = sorted(file.stem for file in (configs_folder() / "layouts").glob("*.toml"))
DECODE = Work("decode", 64, 4096)


def held(where: Layout, dtype: str, work: Work) -> int:
    return cost.of(LARGE, where, dtype, work).held


def by_hand(where: Layout, dtype: str, work: Work, devices: int) -> dict[str, int]:
    """What each change saves, changes for the worse too."""
    now, replace = held(where, dtype, work), dataclasses.replace
    batch, context = -(-work.batch // 2), -(-work.context // 2)
    found = {
        f"{batch:,} sequences instead of {work.batch:,}": held(
            where, dtype, replace(work, batch=batch)
        ),
        f"{context:,} tokens instead of {work.context:,}": held(
            where, dtype, replace(work, context=context)
        ),
    }
    for axis in ("data", "x", "y"):
        size = 2 * getattr(where.mesh, axis)
        twice = replace(where, mesh=replace(where.mesh, **{axis: size}))
        with contextlib.suppress(ConfigError):
            found[f"{2 * devices} devices (mesh.{axis} = {size})"] = held(twice, dtype, work)
    if dtype == "float32":
        found["bfloat16 instead of float32"] = held(where, "bfloat16", work)
    if work.phase == "train":
        found["step.remat full"] = held(where, dtype, replace(work, remat="full"))
        found["step.accumulate 2"] = held(where, dtype, replace(work, parts=2))
    if work.phase != "train":
        of = lambda recipe: cost.of(LARGE, where, dtype, work, recipe).held
        found["int8 weights (recipe w8a8)"] = of(scheme.named("w8a8", LARGE))
        found["an int8 cache"] = of(Recipe(cache="int8"))
    for name in FILES:
        try:
            other = layout.load(name).over(devices)
            if other.num_devices == devices and other != where:
                found[f"layout {name}"] = held(other, dtype, work)
        except ConfigError:
            pass
    return {what: now - after for what, after in found.items()}


@pytest.mark.parametrize(
    ("name", "dtype", "work"),
    [
        ("h2p-8", "bfloat16", DECODE),
        ("tp8", "float32", DECODE),
        ("ep8", "bfloat16", Work("prefill", 9, 3001)),
        ("fsdp", "float32", Work("train", 8, 4096)),
        ("ep8", "float32", Work("train", 64, 4096)),
    ],
)
def test_changes_save_what_they_say_largest_first(name: str, dtype: str, work: Work) -> None:
    where = layout.load(name).over(8)
    found = advice.changes(LARGE, where, dtype, work, V5E)
    saved = [change.saved for change in found]
    assert saved == sorted(saved, reverse=True)
    wanted = {what: size for what, size in by_hand(where, dtype, work, 8).items() if size > 0}
    assert {change.what: change.saved for change in found} == wanted
    assert len(found) == len(wanted) >= 2


def test_fewer_bits_for_what_is_trained_only_where_that_saves() -> None:
    """Masters stay float32 and a copy is made beside them, which long sequences make up for; what
    adapters stand beside may have eight bits.
    """

    def of(work: Work, name: str = "fsdp") -> set[str]:
        where = layout.load(name).over(8)
        return {c.what for c in advice.changes(LARGE, where, "float32", work, V5E)}

    assert "bfloat16 instead of float32" in of(Work("train", 8, 4096))
    assert "bfloat16 instead of float32" not in of(Work("train", 8, 8), "ep8")
    eight = "int8 weights (lora.base w8a16)"
    assert eight not in of(Work("train", 8, 512))
    assert eight in of(Work("train", 8, 512, adapters=Adapters(8, (), "float32")))


def test_a_step_may_be_in_parts_or_computed_again() -> None:
    """Until each device has one row of a part, and all is computed again."""
    where = layout.load("ep8").over(8)
    of = lambda work: {c.what for c in advice.changes(LARGE, where, "float32", work, V5E)}
    assert {"step.remat full", "step.accumulate 2"} <= of(Work("train", 64, 4096))
    rest = of(Work("train", 64, 4096, remat="full", parts=4))
    assert "step.accumulate 8" in rest
    assert "step.remat full" not in rest
    assert not any("accumulate" in what for what in of(Work("train", 64, 4096, parts=8)))


def test_nothing_is_advised_that_is_not_less() -> None:
    """One sequence of one token has no half; and what saves nothing is left out: more replicas."""
    one = layout.load("single")
    found = advice.changes(
        layouts.DENSE, one, "bfloat16", Work("decode", 1, 1), targets.load("v5e")
    )
    assert {change.what for change in found} == {
        "2 devices (mesh.x = 2)",
        "2 devices (mesh.y = 2)",
        "int8 weights (recipe w8a8)",
    }


def test_what_is_in_eight_bits_is_not_advised_again() -> None:
    config = pangu_jax.preset("embedded-1b")
    recipe = scheme.named("w8a8", config, "int8")
    one = layout.load("single")
    found = advice.changes(config, one, "bfloat16", DECODE, targets.load("v5e"), recipe)
    assert not [change.what for change in found if "int8" in change.what]


def test_layouts_that_the_model_does_not_fit_are_left_out() -> None:
    """Four heads cannot be split by eight."""
    config = pangu_jax.preset("nano-moge")
    found = advice.changes(config, layout.load("ep8"), "float32", DECODE, targets.load("v5e:8"))
    assert "layout fsdp" in {change.what for change in found}
    assert "layout tp8" not in {change.what for change in found}


def test_a_mesh_over_all_devices_counts_them() -> None:
    """So many that fsdp and fsdp-h2p-8 have to be filled up, and h2p-8 is too small."""
    where = layout.load("fsdp-h2p-8").over(16)
    work = Work("train", 16, 4096)
    found = advice.changes(LARGE, where, "float32", work, targets.load("v5p:2x2x4"))
    named = [change.what for change in found if change.what.startswith("layout")]
    wanted = {w: s for w, s in by_hand(where, "float32", work, 16).items() if s > 0}
    assert set(named) == {what for what in wanted if what.startswith("layout")}
    assert not {"layout h2p-8", "layout tp8", "layout single"} & set(named)
    assert any(change.what == "32 devices (mesh.data = 4)" for change in found)


# --- the largest batch

SMALL = Work("decode", 3, 50)


def most(memory: int, work: Work = SMALL) -> int | None:
    return advice.largest_batch(layouts.MOGE, H2P, "bfloat16", work, memory)


def need(batch: int, work: Work = SMALL) -> int:
    work = dataclasses.replace(work, batch=batch)
    return cost.of(layouts.MOGE, H2P, "bfloat16", work).held


@pytest.mark.parametrize(("memory", "context"), [(10**5, 1), (10**6, 60), (10**8, 7)])
def test_the_largest_batch_is_the_largest(memory: int, context: int) -> None:
    """Whatever the batch at hand."""
    work = dataclasses.replace(SMALL, context=context)
    found = most(memory, work)
    assert found is not None
    assert need(found, work) <= memory < need(found + 1, work)


def test_room_for_exactly_so_many() -> None:
    """Two replicas of attention share the sequences: room for 9 is room for 10."""
    assert need(8) < need(9) == need(10) < need(11)
    assert most(need(9)) == 10
    assert most(need(9) - 1) == 8


def test_no_room_for_one() -> None:
    assert most(need(1)) == 2
    assert most(need(1) - 1) is None
