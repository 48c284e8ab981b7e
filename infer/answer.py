"""The `generate` command: a folder and a prompt in, tokens and text out."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from infer import batch, generation, inputs, loading, output, progress
from infer.commands import Generate
from infer.output import Completion
from pangu_jax.checkpoint import hf
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.text import chat, markers, parse
from pangu_jax.text.tokenizer import Tokenizer


def run(command: Generate) -> int:
    """Prints the completions (or one JSON object) on stdout, everything else on stderr."""
    _check_choice(command)
    folder = Path(command.model)
    config, _ = hf.read_config(folder)
    tokenizer = loading.tokenizer(folder, config)
    sampling = loading.settings(command, folder)
    if command.input is not None:
        return batch.run(command, config, tokenizer, sampling)
    inputs.check_sampling(sampling, config, tokenizer)
    ids = _prompt(command, config, tokenizer)
    model, loaded = loading.model(command)
    start = time.perf_counter()
    with progress.generating(sampling.max_new_tokens) as advance:
        completions = generation.generate(
            model, [ids], sampling, tokenizer=tokenizer, progress=advance
        )
    seconds = time.perf_counter() - start
    think = command.think if command.chat else None
    if command.json:
        found = [output.as_json(each, tokenizer, command.chat, think) for each in completions]
        print(json.dumps({"completions": found}, ensure_ascii=False))
    else:
        for each in completions:
            _show(each, command, tokenizer)
    tokens = sum(len(each.token_ids) for each in completions)
    reasons = ", ".join(dict.fromkeys(each.finish_reason for each in completions))
    progress.say(
        f"loaded in {loaded:.1f} s; {tokens} tokens in {seconds:.1f} s, compilation included; "
        f"finished: {reasons}"
    )
    return 0


def _check_choice(command: Generate) -> None:
    names = ("prompt", "prompt_ids", "input")
    given = [name for name in names if getattr(command, name) is not None]
    if len(given) != 1:
        raise InputError("give one of --prompt, --prompt-ids and --input")
    if (command.output is None) != (command.input is None):
        raise InputError("--input and --output go together")
    if command.batch < 1:
        raise InputError("--batch must be at least 1")
    if command.prompt_ids is not None and command.chat:
        raise InputError("--chat needs --prompt")
    if command.input is None and not command.chat and (command.system or command.think):
        raise InputError("--system and --think need --chat")
    if command.input is not None and command.json:
        raise InputError("--json is for one prompt; --output has JSON anyway")


def _prompt(command: Generate, config: ModelConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    if command.prompt_ids is not None:
        return inputs.check_prompt(config, command.prompt_ids)
    if tokenizer is None:
        raise InputError(f"{command.model}: no tokenizer.model there; use --prompt-ids")
    text = command.prompt or ""
    if not command.chat:
        return inputs.check_prompt(config, tokenizer.encode(text))
    messages = [{"role": "system", "content": command.system}] if command.system else []
    messages.append({"role": "user", "content": text})
    ids = chat.encode(tokenizer, messages, think=command.think, markers=markers.of(tokenizer))
    return inputs.check_prompt(config, ids)


def _show(completion: Completion, command: Generate, tokenizer: Tokenizer | None) -> None:
    """A completion for a person: ids for ids, text for text, a chat's answer alone."""
    if command.prompt_ids is not None or tokenizer is None:
        print(",".join(map(str, completion.token_ids)))
    elif command.chat:
        reply = parse.parse(completion.text or "", command.think, markers.of(tokenizer))
        if reply.truncated:
            progress.say("the thinking did not end; raise --max-new-tokens, or try --think fast")
        print(progress.safe(reply.answer, sys.stdout))
    else:
        print(progress.safe(completion.text or "", sys.stdout))
