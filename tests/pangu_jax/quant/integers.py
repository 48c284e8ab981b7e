"""What products of integers are, in NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight

STATIC = Scheme("int8", "static")


def same(got: Any, wanted: np.ndarray) -> None:
    """Equal bit by bit."""
    got = np.asarray(got)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers and the scale of each row."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    numbers = np.clip(np.round(x / np.where(scale > 0, scale, np.float32(1))), -127, 127)
    return numbers.astype(np.int8), scale


def of_rows(held: Weight) -> tuple[np.ndarray, np.ndarray]:
    """The numbers [out, D] as wide integers, the scales [out]."""
    flat = np.asarray(held.numbers, np.int64).reshape(-1, held.shape[-1])
    return flat, np.asarray(held.scale).reshape(-1)


def static(seed: int, *out: int, each: tuple[int, ...] = (), width: int = 64) -> Weight:
    rng = np.random.default_rng(seed)
    ones = (*each, *(1,) * (len(out) + 1 - len(each)))
    return Weight(
        scheme=STATIC,
        numbers=jnp.asarray(rng.integers(-128, 128, (*out, width)), jnp.int8),
        scale=jnp.asarray(rng.uniform(1e-5, 1e-4, (*out, 1)), jnp.float32),
        input_scale=jnp.asarray(rng.uniform(0.01, 0.03, ones), jnp.float32),
        offset=jnp.asarray(rng.integers(-20, 20, ones), jnp.int8),
        bias=jnp.asarray(rng.integers(-20000, 20000, (*out, 2)), jnp.int32),
    )


def fixed(x: np.ndarray, held: Weight) -> np.ndarray:
    """The published formula."""
    (of_weight, of_out), bias = of_rows(held), np.asarray(held.bias, np.int64).sum(-1).reshape(-1)
    ratio = x.astype(np.float32) / np.asarray(held.input_scale).reshape(())
    moved = np.round(ratio) + np.asarray(held.offset, np.float32).reshape(())
    numbers = np.clip(moved, -128, 127).astype(np.int64)
    sums = (numbers @ of_weight.T + bias).astype(np.float32)
    return (sums * of_out).reshape(len(x), *held.shape[:-1])
