"""The README's commands exist, and its Python runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import infer
import pangu_jax
from infer import cli, commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def test_commands_parse() -> None:
    ours = [shlex.split(line, comments=True) for line in SHELL if line.startswith("pangu-infer")]
    assert {words[1] for words in ours} == {"check", "generate", "bench"}
    for words in ours:
        cli.parse("pangu-infer", "", commands.COMMANDS, words[1:])


@pytest.mark.parametrize("target", ["demo", "test", "help", "check", "test-slow"])
def test_make_targets_exist(target: str) -> None:
    assert f"make {target}" in README
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    tiny = ROOT / "tests" / "oracle" / "dense-tiny"
    code = code.replace("openPangu-Embedded-7B-V1.1", str(tiny)).replace("45887, 7217", "45, 72")
    code = code.replace("45887", "45")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 3, 512)
    assert isinstance(names["trace"], pangu_jax.Trace)
    assert isinstance(names["completion"], infer.Completion)
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_no_placeholder_is_left() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"[A-Z]+_TABLE|TODO|XXX", page.read_text(encoding="utf-8")), page


def test_the_tree_in_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(pangu_jax/ .*?)```", README, re.DOTALL)
    for line in tree.splitlines():
        indent = "pangu_jax/" if line.startswith("  ") else ""
        for name in re.findall(r"[\w]+(?:\.py|/)(?=\s)", line):
            assert (ROOT / indent / name).exists(), name
