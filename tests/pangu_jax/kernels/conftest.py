"""Kernels of the CPU are tested where there is a C++ compiler."""

from pathlib import Path

import pytest

from pangu_jax.kernels import native

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    own = [item for item in here if not item.path.name.startswith("test_mosaic")]
    if own and (why := native.missing()):
        for item in own:
            item.add_marker(pytest.mark.skip(reason=f"no kernels: {why}"))
