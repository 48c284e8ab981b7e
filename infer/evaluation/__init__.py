"""How often a model is right, on problems with one exact answer.

    found = evaluation.evaluate(model, tokenizer, problems.read(path), ("fast", "slow"))
    report.show(found)

`evaluate` is imported when it is used: what reads, scores and reports does not import JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.evaluation.examine import evaluate

__all__ = ["evaluate"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name != "evaluate":
        raise AttributeError(f"module 'infer.evaluation' has no attribute '{name}'")
    from infer.evaluation import examine

    return examine.evaluate
