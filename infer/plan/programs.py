"""The programs of generation for devices that are not here: the very functions that generate."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from infer import decode, inputs
from infer.decode import Request, State
from infer.plan import report
from infer.plan.report import Plan
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax import cache as caches
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.kernels import mosaic
from pangu_jax.model import Form, Pangu
from pangu_jax.parallel import fit
from pangu_jax.parallel import layout as layouts
from pangu_jax.plan.cost import Work
from pangu_jax.plan.target import Target
from pangu_jax.pytree import unchecked
from pangu_jax.quant import scheme
from pangu_jax.quant.scheme import CacheNumbers, Recipe


def formulas(
    name: str,
    config: ModelConfig,
    target: Target,
    layout: str,
    dtype: str,
    batch: int,
    context: int,
    prompts: int | None,
    recipe: str | None = None,
    cache: CacheNumbers | None = None,
) -> Sequence[Plan]:
    """The plans of decode and prefill by formula.

    recipe: the name of one
    prompts: read at a time by a prefill; None is one for every replica of attention
    Raises ConfigError.
    """
    if context > config.max_positions:
        raise InputError(f"the model has only {config.max_positions} positions")
    build.check_choices(None, dtype)
    where = layouts.load(layout).over(target.num_devices)
    if where.num_devices != target.num_devices:
        raise InputError(
            f"layout {layout} is for {where.num_devices} devices; {target} has {target.num_devices}"
        )
    prompts = prompts or where.size(where.of("batch"))
    works = (Work("decode", batch, context), Work("prefill", prompts, context))
    held, size = Recipe(cache=cache), jnp.dtype(dtype).itemsize
    if recipe is not None:
        held = scheme.named(recipe, config, cache)
        size = 1 if recipe in ("w8a8", "fp8") else size  # what multiplies, at its best
    said = [recipe] if recipe else []
    said += [f"{cache} cache"] if cache else []
    of_work = lambda work: report.of(
        name, config, target, layout, where, dtype, size, work, held, ", ".join(said)
    )
    return [of_work(work) for work in works]


def lower(plan: Plan, form: Form | None) -> Any:
    """The plan's program, lowered for the target's devices. Raises NoCompiler."""
    with mosaic.for_card(plan.target.chip.description):
        return _lower(plan, form, plan.target.devices())


def _lower(plan: Plan, form: Form | None, devices: Sequence[Any]) -> Any:
    model = build.abstract(
        plan.config,
        dtype=plan.dtype,
        where=plan.where,
        form=form,
        recipe=plan.recipe,
        devices=devices,
    )
    work, rows = plan.work, NamedSharding(model.mesh, plan.where.rows)
    batch = plan.where.round_rows(work.batch)
    request = _request(model, batch)
    if work.phase == "prefill":
        grid = lambda dtype: jax.ShapeDtypeStruct((batch, work.context), dtype, sharding=rows)
        return decode.prefill.lower(model, grid(jnp.int32), grid(jnp.bool_), request, top=0)
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(model.mesh, PartitionSpec()))
    state = _state(model, batch, work.context)
    return decode.decode.lower(model, state, request, steps, top=0)


def _request(model: Pangu, batch: int) -> Request:
    """What plain greedy or sampled rows ask for."""
    where, config = model.layout, model.config

    def rows() -> Request:
        settings, ends = [Sampling()] * batch, [frozenset[int]()] * batch
        prompts = [np.zeros(1, np.int32)] * batch
        return inputs.request(config, prompts, settings, ends, None, where)

    made = jax.eval_shape(rows)
    place = NamedSharding(model.mesh, where.rows)
    resize = lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype, sharding=place)
    return jax.tree.map(resize, made)


def _state(model: Pangu, batch: int, context: int) -> State:
    where = model.layout
    held = fit.held(model.config, where)
    blank = jax.eval_shape(
        lambda: caches.empty(held, model.runs, batch, context, model.dtype, model.recipe)
    )
    place = lambda leaf, spec: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(model.mesh, spec)
    )
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(model.mesh, where.rows))
    cache = jax.tree.map(place, blank, caches.specs(blank, where))
    return unchecked(State, cache=cache, token=rows, left=rows, history=None, thought=None)
