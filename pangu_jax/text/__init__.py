"""Text in and out: the tokenizer, the chat template, and the parsers of what a model says.

    ids = chat.encode(tokenizer, [{"role": "user", "content": "Hello"}], think="fast")
    parse.parse(tokenizer.decode(answer)).answer

Modules are imported when they are used.
"""

import importlib
from typing import Any

_MODULES = ("chat", "detokenizer", "markers", "messages", "parse", "tokenizer")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pangu_jax.text' has no attribute '{name}'")
    return importlib.import_module(f"pangu_jax.text.{name}")
