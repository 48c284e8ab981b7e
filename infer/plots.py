"""Figures in files: what can be wrong is said before the work, and a file appears whole.

matplotlib is optional, and imported only by those who draw.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer import files, progress
from pangu_jax.errors import InputError

SUFFIXES = (".png", ".svg")


def check(path: Path, flag: str = "--plot") -> None:
    """Raises InputError if no figure can be saved there, or none can be drawn.

    flag: what asked for it
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: {flag} writes {' or '.join(SUFFIXES)} files")
    files.check_target(path)
    require(flag)


def require(flag: str) -> None:
    """Raises InputError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(f"{flag} needs matplotlib: pip install matplotlib") from None


def save(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure; the same figure gives the same bytes."""
    import matplotlib

    data, kind = io.BytesIO(), path.suffix.lower().removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "pangu_jax"}), warnings.catch_warnings():
        # Names in a script that matplotlib's font lacks become boxes; that is to be seen anyway.
        warnings.filterwarnings("ignore", "Glyph")
        more = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(data, format=kind, dpi=150, **more)
    files.write(path, data.getvalue())


def try_save(make: Callable[[], Any], path: Path) -> None:
    """Writes the figure that `make` draws; where matplotlib is missing, says that there is none."""
    try:
        require(path.name)
    except InputError as error:
        progress.say(str(error))
    else:
        save(make(), path)
