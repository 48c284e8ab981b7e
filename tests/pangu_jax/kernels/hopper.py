"""Where kernels for a Hopper are tested: on one, or in JAX's interpreter."""

import contextlib

import jax
import pytest

from pangu_jax.kernels import mosaic
from tests.pangu_jax.kernels import oracle

ON_CARD = jax.default_backend() == "gpu"
# The interpreter is there from JAX 0.12 on, the kernels from 0.11.
needs_one = pytest.mark.skipif(
    jax.__version_info__ < ((0, 11) if ON_CARD else (0, 12)),
    reason="JAX before 0.12 interprets no kernels for a GPU",
)
several_devices = pytest.mark.skipif(
    len(jax.devices()) < oracle.DEVICES, reason="traced for eight devices, which are virtual on CPU"
)


def here() -> contextlib.AbstractContextManager:
    """Within, programs are traced with kernels: interpreted where there is no card."""
    return mosaic.compiled() if ON_CARD else mosaic.interpreted()
