"""Pangu in JAX: openPangu-Embedded 1B/7B and Pangu Pro MoE 72B as pure functions on pytrees.

    model = pangu_jax.load("folder")            # a Hugging Face folder
    logits = model(tokens)                      # [B, T] int32 -> [B, T, V] float32
    pangu_jax.trace(model, tokens)              # every layer's hidden states and routing
    pangu_jax.save_hf(model, "other-folder")
    pangu_jax.Tokenizer.load("folder")          # text to ids and back
    pangu_jax.text.chat.render(messages)        # the chat template

Letters in shapes, everywhere in the project:

    N tokens (flat, sequence-major)   B batch      T time        S cache length    V vocabulary
    D width (hidden size)             L layers     Q query heads K key/value heads H head_dim
    F FFN width                       E experts    G MoGE groups

Nothing is imported until it is used: `import pangu_jax` does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pangu_jax.build import abstract, convert, init, quantize
    from pangu_jax.checkpoint.hf import load
    from pangu_jax.checkpoint.save import save_hf
    from pangu_jax.config import ModelConfig, MoGEConfig, preset
    from pangu_jax.errors import CheckpointError, ConfigError, InputError, PanguError
    from pangu_jax.model import Pangu
    from pangu_jax.text.tokenizer import Tokenizer
    from pangu_jax.tracing import Trace, trace

__version__ = "0.1.0"

_HOMES = {
    "load": "pangu_jax.checkpoint.hf",
    "save_hf": "pangu_jax.checkpoint.save",
    "ModelConfig": "pangu_jax.config",
    "MoGEConfig": "pangu_jax.config",
    "preset": "pangu_jax.config",
    "CheckpointError": "pangu_jax.errors",
    "ConfigError": "pangu_jax.errors",
    "InputError": "pangu_jax.errors",
    "PanguError": "pangu_jax.errors",
    "Pangu": "pangu_jax.model",
    "Tokenizer": "pangu_jax.text.tokenizer",
    "abstract": "pangu_jax.build",
    "convert": "pangu_jax.build",
    "init": "pangu_jax.build",
    "quantize": "pangu_jax.build",
    "Trace": "pangu_jax.tracing",
    "trace": "pangu_jax.tracing",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "text":
        return importlib.import_module("pangu_jax.text")
    if name not in _HOMES:
        raise AttributeError(f"module 'pangu_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
