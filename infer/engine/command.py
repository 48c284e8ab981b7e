"""The `warmup` command."""

import time

from infer import loading, progress
from infer.commands import Warmup
from infer.engine.llm import LLM


def run(command: Warmup) -> int:
    """Compiles all programs; the compiler's cache on disk keeps them."""
    model, _ = loading.model(command)
    llm, start = LLM(model, slots=command.slots, context=command.context), time.perf_counter()
    shape = llm.engine.shape
    progress.say(
        f"{shape.slots} requests of up to {shape.context:,} tokens, {shape.pages:,} pages of "
        f"{shape.page} tokens"
    )
    llm.warm_up(progress.say)
    count = llm.engine.stats.compiled
    print(f"{count} programs are ready, in {time.perf_counter() - start:.1f} s")
    return 0
