"""Prefill and decode of several programs in turn, with the machine's bounds in between."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from infer import generation
from infer.bench import bounds
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig
from pangu_jax.model import Pangu

# A program: the tokens that follow prompts [B, T], chosen greedily, so many for each.
Program = Callable[[np.ndarray, int], np.ndarray]


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


def ours(model: Pangu) -> Program:
    """`infer.generate`."""

    def run(prompts: np.ndarray, tokens: int) -> np.ndarray:
        found = generation.generate(model, prompts, Sampling(tokens, ignore_eos=True))
        return np.array([completion.token_ids for completion in found])

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
    """Times `repeats` prefills and decodes of each, one after the other."""
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt))
    device = jax.devices()[0]
    bandwidth, flops = bounds.bandwidth_probe(), bounds.flops_probe(dtype, device.platform)
    chosen = {}
    for side in sides:
        side.run(prompts, 1)
        chosen[side.name] = side.run(prompts, tokens)
    bandwidth()
    flops()
    times: dict[str, tuple[list[float], list[float]]] = {side.name: ([], []) for side in sides}
    gb, tflops = [], []
    for _ in range(repeats):
        for side in sides:
            prefills, wholes = times[side.name]
            prefills.append(bounds.seconds(lambda side=side: side.run(prompts, 1)))
            wholes.append(bounds.seconds(lambda side=side: side.run(prompts, tokens)))
        gb.append(bandwidth())
        tflops.append(flops())
    shape = prompt, tokens, batch
    speeds = [_speed(side, shape, *times[side.name], chosen, sides[0]) for side in sides]
    work = bounds.prefill_flops(config, prompt, batch)
    return Result(device.device_kind, prompt, batch, tokens, work, max(tflops), max(gb), speeds)


def _speed(
    side: Side,
    shape: tuple[int, int, int],
    prefills: list[float],
    wholes: list[float],
    chosen: Mapping[str, np.ndarray],
    first: Side,
) -> Speed:
    """Decoding is what a whole generation takes beyond the median prefill: the two of one turn may
    fall into different moods of a shared machine.
    """
    prompt, tokens, batch = shape
    middle = statistics.median
    spread = lambda values: (max(values) - min(values)) / middle(values)
    decodes = [(whole - middle(prefills)) / (tokens - 1) for whole in wholes]
    fastest = (min(wholes) - min(prefills)) / (tokens - 1)
    return Speed(
        program=side.name,
        prefill_tokens_per_s=batch * prompt / middle(prefills),
        prefill_fastest=batch * prompt / min(prefills),
        prefill_spread=spread(prefills),
        decode_tokens_per_s=batch / middle(decodes),
        decode_fastest=batch / fastest,
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
