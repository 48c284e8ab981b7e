"""Loading takes about the memory of what is loaded: measured on a folder of the 1B's shape."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pangu_jax
from pangu_jax.checkpoint import hf_config, names, safetensors

ROOT = Path(__file__).parent.parent.parent.parent
LIMIT = 1.3

# In its own process: peak anonymous memory above that of the interpreter with JAX, per loaded byte.
MEASURE = """
import sys, threading, time
import jax, pangu_jax
jax.devices()
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
base, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = jax.block_until_ready(pangu_jax.load(sys.argv[1], sys.argv[2], form=sys.argv[3]))
stop.set()
watcher.join()
loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
assert loaded > 2e9
print((peak - base) / loaded)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("embedded-1b")
    config = pangu_jax.preset("embedded-1b")
    raw = hf_config.to_hf(config, "bfloat16", None)
    (path / "config.json").write_text(json.dumps(raw))
    parts = [part for _, leaf_parts in names.leaves(config) for part in leaf_parts]
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    random = lambda part: rng.standard_normal(part.shape, np.float32).astype(dtype)
    specs = [safetensors.Spec(part.name, dtype, part.shape) for part in parts]
    safetensors.write(path / "model.safetensors", specs, map(random, parts))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_anonymous_memory(folder: Path, dtype: str, form: str) -> None:
    argv = [sys.executable, "-c", MEASURE, str(folder), dtype, form]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    ratio = float(done.stdout)
    print(f"load of the 1B shape as {dtype}, {form}: peak {ratio:.3f} x the loaded arrays")
    assert 0.95 < ratio < LIMIT
