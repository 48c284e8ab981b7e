"""What a machine could do at most: work by formula, and rates measured on it.

Decode reads every weight once per step, so its bound is the bandwidth of a large float32
matrix-vector product; prefill multiplies, so its bound is a large square product in the model's
dtype.
"""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pangu_jax import build
from pangu_jax.config import ModelConfig
from pangu_jax.model import Pangu
from pangu_jax.plan import cost
from pangu_jax.quant import leaves
from pangu_jax.quant.weight import nbytes

BANDWIDTH_BYTES = 2**30
FLOPS_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


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
    # Sums stay in float32: where XLA for CPU is fastest with bf16.
    product = jax.jit(
        lambda a, b: jnp.einsum(
            "nd,ed->ne", a, b, precision=precision, preferred_element_type=jnp.float32
        )
    )
    return lambda: (
        2 * side**3 / min(seconds(lambda: product(square, square)) for _ in range(3)) / 1e12
    )


def cores() -> int:
    """The cores that this process may use, which is what XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
