"""Where a model came from: what `save_hf` needs beside the weights."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The folder a model was loaded from, its config.json, and the companion files there.

    It travels with the model but is no part of its type: all origins are equal, so that models from
    different folders share compiled functions and can be mapped together. A model that comes out of
    a jitted function carries the origin of the model the function was first traced with.
    """

    folder: Path | None = None
    config: dict[str, Any] | None = None
    companions: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)
