"""The `bench` command: prefill and decode, as fractions of what this machine can do.

Decode reads every weight once per step, so its bound is the bandwidth of a large float32
matrix-vector product; prefill multiplies, so its bound is a large square product in the model's
dtype. Both are measured here, between the model's own runs, on the same device.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from infer import generation, progress
from infer.commands import Bench
from infer.engine import bench as engine_bench
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.plan import cost
from pangu_jax.quant import leaves
from pangu_jax.quant.scheme import FLOAT
from pangu_jax.quant.weight import nbytes

BANDWIDTH_BYTES = 2**30
FLOPS_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over the repetitions, and the spread (largest minus smallest, over the median)."""

    device: str
    dtype: str
    quantised: str
    prompt: int
    batch: int
    prefill_tokens_per_s: float
    prefill_tflops: float
    prefill_spread: float
    decode_tokens_per_s: float
    decode_gb_per_s: float
    decode_spread: float
    bound_tflops: float
    bound_gb_per_s: float


def run(command: Bench) -> int:
    """Prints a table (or one JSON object) of speeds and fractions of the bounds."""
    if min(command.prompt, command.tokens, command.batch, command.repeats) < 1:
        raise InputError("--prompt, --tokens, --batch and --repeats must be at least 1")
    if command.tokens < 2:
        raise InputError("--tokens must be at least 2: the first comes from prefill")
    progress.say("preparing the weights ...")
    model = _model(command)
    if command.prompt + command.tokens > model.config.max_positions:
        raise InputError(f"the model has only {model.config.max_positions} positions")
    sizes = command.prompt, command.tokens, command.batch, command.repeats
    if command.engine:
        of_engine = engine_bench.measure(model, *sizes, progress.say)
        if command.json:
            print(json.dumps(dataclasses.asdict(of_engine)))
        else:
            print(engine_bench.table(of_engine))
        return 0
    result = measure(model, *sizes)
    if command.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(table(result))
    return 0


def table(r: Result) -> str:
    """The result as a Markdown table."""
    rows = [
        ("", "tokens/s", "rate", "bound, same run", "of the bound", "spread"),
        ("---",) * 6,
        (
            f"prefill {r.batch} x {r.prompt}",
            f"{r.prefill_tokens_per_s:.1f}",
            f"{r.prefill_tflops:.3f} TFLOP/s",
            f"{r.bound_tflops:.3f} TFLOP/s",
            f"{r.prefill_tflops / r.bound_tflops:.0%}",
            f"{r.prefill_spread:.0%}",
        ),
        (
            f"decode, {r.batch} at a time",
            f"{r.decode_tokens_per_s:.2f}",
            f"{r.decode_gb_per_s:.1f} GB/s",
            f"{r.bound_gb_per_s:.1f} GB/s",
            f"{r.decode_gb_per_s / r.bound_gb_per_s:.0%}",
            f"{r.decode_spread:.0%}",
        ),
    ]
    numbers = f"{r.dtype}, {r.quantised}" if r.quantised else r.dtype
    head = f"{r.device}, {numbers}, JAX {jax.__version__}\n\n"
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def measure(model: Pangu, prompt: int, tokens: int, batch: int, repeats: int) -> Result:
    """Times `repeats` prefills and decodes, with the bounds measured in between."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt))
    device = next(iter(model.embed[...].devices()))
    both = lambda new: generation.generate(model, prompts, Sampling(new, ignore_eos=True))
    with jax.default_device(device):
        bandwidth, flops = bandwidth_probe(), flops_probe(model.dtype, device.platform)
    for warm in (lambda: both(1), lambda: both(tokens), bandwidth, flops):
        warm()
    prefills, decodes, gb, tflops = [], [], [], []
    for _ in range(repeats):
        prefills.append(seconds(lambda: both(1)))
        decodes.append(seconds(lambda: both(tokens)) - prefills[-1])
        gb.append(bandwidth())
        tflops.append(flops())
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    step = decode / (tokens - 1)
    return Result(
        device=device.device_kind,
        dtype=str(model.dtype),
        quantised=_held_as(model),
        prompt=prompt,
        batch=batch,
        prefill_tokens_per_s=batch * prompt / prefill,
        prefill_tflops=prefill_flops(model.config, prompt, batch) / prefill / 1e12,
        prefill_spread=(max(prefills) - min(prefills)) / prefill,
        decode_tokens_per_s=batch / step,
        decode_gb_per_s=step_bytes(model, prompt + tokens // 2, batch) / step / 1e9,
        decode_spread=(max(decodes) - min(decodes)) / decode,
        bound_tflops=max(tflops),
        bound_gb_per_s=max(gb),
    )


def _held_as(model: Pangu) -> str:
    """What is quantised, in words; "" if nothing is."""
    schemes = {scheme for _, layer in model.recipe.runs for _, scheme in layer}
    said = [f"{s.numbers} weights, {s.activations} activations" for s in schemes]
    return ", ".join(sorted(said) + ([f"{model.recipe.cache} cache"] if model.recipe.cache else []))


def prefill_flops(config: ModelConfig, prompt: int, batch: int) -> float:
    """Multiplications and additions of a prefill: active layer weights for every token, causal
    attention (half of the square), and the head for the last token of each prompt.
    """
    matrices = 1 if config.tie_embeddings else 2
    head = config.vocab_size * config.hidden_size
    layers = config.num_active_parameters - matrices * head
    square = 2 * config.num_layers * config.num_heads * config.head_dim * prompt**2
    return batch * (2.0 * layers * prompt + square + 2.0 * head)


def step_bytes(model: Pangu, length: int, batch: int) -> int:
    """Bytes one decode step must read: active weights once (an embedding that is no head is only
    looked up; experts as if no two rows shared one, at most all of them), and the KV cache.
    """
    config, size = model.config, model.dtype.itemsize
    held = nbytes(model)
    if config.moge is not None:
        idle = config.moge.num_experts - min(
            batch * config.moge.experts_per_token, config.moge.num_experts
        )
        experts = [
            leaf
            for name, leaf in build.named_leaves(model)
            if leaves.split(name)[0].endswith(("mlp.gate_up", "mlp.down"))
        ]
        held -= nbytes(experts) * idle // config.moge.num_experts
    if not config.tie_embeddings:
        held -= config.vocab_size * config.hidden_size * size
    heads = 2 * config.num_layers * config.num_kv_heads
    return held + batch * length * heads * cost.head_bytes(model.recipe, config.head_dim, size)


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


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


def bandwidth_probe() -> Callable[[], float]:
    """GB/s at which a float32 matrix is read by a product with one vector."""
    columns = 2048
    matrix = jax.random.normal(jax.random.key(1), (BANDWIDTH_BYTES // 4 // columns, columns))
    vector = jnp.ones((1, columns), jnp.float32)
    product = jax.jit(lambda v, m: jnp.einsum("nd,ed->ne", v, m, precision="highest"))
    return lambda: (
        matrix.nbytes / min(seconds(lambda: product(vector, matrix)) for _ in range(3)) / 1e9
    )


def flops_probe(dtype: jnp.dtype, platform: str) -> Callable[[], float]:
    """TFLOP/s of a square product in the model's dtype."""
    side = FLOPS_SIDE.get(platform, 2048)
    square = jax.random.normal(jax.random.key(2), (side, side)).astype(dtype)
    precision = "highest" if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.einsum("nd,ed->ne", a, b, precision=precision))
    return lambda: (
        2 * side**3 / min(seconds(lambda: product(square, square)) for _ in range(3)) / 1e12
    )
