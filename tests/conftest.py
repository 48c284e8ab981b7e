"""The suite runs on eight virtual CPU devices, with strict promotion and warnings as errors.

Programs are compiled without optimising: compiling is most of the time of the suite, and what XLA
optimises is not what is tested. Nothing fails for being slow on a busy machine.
"""

import importlib.metadata
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Compiles in half the time. Later versions know no such flag, and end at what they do not know.
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"

import hypothesis
import jax
import pytest

from pangu_jax.kernels import native

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """A compiled program keeps several memory maps, of which Linux grants a process 65,530: without
    this a run of many modules ends in a segmentation fault of XLA.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs as users get them, with all that XLA does by default."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def plain_xla() -> Iterator[None]:
    """As where no C++ compiler is."""
    with native.without():
        yield


HARDWARE = {"gpu": "gpu", "tpu": "tpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for hardware or weights that are not here are skipped."""
    platform = jax.default_backend()
    for item in items:
        for marker, needed in HARDWARE.items():
            if item.get_closest_marker(marker) and platform != needed:
                item.add_marker(pytest.mark.skip(reason=f"needs a {needed}"))
        if item.get_closest_marker("weights") and not os.environ.get("PANGU_WEIGHTS"):
            item.add_marker(pytest.mark.skip(reason="needs PANGU_WEIGHTS"))
