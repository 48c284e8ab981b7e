"""Our optimisations, one by one on a naive program: what each is worth on this machine.

Each program is the one before it and one thing more; all choose the same tokens, but for those of
quantised models. (The published stack claims 6 to 8 times for all of its own, on other hardware.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from infer.bench import bounds
from infer.bench.measure import Program, Side, ours
from pangu_jax import build
from pangu_jax.kernels import native
from pangu_jax.model import Pangu


def sides(model: Pangu, length: int, batch: int) -> list[Side]:
    """The programs, from the naive one on."""
    stacked = build.convert(model, "stacked")
    separate = build.convert(model, "separate")
    step = bounds.step_bytes(model, length, batch)
    found = [
        Side("no cache: all tokens again for each", _plain(_without_cache(stacked)), step),
        Side("+ KV cache", _plain(ours(stacked, 1)), step),
        Side("+ a leaf for each layer", _plain(ours(separate, 1)), step),
        Side("+ 32 tokens a dispatch", _plain(ours(separate)), step),
        Side("+ kernels", ours(separate), step),
    ]
    if not model.recipe.runs:
        small = build.quantize(separate, "w8a8")
        bytes_of = lambda held: bounds.step_bytes(held, length, batch)
        found.append(Side("+ w8a8", ours(small), bytes_of(small)))
        cached = build.with_cache(small, "int8")
        found.append(Side("+ int8 cache", ours(cached), bytes_of(cached)))
    return found


def _plain(run: Program) -> Program:
    """In plain XLA."""

    def without(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        with native.without():
            return run(prompts, tokens, first)

    return without


def _without_cache(model: Pangu) -> Program:
    """A full pass over everything for each token, in one shape."""

    @jax.jit
    def following(model: Pangu, held: jax.Array, count: jax.Array) -> jax.Array:
        logits = model(held, jnp.arange(held.shape[1])[None] < count * jnp.ones_like(held[:, :1]))
        return held.at[:, count].set(jnp.argmax(logits[:, count - 1], axis=-1).astype(held.dtype))

    def run(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        length = prompts.shape[1]
        held = jnp.asarray(np.pad(prompts, [(0, 0), (0, tokens)]), jnp.int32)
        for i in range(tokens):
            held = following(model, held, jnp.int32(length + i))
            if i == 0:
                held.block_until_ready()
                first()
        return np.asarray(held)[:, length:]

    return run
