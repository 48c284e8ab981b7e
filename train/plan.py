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
    from pangu_jax.plan.cost import TRAINED, Work

    if config.lora.rank is not None:
        raise ConfigError("lora.rank: adapters are not planned yet; plan the run without them")
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
    copies = TRAINED + (config.optimizer.ema is not None)
    work, dtype = Work("train", stage.batch, stage.length, copies), config.step.compute
    return report.of(name, model, target, shown, where, dtype, BYTES[dtype], work)


def _largest(config: Config) -> Stage:
    """The phase whose steps take the most memory."""
    return max(config.stages, key=lambda stage: (stage.batch * stage.length, stage.length))


def lower(config: Config, plan: Any) -> Any:
    """The step of `train.loop`, lowered for the target's devices. Raises NoCompiler."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from pangu_jax import build
    from pangu_jax.pytree import unchecked
    from train import step as steps
    from train.objectives import Batch
    from train.recipe import Recipe

    devices = plan.target.devices()
    model = build.abstract(
        plan.config, dtype="float32", where=plan.where, form="stacked", devices=devices
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
    return jax.jit(recipe.step(), donate_argnames="state").lower(state, batch)
