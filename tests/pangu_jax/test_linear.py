"""The product every projection goes through."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pangu_jax.kernels.matmul import xla
from pangu_jax.linear import linear


@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("out", [(6,), (2, 3), (2, 3, 4)], ids=str)
def test_every_output_axis(N: int, out: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 8)).astype(np.float32)
    w = rng.normal(size=(*out, 8)).astype(np.float32)
    got = linear(jnp.asarray(x), jnp.asarray(w))
    assert got.shape == (N, *out)
    np.testing.assert_allclose(got, np.tensordot(x, w, (1, -1)), atol=1e-5)


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bf16_sums_in_float32(N: int, dtype) -> None:
    """Thousands of small terms: a bf16 sum would stop growing at 256."""
    x = np.ones((N, 4096), ml_dtypes.bfloat16)
    w = np.ones((2, 4096), ml_dtypes.bfloat16)
    got = jax.jit(lambda x, w: linear(x, w, dtype))(x, w)
    assert got.dtype == (jnp.bfloat16 if dtype is None else jnp.float32)
    np.testing.assert_array_equal(got.astype(jnp.float32), 4096.0)


def test_gradient_of_a_single_bf16_row() -> None:
    x, w = jnp.ones((1, 4), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    dx, dw = jax.grad(lambda x, w: linear(x, w).sum().astype(jnp.float32), (0, 1))(x, w)
    np.testing.assert_array_equal(dx, 3)
    np.testing.assert_array_equal(dw, 1)


@pytest.mark.skipif(not xla.BF16_RESULTS, reason="needs JAX 0.11")
@pytest.mark.parametrize("N", [1, 8])
def test_bf16_makes_no_float32_copy_of_the_weight_on_cpu(N: int) -> None:
    x, w = jnp.ones((N, 256), jnp.bfloat16), jnp.ones((512, 256), jnp.bfloat16)
    compiled = jax.jit(linear).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes
