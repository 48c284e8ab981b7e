"""The `plan` command of generation: decode and prefill."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infer import plots, progress
from infer.commands import Plan as Command
from pangu_jax import config as configs
from pangu_jax.errors import ConfigError, InputError
from pangu_jax.plan import target as targets
from pangu_jax.plan.target import Target

PHASES = ("decode", "prefill")
LARGEST = 2**24


def run(command: Command) -> int:
    """Prints plans as a table, or as one JSON object."""
    target = targets.load(command.target)
    check_output(command.plot)
    _check(command)
    prepare(target)  # before JAX is imported
    from infer.plan import programs, report

    name, config = model_config(command.model)
    found = {}  # the same prefill goes with several batches
    for layout in command.layout or ("single",):
        for dtype in command.dtype or (config.dtype,):
            for batch in command.batch:
                for context in command.context:
                    for recipe in command.recipe or (None,):
                        for plan in programs.formulas(
                            name,
                            config,
                            target,
                            layout,
                            dtype,
                            batch,
                            context,
                            command.prompts,
                            recipe,
                            command.cache,
                        ):
                            found[plan.layout, plan.dtype, recipe, plan.work] = plan
    wanted = (command.phase,) if command.phase else PHASES
    plans = [plan for phase in wanted for plan in found.values() if plan.work.phase == phase]
    few = len(plans) <= len(PHASES)
    if few and not command.formulas:
        plans = [compiled(plan, lambda p=plan: programs.lower(p, command.form)) for plan in plans]
    elif not command.formulas:
        progress.say("several plans: by formula only; one at a time is compiled too")
    show(plans, command.json, command.plot, report)
    return 0


def check_output(plot: str | None) -> None:
    """Raises InputError where no chart can be written."""
    if plot is not None:
        plots.check(Path(plot))


def _check(command: Command) -> None:
    for name in ("batch", "context"):
        values = getattr(command, name)
        if not values or not all(1 <= value <= LARGEST for value in values):
            raise InputError(f"--{name} must be from 1 to {LARGEST:,}")
    if command.prompts is not None and not 1 <= command.prompts <= LARGEST:
        raise InputError(f"--prompts must be from 1 to {LARGEST:,}")


def prepare(target: Target) -> None:
    """Sets what JAX must know before it is imported; what the user has set stays."""
    for name, value in target.environment.items():
        os.environ.setdefault(name, value)
    import jax

    # A program from the disk cache would tell no compile time.
    jax.config.update("jax_enable_compilation_cache", False)


def model_config(name: str) -> tuple[str, Any]:
    """A short name and the ModelConfig of a folder, a preset or a TOML file."""
    path = Path(name)
    if path.is_dir():
        from pangu_jax.checkpoint import hf

        return path.resolve().name, hf.read_config(path)[0]
    return path.stem if path.suffix == ".toml" else name, configs.preset(name)


def compiled(plan: Any, lower: Callable[[], Any]) -> Any:
    """The plan with what the target's compiler says; by formula only where there is none."""
    from pangu_jax.plan import program

    progress.say(f"compiling {plan.work.phase} for {plan.target} ...")
    try:
        return dataclasses.replace(plan, compiled=program.build(lower()))
    except targets.NoCompiler as error:
        progress.say(f"{error}: planned by formula only")
        return plan
    except RuntimeError as error:  # XLA's own
        text = " ".join(str(error).split())[:300]
        if "RESOURCE_EXHAUSTED" not in text:
            raise ConfigError(f"{plan.target}: the program does not compile ({text})") from None
        return dataclasses.replace(plan, refused=text)


def show(plans: Sequence[Any], as_json: bool, plot: str | None, report: Any) -> None:
    """Prints the plans, and draws them where a chart is asked for."""
    if as_json:
        print(report.to_json(plans))
    elif len(plans) <= len(PHASES):
        print("\n\n".join(report.details(plan) for plan in plans))
    else:
        print(report.sweep(plans))
    if plot is not None:
        plots.save(report.chart(plans), Path(plot))
        progress.say(f"wrote {plot}")
