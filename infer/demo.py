"""The `demo` command: the whole path on small random models, with times."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

import pangu_jax
from infer import check, generation
from infer.commands import Demo
from infer.progress import say
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import write_preset

MODELS = {"nano": "dense, as openPangu-Embedded", "nano-moge": "MoGE, as Pangu Pro MoE"}
PROMPT, BATCH, NEW = 64, 8, 128
MARK = "demo.txt"

T = TypeVar("T")


def run(command: Demo) -> int:
    """Writes, loads, checks and generates; a demo model's folder is replaced by the next demo."""
    device = jax.devices()[0]
    say(f"pangu_jax {pangu_jax.__version__} on {device.platform} ({device.device_kind})")
    for name, kind in MODELS.items():
        folder = Path(command.output) / name
        say(f"\n{name} ({kind}), random weights")
        _remove_earlier(folder)
        if not _one_model(name, folder):
            return 1
    say(
        f"\nThe weights are random, so the words mean nothing. Talk to one all the same:\n"
        f"  {_program()} chat --model {Path(command.output) / 'nano'}"
    )
    return 0


def _program() -> str:
    """How this program was started, for a command to copy."""
    return "python -m infer" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _one_model(name: str, folder: Path) -> bool:
    # With the presets' init_range every prompt is answered by one token for ever.
    config = dataclasses.replace(pangu_jax.preset(name), init_range=0.1)
    model = pangu_jax.init(config, jax.random.key(0))
    _timed("wrote", lambda: pangu_jax.save_hf(model, folder), f"{folder}")
    write_preset("nano", folder)
    (folder / MARK).write_text(
        "Random weights written by pangu-infer demo, which may replace them.\n"
    )
    findings = _timed("checked", lambda: list(check.inspect(folder)), "the folder")
    for finding in findings:
        say(f"    {'ok  ' if finding.ok else 'FAIL'}  {finding.what:<13} {finding.detail}")
    loaded = _timed(
        "loaded", lambda: pangu_jax.load(folder), f"{config.num_parameters:,} parameters"
    )
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True)
    equal = all(bool((a == b).all()) for a, b in pairs)
    say(f"  the weights came back bit-equal: {equal}")

    rng = np.random.default_rng(0)
    prompts = rng.integers(2, config.vocab_size, (BATCH, PROMPT)).tolist()
    greedy = Sampling(max_new_tokens=NEW, ignore_eos=True)
    for batch in (1, BATCH):
        run = lambda batch=batch: generation.generate(loaded, prompts[:batch], greedy)
        _timed("compiled", run, f"for {batch} at a time", show=False)
        start = time.perf_counter()
        completions = run()
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for completion in completions)
        say(
            f"  generated {tokens} tokens from {batch} prompt{'s' if batch > 1 else ''} of {PROMPT}"
            f" in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s"
        )
    say(f"    first: {completions[0].token_ids[:12]} ...")
    return equal and all(finding.ok for finding in findings)


def _timed(verb: str, action: Callable[[], T], what: str, show: bool = True) -> T:
    start = time.perf_counter()
    result = action()
    if show:
        say(f"  {verb} {what} in {time.perf_counter() - start:.2f} s")
    return result


def _remove_earlier(folder: Path) -> None:
    """Clears the way, but only of a folder that an earlier demo marked as its own."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not (folder / MARK).is_file():
        raise InputError(f"{folder} was not written by a demo; choose another --output")
    shutil.rmtree(folder)
