"""The `plan` command of training: one step, for devices that are not here."""

from typing import Any

from infer.plan import command as plans
from pangu_jax.errors import ConfigError, InputError
from pangu_jax.plan import target as targets
from train import config as configs
from train.commands import Plan as Command
from train.config import Config, Stage

BYTES = {"float32": 4, "bfloat16": 2}


def run(command: Command) -> int:
    """Prints the plan as a table, or as one JSON object."""
    target = targets.load(command.target)
    plans.check_output(command.plot)
    config = configs.load(command.config, command.overrides)
    plans.prepare(target)  # before JAX is imported
    from infer.plan import report

    plan = of(config, target)
    if not command.formulas:
        plan = plans.compiled(plan, lambda: lower(config, plan))
    plans.show([plan], command.json, command.plot, report)
    return 0


def of(config: Config, target: targets.Target) -> Any:
    """The plan of a step by formula. Raises ConfigError."""
    from infer.plan import report
    from pangu_jax.parallel import layout
    from pangu_jax.plan.cost import Work
    from pangu_jax.quant import scheme
    from pangu_jax.quant.scheme import FLOAT

    name, model = plans.model_config(str(config.model.path or config.model.preset))
    stage = _largest(config)
    if max(each.length for each in config.stages) > model.max_positions:
        raise ConfigError(f"data.length: the model has only {model.max_positions} positions")
    shown = config.model.layout or "single"
    where = layout.load(shown).over(target.num_devices)
    if where.num_devices != target.num_devices:
        raise InputError(
            f"layout {shown} is for {where.num_devices} devices; {target} has "
            f"{target.num_devices}: choose another --model.layout, such as fsdp"
        )
    kept, adapters = _copies(config, model), _adapters(config, model)
    again, parts = config.step.remat, config.step.accumulate
    work = Work("train", stage.batch, stage.length, kept, adapters, again, parts)
    dtype, base = config.step.compute, config.lora.base
    recipe = FLOAT if base is None else scheme.named(base, model)
    held = base or ""
    return report.of(name, model, target, shown, where, dtype, BYTES[dtype], work, recipe, held)


def _adapters(config: Config, model: Any) -> Any:
    from pangu_jax.plan.cost import Adapters
    from train.recipe import base_dtype

    section = config.lora
    if section.rank is None:
        return None
    own = model.dtype if config.model.path is not None else "float32"
    return Adapters(section.rank, section.targets, base_dtype(config, own))


def _copies(config: Config, model: Any) -> float:
    """Float32 numbers that a run keeps for each of the model's, or of its adapters': itself, its
    gradient, what the optimizer has, a running mean. The mean, where they have not equally many.
    """
    import jax

    from pangu_jax.model import Pangu
    from pangu_jax.parallel import layout
    from train.recipe import Recipe

    where = layout.load("single")
    like = Pangu(model, "stacked", "float32", where, where.abstract_mesh())
    state = jax.eval_shape(Recipe(config, like).begin, like)
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part) if leaf.ndim)
    trained, still = count(state.trainable), count(state.frozen)
    kept = 2 * trained + count(state.optimizer) + count(state.ema)
    if config.lora.rank is not None:
        return kept / trained
    return (kept + still) / (trained + still)


def _largest(config: Config) -> Stage:
    """The phase whose steps take the most memory."""
    return max(config.stages, key=lambda stage: (stage.batch * stage.length, stage.length))


def lower(config: Config, plan: Any) -> Any:
    """The step of `train.loop`, lowered for the target's devices. Raises NoCompiler."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from pangu_jax import build
    from pangu_jax.kernels import mosaic
    from pangu_jax.pytree import unchecked
    from train import step as steps
    from train.objectives import Batch
    from train.recipe import Recipe

    devices = plan.target.devices()
    adapters = plan.work.adapters
    model = build.abstract(
        plan.config,
        dtype="float32" if adapters is None else adapters.base,
        where=plan.where,
        form="stacked",
        recipe=plan.recipe,
        devices=devices,
    )
    recipe, stage = Recipe(config, model), _largest(config)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    shapes = jax.eval_shape(recipe.begin, model)
    state = jax.tree.map(place, shapes, steps.places(model, shapes))
    rows = NamedSharding(model.mesh, plan.where.rows)
    size = (plan.where.round_rows(stage.batch), stage.length)
    grid = lambda dtype: jax.ShapeDtypeStruct(size, dtype, sharding=rows)
    whole, real = grid(jnp.int32), grid(jnp.float32)
    batch = unchecked(
        Batch, tokens=whole, targets=whole, segments=whole, positions=whole, weights=real
    )
    with mosaic.for_card(plan.target.chip.description):
        return jax.jit(recipe.step(), donate_argnames="state").lower(state, batch)
