"""What a model is called with, checked."""

from typing import Any

import numpy as np
from jax.core import Tracer

from pangu_jax.config import ModelConfig


def check(config: ModelConfig, tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Tokens as int32 [B, T] and the mask as bool [B, T], all True when it is None.

    Raises ValueError.
    """
    if getattr(tokens, "ndim", None) != 2 or not np.issubdtype(tokens.dtype, np.integer):
        kind = (
            f"{getattr(tokens, 'dtype', type(tokens).__name__)}{list(getattr(tokens, 'shape', []))}"
        )
        raise ValueError(f"tokens must be an integer array [B, T], not {kind}")
    if 0 in tokens.shape:
        raise ValueError(f"tokens {list(tokens.shape)} hold no token")
    if mask is None:
        mask = np.ones(tokens.shape, bool)
    if getattr(mask, "shape", None) != tokens.shape:
        raise ValueError(f"attention_mask must have the tokens' shape {list(tokens.shape)}")
    if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"attention_mask must be bool, or 0 and 1 as integers, not {mask.dtype}")
    if not isinstance(mask, Tracer):
        mask = np.asarray(mask)
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask must hold 0 and 1 only")
        if not isinstance(tokens, Tracer):
            _check_ids(config, np.where(mask, np.asarray(tokens), 0))
    return tokens.astype(np.int32), mask.astype(bool)


def _check_ids(config: ModelConfig, tokens: np.ndarray) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
