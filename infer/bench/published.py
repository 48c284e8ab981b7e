"""A model's weights as others read them: by their published names."""

import numpy as np

from pangu_jax import build
from pangu_jax.checkpoint import names
from pangu_jax.model import Pangu


def weights(model: Pangu) -> dict[str, np.ndarray]:
    """Every weight, float32 or bf16, in the shape that a published folder has it in."""
    held = dict(build.named_leaves(build.convert(model, "separate")))
    found = {}
    for leaf, parts in names.leaves(model.config):
        array = np.asarray(held[leaf])
        for part in parts:
            found[part.name] = np.ascontiguousarray(array[part.index]).reshape(part.shape)
    return found
