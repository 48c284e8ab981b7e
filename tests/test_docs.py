"""Pages that programs write are up to date."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_tables_of_the_page_on_parallelism() -> None:
    """Every row is counted in lowered programs, and is what the formula says."""
    program = ROOT / "docs" / "parallelism.py"
    done = subprocess.run(
        [sys.executable, str(program), "--check"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
