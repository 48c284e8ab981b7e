"""`make bench-gpu`: the kernels for NVIDIA's Hopper beside XLA's programs on the card that is here,
and whole models with both, with random weights that are drawn on the card.

It needs no package beyond those of the core, and no file. Tables in Markdown, of minutes.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from infer.engine import sizes
from infer.engine.engine import Engine
from infer.engine.sizes import Wish
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax.cache import LayerCache
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError, PanguError
from pangu_jax.kernels import mosaic
from pangu_jax.kernels.attention import attend_cached
from pangu_jax.kernels.experts import Experts, mix_experts
from pangu_jax.paged import Grid, PagedMeta
from pangu_jax.quant import weight
from pangu_jax.quant.cached import Rows
from pangu_jax.quant.scheme import FLOAT, Scheme

PAGE = 64
CALLS = 10
REPEATS = 5
HEAD = ("what", "plain XLA", "the kernel", "times", "rate", "of the bound", "difference")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where a kernel and XLA do not agree."""
    parser = argparse.ArgumentParser("python -m infer.bench.gpu", description=__doc__)
    parser.add_argument("what", choices=("operations", "models"))
    parser.add_argument("--dense", default="embedded-7b", help="the dense model")
    parser.add_argument("--moge", default="pro-moe-72b", help="the MoGE model")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a prefill at most")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a request")
    parser.add_argument("--batch", type=int, default=256, help="requests at a time at most")
    given = parser.parse_args(arguments)
    if given.context < 16 or min(given.tokens, given.batch) < 1:
        parser.error("--context must be at least 16, --tokens and --batch at least 1")
    try:
        dense, moge = map(pangu_jax.preset, (given.dense, given.moge))
    except PanguError as error:
        parser.error(str(error))
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"kernels for a Hopper: {mosaic.why_not() or 'taken'}")
    most = _bounds(device.platform)
    if given.what == "models":
        batches = [batch for batch in (1, 64, 256) if batch <= given.batch]
        _print_rows(("model", "requests", "prefill, tokens/s", "decode, tokens/s"), [])
        _print_rows((), model_rows(given.dense, dense, None, batches, given.context))
        _print_rows((), model_rows(given.moge, moge, "w8a8", batches, given.context))
        return 0
    counts = [tokens for tokens in (1, 8, 64, 256, 2048, 8192) if tokens <= given.tokens]
    differ = _print_rows(HEAD, experts_rows(moge, counts, most))
    differ += _print_rows((), attention_rows(dense, given.batch, given.context, most))
    return int(differ > 0)


def _print_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """As they are measured, under a head where there is one; how many end with a mark."""
    start = [head, ["---"] * len(head)] if head else []
    marked = 0
    for row in itertools.chain(start, rows):
        print("| " + " | ".join(row) + " |", flush=True)
        marked += row[-1].endswith("!")
    return marked


def _bounds(platform: str) -> tuple[float, float]:
    """GB/s of a sum or of a copy, and TFLOP/s of a square bf16 product, on this card."""
    count, side = (2**30, 8192) if platform == "gpu" else (2**22, 256)
    big = jax.random.normal(jax.random.key(0), (count,), jnp.bfloat16)
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    read = big.nbytes / milliseconds(total, [big])[0] / 1e6
    moved = 2 * big.nbytes / milliseconds(jax.jit(jnp.negative), [big])[0] / 1e6
    flops = 2 * side**3 / milliseconds(jax.jit(jnp.matmul), [square, square])[0] / 1e9
    print(f"a sum reads {read:,.0f} GB/s, a copy moves {moved:,.0f}, bf16 {flops:,.3g} TFLOP/s\n")
    return max(read, moved), flops


def milliseconds(program: Callable[..., Any], arguments: Sequence[Any]) -> tuple[float, float]:
    """Of one call, median and spread: several are under way at once, as in a model's step."""
    jax.block_until_ready(program(*arguments))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready([program(*arguments) for _ in range(CALLS)])
        return (time.perf_counter() - start) / CALLS * 1e3

    times = [once() for _ in range(REPEATS)]
    middle = statistics.median(times)
    return middle, (max(times) - min(times)) / middle


def compare(
    what: str,
    program: Callable[..., Any],
    arguments: Sequence[Any],
    read: float,
    flops: float,
    most: tuple[float, float],
) -> list[str]:
    """A row: both programs' milliseconds, the kernel's rate in what bounds it, and the largest
    difference, of the largest number.
    """
    with mosaic.without():
        plain = jax.jit(lambda *given: program(*given))
        wanted = np.asarray(plain(*arguments), np.float32)
        before, spread_before = milliseconds(plain, arguments)
    kernel = jax.jit(lambda *given: program(*given))
    got = np.asarray(kernel(*arguments), np.float32)
    after, spread = milliseconds(kernel, arguments)
    difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    gb, tflops = read / after / 1e6, flops / after / 1e9
    by_memory = gb / most[0] > tflops / most[1]
    return [
        what,
        f"{before:.3f} ms ±{spread_before:.0%}",
        f"{after:.3f} ms ±{spread:.0%}",
        f"{before / after:.2f}",
        f"{gb:,.0f} GB/s" if by_memory else f"{tflops:,.3g} TFLOP/s",
        f"{max(gb / most[0], tflops / most[1]):.0%}",
        f"{difference:.1e}" + ("" if difference < 0.03 else " !"),
    ]


