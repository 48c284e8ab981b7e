"""Prefill and decode of several programs in turn, with the machine's bounds in between."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from infer.bench import bounds
from infer.generation import Decoding
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig
from pangu_jax.model import Pangu

# A program: the tokens that follow prompts [B, T], chosen greedily, so many for each. It calls when
# the first of each is there.
Program = Callable[[np.ndarray, int, Callable[[], None]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Speed:
    """One program's: medians over the repetitions, the fastest, and the spread (largest minus
    smallest, over the median). `same_tokens` is the part of its tokens that the first program
    chose as well.
    """

    program: str
    prefill_tokens_per_s: float
    prefill_fastest: float
    prefill_spread: float
    decode_tokens_per_s: float
    decode_fastest: float
    decode_spread: float
    decode_gb_per_s: float
    same_tokens: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in one run. Bounds are the highest that were seen in it."""

    device: str
    prompt: int
    batch: int
    tokens: int
    prefill_flops: float
    bound_tflops: float
    bound_gb_per_s: float
    speeds: list[Speed]


@dataclasses.dataclass(frozen=True)
class Side:
    """A program to be measured, and the bytes that a step of it reads at least."""

    name: str
    run: Program
    step_bytes: int


def ours(model: Pangu, each: int | None = None) -> Program:
    """`infer.generate`, `each` tokens a dispatch (else as many as it takes)."""

    def run(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        decoding = Decoding(model, prompts, Sampling(tokens, ignore_eos=True))
        decoding.step()
        first()
        while decoding.alive:
            decoding.step(each)
        return np.array([row.completion.token_ids for row in decoding.rows])

    return run


def measure(
    config: ModelConfig,
    dtype: jnp.dtype,
    sides: list[Side],
    prompt: int,
    tokens: int,
    batch: int,
    repeats: int,
) -> Result:
    """Times `repeats` generations of each, one after the other."""
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt))
    device = jax.devices()[0]
    bandwidth, flops = bounds.bandwidth_probe(), bounds.flops_probe(dtype, device.platform)
    chosen = {side.name: side.run(prompts, tokens, lambda: None) for side in sides}
    bandwidth()
    flops()
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    gb, tflops = [], []
    for _ in range(repeats):
        for side in sides:
            times[side.name].append(_timed(side.run, prompts, tokens))
        gb.append(bandwidth())
        tflops.append(flops())
    shape = prompt, tokens, batch
    speeds = [_speed(side, shape, times[side.name], chosen, sides[0]) for side in sides]
    work = bounds.prefill_flops(config, prompt, batch)
    return Result(device.device_kind, prompt, batch, tokens, work, max(tflops), max(gb), speeds)


def _timed(run: Program, prompts: np.ndarray, tokens: int) -> tuple[float, float]:
    """Seconds to the first tokens, and from there to the last."""
    marks = [time.perf_counter()]
    run(prompts, tokens, lambda: marks.append(time.perf_counter()))
    start, first = marks
    return first - start, time.perf_counter() - first


def _speed(
    side: Side,
    shape: tuple[int, int, int],
    times: list[tuple[float, float]],
    chosen: Mapping[str, np.ndarray],
    first: Side,
) -> Speed:
    prompt, tokens, batch = shape
    middle = statistics.median
    spread = lambda values: (max(values) - min(values)) / middle(values)
    prefills = [prefill for prefill, _ in times]
    decodes = [decode / (tokens - 1) for _, decode in times]
    return Speed(
        program=side.name,
        prefill_tokens_per_s=batch * prompt / middle(prefills),
        prefill_fastest=batch * prompt / min(prefills),
        prefill_spread=spread(prefills),
        decode_tokens_per_s=batch / middle(decodes),
        decode_fastest=batch / min(decodes),
        decode_spread=spread(decodes),
        decode_gb_per_s=side.step_bytes / middle(decodes) / 1e9,
        same_tokens=float(np.mean(chosen[side.name] == chosen[first.name])),
    )


def table(r: Result) -> str:
    """The result as a Markdown table."""
    head = ("", "tokens/s", "fastest", "spread", "rate", "bound, same run", "of the bound")
    rows = [head, ("---",) * len(head)]
    several = len(r.speeds) > 1
    for phase in ("prefill", "decode"):
        for speed in r.speeds:
            what = f"prefill {r.batch} x {r.prompt}"
            if phase == "decode":
                what = f"decode, {r.batch} at a time"
            rows.append(_row(r, speed, phase, f"{what}, {speed.program}" if several else what))
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    for speed in r.speeds[1:]:
        text += f"\n\n{speed.program}: {speed.same_tokens:.0%} of its {r.batch} x {r.tokens} "
        text += f"tokens are those of {r.speeds[0].program}"
    return text


def _row(r: Result, speed: Speed, phase: str, what: str) -> tuple[str, ...]:
    if phase == "prefill":
        rate = r.prefill_flops * speed.prefill_tokens_per_s / (r.batch * r.prompt) / 1e12
        bound, unit, digits = r.bound_tflops, "TFLOP/s", 3
        values = speed.prefill_tokens_per_s, speed.prefill_fastest, speed.prefill_spread
    else:
        rate, bound, unit, digits = speed.decode_gb_per_s, r.bound_gb_per_s, "GB/s", 1
        values = speed.decode_tokens_per_s, speed.decode_fastest, speed.decode_spread
    middle, fastest, spread = values
    return (
        what,
        f"{middle:.2f}",
        f"{fastest:.2f}",
        f"{spread:.0%}",
        f"{rate:.{digits}f} {unit}",
        f"{bound:.{digits}f} {unit}",
        f"{rate / bound:.0%}",
    )
