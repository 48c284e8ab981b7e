"""The `quantize` command: a quantised folder from a float one."""

import time
from pathlib import Path

from infer import progress
from infer.commands import Quantize
from pangu_jax.checkpoint import hf, native, streamed
from pangu_jax.checkpoint.folder import Folder
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.quant import scheme


def run(command: Quantize) -> int:
    """Writes the folder and says how much smaller it is."""
    source, target = native.published(Path(command.model)), Path(command.output)
    start = time.perf_counter()
    config, _ = hf.read_config(source)
    said = Description(scheme.named(command.recipe, config), command.format)
    with progress.reading("quantising") as advance:
        streamed.quantise(source, target, said, advance)
    before, after = (_bytes(folder) for folder in (source, target))
    seconds = time.perf_counter() - start
    print(
        f"{target}: {command.recipe} ({command.format}), {after / 1e6:,.1f} MB of "
        f"{before / 1e6:,.1f} in {seconds:.0f} s"
    )
    return 0


def _bytes(folder: Path) -> int:
    tensors = Folder(folder)
    return sum(tensors.entry(name).nbytes for name in tensors.names)