def experts_rows(
    config: ModelConfig, counts: Sequence[int], most: tuple[float, float]
) -> Iterator[list[str]]:
    """One layer's routed experts, for more and more tokens."""
    assert config.moge is not None
    E, k, F = config.moge.num_experts, config.moge.experts_per_token, config.moge.expert_width
    D = config.hidden_size
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.jit(
        lambda: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5
    )()
    held = draw(keys[0], E, 2, F, D), draw(keys[1], E, D, F)
    schemes = {"bf16": None, "w8a16": Scheme("int8"), "w8a8": Scheme("int8", "dynamic")}
    for name, scheme in schemes.items():
        own = held
        if scheme is not None:
            own = [jax.jit(functools.partial(weight.quantize, scheme=scheme))(x) for x in held]
        for tokens in counts:
            x = jax.random.normal(keys[2], (tokens, D), jnp.bfloat16)
            pick = jax.random.randint(keys[3], (tokens, k), 0, E // k, jnp.int32)
            chosen = pick + jnp.arange(k, dtype=jnp.int32)[None] * (E // k)
            share = jnp.full((tokens, k), 1 / k, jnp.float32)
            touched = len(np.unique(np.asarray(chosen)))
            bytes_each = 3 * D * F * (2 if scheme is None else 1)
            program = lambda x, chosen, share, g, d: mix_experts(x, chosen, share, Experts(g, d))
            what = f"experts, {name}, {tokens} tokens"
            work = 6.0 * D * F * k * tokens
            given = [x, chosen, share, *own]
            yield compare(what, program, given, float(touched * bytes_each), work, most)


def attention_rows(
    config: ModelConfig, batch: int, context: int, most: tuple[float, float]
) -> Iterator[list[str]]:
    """One layer's attention to pages: decode of few and many rows, and a part of a prompt."""
    K, H, g = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    for kind in ("bf16", "int8"):
        for rows, length, queries in (
            (1, context, 1),
            (batch, context, 1),
            (1, 16 * context, 1),
            (1, context, min(512, context)),
        ):
            pages = -(-length // PAGE)
            pool = jax.random.normal(jax.random.key(1), (rows * pages, K, PAGE, H), jnp.bfloat16)
            held: Any = pool
            if kind == "int8":
                held = Rows(
                    (pool * 30).astype(jnp.int8),
                    jnp.full((rows * pages, K, PAGE), 1 / 30, jnp.float32),
                )
            tables = np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages)
            ends = jnp.arange(length - queries, length, dtype=jnp.int32)
            positions = jnp.broadcast_to(ends, (rows, queries))
            grid = Grid(positions, jnp.ones((rows, queries), bool), jnp.asarray(tables, jnp.int32))
            q = jax.random.normal(jax.random.key(2), (1, rows * queries, K, g, H), jnp.bfloat16)
            program = lambda q, held, grid: attend_cached(
                q, LayerCache(held, held, None), PagedMeta((grid,))
            )
            read = 2.0 * rows * length * K * (H * 2 if kind == "bf16" else H + 4)
            work = 4.0 * rows * queries * length * K * g * H
            what = f"attention, {kind}, {rows} x {length}, {queries} queries each"
            yield compare(what, program, [q, held, grid], read, work, most)


def model_rows(
    name: str, config: ModelConfig, recipe: str | None, batches: Sequence[int], context: int
) -> Iterator[list[str]]:
    """The engine with a whole model; a quantised one has an int8 cache."""
    what, key = f"{name}, {recipe or 'bf16'}", jax.random.key(0)
    try:
        model = build.init(config, key, dtype="bfloat16", recipe=recipe or FLOAT)
        model = jax.block_until_ready(model)
    except jax.errors.JaxRuntimeError as error:  # no memory for it
        yield [what, "", str(error).splitlines()[0], ""]
        return
    if recipe is not None:
        model = build.with_cache(model, "int8")
    for batch in batches:
        head = [what, f"{batch} x {context}"]
        try:
            prefill, decode = _served(model, batch, context)
        except (ConfigError, jax.errors.JaxRuntimeError) as error:
            yield [*head, str(error).splitlines()[0], ""]
        else:
            yield [*head, f"{prefill:,.0f}", f"{decode:,.0f}"]


def _served(model: Any, batch: int, context: int) -> tuple[float, float]:
    """Tokens/s of prompts, and of answers: a sixteenth of the context is answered."""
    answer = max(2, context // 16)
    prompt, rng = context - answer, np.random.default_rng(0)
    shape = sizes.fitting(model, Wish(slots=batch, context=context))
    engine = Engine(model, shape)
    for line in engine.warm_up():
        print(line, file=sys.stderr)

    def seconds(tokens: int, count: int = batch) -> float:
        prompts = rng.integers(0, model.config.vocab_size, (count, prompt))
        sampling = Sampling(tokens, ignore_eos=True)
        start = time.perf_counter()
        for ticket in [t for p in prompts for t in engine.submit(p, sampling)]:
            ticket.result()
        return time.perf_counter() - start

    with engine:
        for tokens in (1, answer):  # what is compiled late
            seconds(tokens, 1)
        one, whole = seconds(1), seconds(answer)
    return batch * prompt / one, batch * (answer - 1) / max(whole - one, 1e-3)


if __name__ == "__main__":
    sys.exit(main())
