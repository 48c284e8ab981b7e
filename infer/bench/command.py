"""The command itself."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax

import pangu_jax
from infer import loading, progress
from infer.bench import ablate, bounds, measure
from infer.bench.measure import Program, Side
from infer.commands import Bench
from infer.engine import bench as engine_bench
from pangu_jax import build
from pangu_jax.errors import InputError
from pangu_jax.kernels import native
from pangu_jax.model import Pangu
from pangu_jax.quant.scheme import FLOAT

TRANSFORMERS = ("torch", "transformers")
LLAMA = ("llama_cpp", "gguf")


def run(command: Bench) -> int:
    """Prints a table (or one JSON object) of speeds and fractions of the bounds."""
    if min(command.prompt, command.tokens, command.batch, command.repeats) < 1:
        raise InputError("--prompt, --tokens, --batch and --repeats must be at least 1")
    if command.tokens < 2:
        raise InputError("--tokens must be at least 2: the first comes from prefill")
    if command.engine + command.peer + command.ablate > 1:
        raise InputError(
            "--engine, --peer and --ablate are measurements of their own: one at a time"
        )
    if command.peer:
        _check_peer(command)
    loading.kernels()
    progress.say("preparing the weights ...")
    model = _model(command)
    if command.prompt + command.tokens > model.config.max_positions:
        raise InputError(f"the model has only {model.config.max_positions} positions")
    sizes = command.prompt, command.tokens, command.batch, command.repeats
    if command.engine:
        result = engine_bench.measure(model, *sizes, progress.say)
        text = engine_bench.table(result)
    else:
        sides = _sides(command, model)
        result = measure.measure(model.config, model.dtype, sides, *sizes)
        text = f"{_head(model, result.device)}\n\n{measure.table(result)}"
    print(json.dumps(dataclasses.asdict(result)) if command.json else text)
    return 0


def _sides(command: Bench, model: Pangu) -> list[Side]:
    length = command.prompt + command.tokens // 2
    if command.ablate:
        return ablate.sides(model, length, command.batch)
    step = bounds.step_bytes(model, length, command.batch)
    sides = [Side("pangu_jax", measure.ours(model), step)]
    if command.peer:
        sides += [Side(name, run, step) for name, run in _peers(command, model).items()]
    return sides


def _peers(command: Bench, model: Pangu) -> dict[str, Program]:
    found = {}
    if _installed(*TRANSFORMERS):
        from infer.bench import peer

        found |= peer.programs(model)
    if _installed(*LLAMA) and model.config.moge is None and command.batch == 1:
        from infer.bench import llama

        found |= llama.programs(model, command.prompt + command.tokens)
    if not found:
        raise InputError("llama.cpp is measured with dense models and --batch 1 alone")
    return found


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _head(model: Pangu, device: str) -> str:
    """What was measured, in a line."""
    held = _held_as(model)
    numbers = f"{model.dtype}, {held}" if held else f"{model.dtype}"
    kernels = ""
    if jax.default_backend() == "cpu":
        kernels = f", no kernels of our own ({native.missing()})" if native.missing() else ""
    return f"{device}, {numbers}, JAX {jax.__version__}{kernels}"


def _held_as(model: Pangu) -> str:
    """What is quantised, in words; "" if nothing is."""
    schemes = {scheme for _, layer in model.recipe.runs for _, scheme in layer}
    said = [f"{s.numbers} weights, {s.activations} activations" for s in schemes]
    return ", ".join(sorted(said) + ([f"{model.recipe.cache} cache"] if model.recipe.cache else []))


def _check_peer(command: Bench) -> None:
    """Raises InputError where there can be no peer."""
    if command.recipe is not None or command.cache is not None:
        raise InputError("--peer compares float models: leave --recipe and --cache out")
    if not (_installed(*TRANSFORMERS) or _installed(*LLAMA)):
        raise InputError(
            "--peer needs PyTorch and Transformers (pip install torch transformers), or for dense "
            "models llama.cpp (pip install llama-cpp-python gguf)"
        )


def _model(command: Bench) -> Pangu:
    if Path(command.model).is_dir():
        model = pangu_jax.load(command.model, command.dtype, form=command.form)
    else:
        config = pangu_jax.preset(command.model)
        recipe = command.recipe or FLOAT
        model = pangu_jax.init(
            config, jax.random.key(0), dtype=command.dtype, form=command.form, recipe=recipe
        )
    if command.recipe is not None and not model.recipe.runs:
        model = build.quantize(model, command.recipe)
    if command.cache is not None:
        model = build.with_cache(model, command.cache)
    return jax.block_until_ready(model)
