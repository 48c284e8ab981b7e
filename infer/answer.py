"""The `generate` command: a folder and a prompt in, tokens out."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

import pangu_jax
from infer import generation, progress
from infer.commands import Generate
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax import strict
from pangu_jax.checkpoint import hf
from pangu_jax.errors import CheckpointError, ConfigError, InputError


def run(command: Generate) -> int:
    """Prints the completion: ids on stdout (or one JSON object), everything else on stderr."""
    config, _ = hf.read_config(Path(command.model))
    sampling = settings(command, hf.generation_defaults(Path(command.model)))
    generation.check_prompt(config, command.prompt_ids)
    start = time.perf_counter()
    with progress.reading() as advance:
        model = pangu_jax.load(
            command.model, command.dtype, command.layout, command.form, progress=advance
        )
        jax.block_until_ready(model)
    loaded = time.perf_counter()
    with progress.generating(sampling.max_new_tokens) as advance:
        completions = generation.generate(model, [command.prompt_ids], sampling, progress=advance)
    done = time.perf_counter()
    if command.json:
        print(json.dumps({"completions": [as_json(completion) for completion in completions]}))
    else:
        print(",".join(map(str, completions[0].token_ids)))
    tokens = len(completions[0].token_ids)
    progress.say(
        f"loaded in {loaded - start:.1f} s; {tokens} tokens in {done - loaded:.1f} s, compilation "
        f"included; finished: {completions[0].finish_reason}"
    )
    return 0


def as_json(completion: Completion) -> dict[str, Any]:
    """A completion in the command line's JSON; text is null while ids go in and out."""
    return {
        "token_ids": completion.token_ids,
        "text": None,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


def settings(command: Generate, defaults: dict[str, Any]) -> Sampling:
    """The command's Sampling; fields that are not given come from generation_config.json."""
    kinds = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float}
    try:
        known = {name: kind for name, kind in kinds.items() if defaults.get(name) is not None}
        chosen: dict[str, Any] = {
            name: strict.coerce(kind, defaults[name], name) for name, kind in known.items()
        }
        if strict.coerce(bool, defaults.get("do_sample") or False, "do_sample"):
            chosen.setdefault("temperature", 1.0)
        else:
            chosen["temperature"] = 0.0
        Sampling(**chosen)
    except (ConfigError, InputError) as error:
        raise CheckpointError(f"{Path(command.model) / hf.GENERATION}: {error}") from None
    given = {field.name for field in dataclasses.fields(Sampling)}
    for name in given:
        if (value := getattr(command, name)) is not None:
            chosen[name] = value
    return Sampling(**chosen)
