"""The README's commands exist, its Python runs, and the Chinese one says the same."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

import infer
import pangu_jax
from infer import cli, commands
from pangu_jax.text import parse
from pangu_jax.text.tokenizer import write_preset
from train import commands as training

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "docs").glob("*.md")]


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)


BLOCKS = blocks(README)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def test_commands_parse() -> None:
    ours = [shlex.split(line, comments=True) for line in SHELL if line.startswith("pangu-infer")]
    shown = {"check", "chat", "generate", "bench", "eval", "plan", "quantize", "warmup"}
    assert {words[1] for words in ours} == shown
    for words in ours:
        cli.parse("pangu-infer", "", commands.COMMANDS, words[1:])
    ours = [shlex.split(line, comments=True) for line in SHELL if line.startswith("pangu-train")]
    assert {words[1] for words in ours} == {"tasks", "sft"}
    for words in ours:
        cli.parse("pangu-train", "", training.COMMANDS, words[1:])


@pytest.mark.parametrize("target", ["demo", "test", "help", "check", "test-slow"])
def test_make_targets_exist(target: str) -> None:
    assert f"make {target}" in README
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    config = dataclasses.replace(pangu_jax.preset("nano"), num_layers=1)
    pangu_jax.save_hf(pangu_jax.init(config, jax.random.key(0)), tmp_path / "tiny")
    write_preset("nano", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code.replace("openPangu-Embedded-7B-V1.1", "tiny"), "README.md", "exec"), names)
    assert names["logits"].shape == (1, len(names["prompt"]), 1024)
    assert isinstance(names["reply"], parse.Reply)
    assert isinstance(names["trace"], pangu_jax.Trace)
    assert isinstance(names["completion"], infer.Completion)
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"[A-Z]+_TABLE|TODO|XXX", page.read_text(encoding="utf-8")), page


def test_the_tree_in_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(pangu_jax/ .*?)```", README, re.DOTALL)
    top = ""
    for line in tree.splitlines():
        inside = line.startswith("  ")
        top = top if inside else line.split()[0]
        indent = top if inside else ""
        for name in re.findall(r"[\w]+(?:\.py|/)(?=\s)", line):
            assert (ROOT / indent / name).exists(), name


def test_the_chinese_readme_has_the_same_code() -> None:
    """Comments apart, which are translated."""

    def code(page: str) -> list[tuple[str, list[str]]]:
        bare = lambda line: re.sub(r"\s*#.*|\s*;\s.*", "", line).rstrip()
        return [(kind, [bare(line) for line in text.splitlines()]) for kind, text in blocks(page)]

    assert code(CHINESE) == code(README)


def test_the_chinese_readme_has_the_same_structure() -> None:
    """Headings by level, table rows, list items, the tree, links and figures."""
    shape = lambda page: re.findall(r"^(#+|-|\|)(?= )", page, re.MULTILINE)
    assert shape(CHINESE) == shape(README)
    tree = lambda page: re.findall(r"^ *([\w/.]+(?:/|\.py))(?= )", page, re.MULTILINE)
    assert tree(CHINESE) == tree(README)
    links = lambda page: sorted(set(re.findall(r"\]\(([^)]+)\)", page)) - {"README.md"})
    assert links(CHINESE) == sorted(set(links(README)) - {"README.zh.md"})
    figures = lambda page: sorted(set(re.findall(r"\d+\.\d+(?:e-\d+)?|`[^`\n]+`", page)))
    assert figures(CHINESE) == figures(README)
