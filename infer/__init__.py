"""Weights into tokens: generation, and the `pangu-infer` command.

    infer.generate(model, [[1, 5, 9]], infer.Sampling(max_new_tokens=32))

Nothing is imported until it is used: `import infer` does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.engine.llm import LLM
    from infer.generation import generate, stream
    from infer.output import Completion
    from infer.sampling import Sampling

_HOMES = {
    "Completion": "infer.output",
    "LLM": "infer.engine.llm",
    "generate": "infer.generation",
    "stream": "infer.generation",
    "Sampling": "infer.sampling",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'infer' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
