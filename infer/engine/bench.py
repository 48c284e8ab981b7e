"""`bench --engine`: many requests at a time against one, what the host costs, what a known prefix
saves.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np

from infer import generation
from infer.engine import sizes
from infer.engine.engine import Engine, Ticket
from infer.engine.sizes import Wish
from infer.sampling import Sampling
from pangu_jax.model import Pangu


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over the repetitions, all in one run; tokens/s count generated tokens.

    alone: of `generate` with one prompt; together: of the engine; rows_together: of `generate` with
        as many prompts of one length, which the engine cannot beat
    first_token: seconds to the first token of one request; where its prompt is known but for the
        last page, `first_token_known`
    host, wait: milliseconds of a step that the host works, and that it waits for the device: median
        and 90th and 99th of a hundred
    """

    batch: int
    prompt: int
    tokens: int
    alone: float
    rows_together: float
    together: float
    spread: float
    first_token: float
    first_token_known: float
    host: list[float]
    wait: list[float]
    compiled_while_measured: int


def measure(
    model: Pangu, prompt: int, tokens: int, batch: int, repeats: int, say: Callable[[str], None]
) -> Result:
    """Times `repeats` rounds of 4 x `batch` requests, `batch` at a time."""
    rng, replicas = np.random.default_rng(0), model.layout.size(model.layout.of("batch"))
    draw = lambda count: rng.integers(0, model.config.vocab_size, (count, prompt))
    sampling, shape = (
        Sampling(tokens, ignore_eos=True),
        sizes.fitting(model, Wish(slots=-(-batch // replicas), context=prompt + tokens)),
    )
    engine = Engine(model, shape)
    for line in engine.warm_up():
        say(line)
    of = lambda prompts: generation.generate(model, prompts, sampling)
    say("compiling generate")
    for count in (1, batch):
        of(draw(count))
    found: dict[str, list[float]] = {name: [] for name in ("alone", "rows", "together")}
    first, known = [], []
    with engine:
        _served(engine, draw(batch), sampling)
        compiled, before = engine.stats.compiled, len(engine.stats.host)
        for _ in range(repeats):
            found["alone"].append(tokens / _seconds(lambda: of(draw(1))))
            found["rows"].append(batch * tokens / _seconds(lambda: of(draw(batch))))
            many = draw(4 * batch)
            seconds = _seconds(lambda many=many: _served(engine, many, sampling))
            found["together"].append(4 * batch * tokens / seconds)
            one = draw(1)
            for times in (first, known):
                (ticket,) = _served(engine, one, sampling)
                times.append(ticket.times[1] - ticket.times[0])
        stats = engine.stats
    own = lambda values, percent: float(np.percentile(values[before:], percent) * 1e3)
    percentiles = lambda values: [own(values, percent) for percent in (50, 90, 99)]
    together = found["together"]
    return Result(
        batch,
        prompt,
        tokens,
        statistics.median(found["alone"]),
        statistics.median(found["rows"]),
        statistics.median(together),
        (max(together) - min(together)) / statistics.median(together),
        statistics.median(first),
        statistics.median(known),
        percentiles(stats.host),
        percentiles(stats.wait),
        stats.compiled - compiled,
    )


def _served(engine: Engine, prompts: np.ndarray, sampling: Sampling) -> list[Ticket]:
    tickets = [ticket for prompt in prompts for ticket in engine.submit(prompt, sampling)]
    for ticket in tickets:
        ticket.result()
    return tickets


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def table(r: Result) -> str:
    """The result as a Markdown table."""
    times = lambda values: " / ".join(f"{value:.2f}" for value in values)
    rows = [
        (f"prompts of {r.prompt}, {r.tokens} tokens each", "tokens/s", "to one"),
        ("---",) * 3,
        ("generate, one", f"{r.alone:,.1f}", "1"),
        (f"generate, {r.batch}", f"{r.rows_together:,.1f}", f"{r.rows_together / r.alone:.1f}"),
        (
            f"engine, {4 * r.batch} requests, {r.batch} at a time",
            f"{r.together:,.1f} (spread {r.spread:.0%})",
            f"{r.together / r.alone:.1f}",
        ),
    ]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"{text}\n\n"
        f"first token of one request after {r.first_token * 1e3:.1f} ms, "
        f"{r.first_token_known * 1e3:.1f} ms where its prompt is known\n"
        f"host {times(r.host)} ms a step (50, 90, 99 of 100), waiting for the device "
        f"{times(r.wait)} ms; {r.compiled_while_measured} programs compiled while measuring"
    )
