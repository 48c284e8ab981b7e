"""The `bench` command: one training step, as a fraction of what this machine can do.

Training multiplies, so its bound is a large square float32 product, measured between the steps on
the same device. The repeats of a peer, the same step in PyTorch, alternate with ours; losses and
gradients of the first steps of both must be the same, which makes it a check of both, too.
"""

import dataclasses
import importlib.util
import json
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from infer import progress
from infer.bench import bounds
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from train import optimizer as optimizers
from train import step as steps
from train.commands import Bench
from train.config import OptimizerSection, Stage
from train.data import packing
from train.flops import step_flops
from train.objectives import Batch

# A repeat has as many steps as last so long (seconds).
REPEAT = 0.5
# Steps whose losses are compared: from the second on they show what the gradients changed.
COMPARED = 3
TOLERANCE = 1e-4
# How long a run the schedule of the learning rate takes this for.
SCHEDULED = 10_000

Steps = Callable[[int], tuple[float, float]]
"""Takes so many steps, waits for them, and tells the last one's loss and gradient norm."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of one implementation: medians over the repeats, the spread (largest minus smallest, over the
    median), and loss and gradient norm of the first steps.
    """

    program: str
    step_seconds: float
    tokens_per_s: float
    tflops: float
    of_the_bound: float
    spread: float
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured; `peer` is None where none was asked for."""

    device: str
    parameters: int
    batch: int
    length: int
    bound_tflops: float
    jax: Speed
    peer: Speed | None


def run(command: Bench) -> int:
    """Prints a table (or one JSON object); 1 where the peer's numbers are not ours."""
    if min(command.batch, command.repeats) < 1:
        raise InputError("--batch and --repeats must be at least 1")
    if command.length < 2:
        raise InputError("--length must be at least 2: the first token is not predicted")
    config = pangu_jax.preset(command.model)
    if command.length > config.max_positions:
        raise InputError(f"the model has only {config.max_positions} positions")
    if command.peer:
        _check_peer(config)
    progress.say("preparing the weights ...")
    result = measure(config, command.length, command.batch, command.repeats, command.peer)
    if command.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(table(result))
    if not (difference := apart(result)) <= TOLERANCE:  # NaN is a difference, too
        progress.say(f"the two implementations are {difference:.1e} apart, more than {TOLERANCE}")
        return 1
    return 0


def table(r: Result) -> str:
    """The result as a Markdown table, and how far the peer is from it."""
    rows = [
        (
            f"a step of {r.batch} x {r.length}",
            *("seconds", "tokens/s", "rate", "bound, same run", "of the bound", "spread"),
        ),
        ("---",) * 7,
    ]
    for speed in (r.jax, r.peer) if r.peer else (r.jax,):
        row = (
            speed.program,
            f"{speed.step_seconds:.4f}",
            f"{speed.tokens_per_s:.1f}",
            f"{speed.tflops:.3f} TFLOP/s",
            f"{r.bound_tflops:.3f} TFLOP/s",
            f"{speed.of_the_bound:.0%}",
            f"{speed.spread:.0%}",
        )
        rows.append(row)
    text = f"{r.device}, float32, {r.parameters:,} parameters\n\n"
    text += "\n".join("| " + " | ".join(row) + " |" for row in rows)
    if r.peer:
        losses = " ".join(f"{loss:.5f}" for loss in r.jax.losses)
        text += f"\n\nlosses of the first steps: {losses}; with the gradients' norms, the two "
        text += f"implementations are at most {apart(r):.1e} apart"
    return text


def apart(r: Result) -> float:
    """The largest relative difference of the first losses and gradient norms; 0 without a peer."""
    if r.peer is None:
        return 0.0
    ours, theirs = (np.array([s.losses, s.grad_norms]) for s in (r.jax, r.peer))
    return float(np.max(np.abs(ours - theirs) / np.abs(ours)))


def measure(config: ModelConfig, length: int, batch: int, repeats: int, peer: bool) -> Result:
    """Times `repeats` times some steps of random weights on random tokens, a peer's and the bound
    in between.
    """
    model = pangu_jax.init(config, jax.random.key(0), dtype="float32", form="stacked")
    device = next(iter(model.embed[...].devices()))
    data, section = random_batch(config.vocab_size, length, batch), OptimizerSection()
    sides = {f"JAX {jax.__version__}": jax_steps(model, data, section)}
    if peer:
        from train import peer as peers

        sides[peers.program()] = peers.steps(model, data, section, SCHEDULED)
    with jax.default_device(device):
        probe = bounds.flops_probe(jnp.dtype(jnp.float32), device.platform)
    probe()
    first = {name: [take(1) for _ in range(COMPARED)] for name, take in sides.items()}
    times, bound = _alternate(sides, probe, repeats)
    flops = step_flops(config, length, batch)

    def speed(name: str) -> Speed:
        step = statistics.median(times[name])
        return Speed(
            program=name,
            step_seconds=step,
            tokens_per_s=batch * length / step,
            tflops=flops / step / 1e12,
            of_the_bound=flops / step / 1e12 / bound,
            spread=(max(times[name]) - min(times[name])) / step,
            losses=tuple(loss for loss, _ in first[name]),
            grad_norms=tuple(norm for _, norm in first[name]),
        )

    ours, *theirs = map(speed, sides)
    kind, parameters = device.device_kind, config.num_parameters
    return Result(kind, parameters, batch, length, bound, ours, theirs[0] if theirs else None)


def _alternate(
    sides: dict[str, Steps], probe: Callable[[], float], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of every repeat of each side, in turns, and the most TFLOP/s in between."""
    counts = {
        name: math.ceil(REPEAT / bounds.seconds(lambda take=take: take(1)))
        for name, take in sides.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for _ in range(repeats):
        for name, take in sides.items():
            count = counts[name]
            times[name].append(bounds.seconds(lambda take=take, count=count: take(count)) / count)
        rates.append(probe())
    return times, max(rates)


def random_batch(vocabulary: int, length: int, batch: int) -> Batch:
    """Full rows of random tokens, of 2 to 4 examples each (1 where they would be too short), all to
    be learnt.
    """
    rng = np.random.default_rng(0)
    segments = np.ones((batch, length), np.int32)
    for row in segments:
        cuts = min(int(rng.integers(1, 4)), length // 2 - 1)
        row[rng.choice(np.arange(1, length), cuts, replace=False)] += 1
    segments = np.cumsum(segments - 1, axis=1, dtype=np.int32) + 1
    tokens = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
    return packing.batch(tokens, segments, np.ones((batch, length), bool))


def jax_steps(model: Pangu, batch: Batch, section: OptimizerSection) -> Steps:
    """Steps of `train.step`, as `train.loop` takes them; the first takes the model's arrays."""
    optimizer = optimizers.make(section, [Stage.whole(section, SCHEDULED)])
    step = jax.jit(steps.make(model, optimizer), donate_argnames="state")
    state = steps.start(model, optimizer, lambda name: False)

    def take(count: int) -> tuple[float, float]:
        nonlocal state
        metrics = None
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        assert metrics is not None
        return float(metrics.loss), float(metrics.grad_norm)

    return take


def _check_peer(config: ModelConfig) -> None:
    """Raises InputError where there can be no peer."""
    if config.moge is not None and (config.moge.router, config.moge.per_group) != ("grouped", 1):
        raise InputError("--peer routes as MoGE does: one expert of every group")
    if jax.default_backend() != "cpu":
        raise InputError("--peer runs on the CPU: compare with JAX_PLATFORMS=cpu")
    if importlib.util.find_spec("torch") is None:
        raise InputError("--peer needs PyTorch: pip install torch")
