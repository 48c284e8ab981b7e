"""An import never points up a floor: pangu_jax < infer < train. Nothing here imports the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "pangu_jax": {"pangu_jax"},
    "infer": {"pangu_jax", "infer"},
    "train": {"pangu_jax", "infer", "train"},
}
OURS = {*ALLOWED, "tests", "configs"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_point_down(floor: str) -> None:
    sources = sorted((ROOT / floor).rglob("*.py"))
    assert sources
    for path in sources:
        used = {name.split(".")[0] for name in imports(path)} & OURS
        assert used <= ALLOWED[floor], f"{path} imports {sorted(used - ALLOWED[floor])}"


@pytest.mark.parametrize(
    "module", ["pangu_jax/__init__.py", "infer/__init__.py", "infer/commands.py", "infer/cli.py"]
)
def test_what_help_reads_does_not_import_jax(module: str) -> None:
    """Directly; `tests/infer/test_cli.py` checks the running program."""
    top = ast.parse((ROOT / module).read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("jax", "flax", "numpy")}
