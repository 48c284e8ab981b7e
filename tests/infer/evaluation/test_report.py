"""The table has every number, whole, in 80 columns; plots are files, or one line of complaint."""

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from infer import files, plots
from infer.evaluation import report, score
from infer.evaluation.score import Answer, Evaluation, Speed
from pangu_jax.errors import InputError
from pangu_jax.text.markers import Think

MODES: tuple[Think, ...] = ("fast", "slow", "auto")
TASKS = ["add", "subtract", "a task whose name is long, 中文 [bold] $x", "a|b"]


def make(*groups: tuple[str, int, Think, int, int, int]) -> Evaluation:
    """Of groups of (task, difficulty, mode, n, correct, tokens of each)."""
    answers = [
        Answer(task, difficulty, mode, "?", "1", "1" if i < correct else "2", "", tokens, cut=False)
        for task, difficulty, mode, n, correct, tokens in groups
        for i in range(n)
    ]
    modes = {answer.mode: None for answer in answers}
    speed = tuple(Speed(mode, 12345678, 1234.5, 0, 0.0) for mode in modes)
    return Evaluation(score.tally(answers), speed, tuple(answers), max_new_tokens=512)


def drawn(evaluation: Evaluation, width: int = 80) -> str:
    """The table as a terminal of that width shows it, without colours."""
    text = io.StringIO()
    Console(file=text, width=width, emoji=False).print(report.table(evaluation))
    return text.getvalue()


def cells(line: str) -> list[str]:
    """What a line of Markdown holds."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


EXAMPLE = make(
    ("add", 1, "fast", 10, 10, 3),
    ("add", 2, "fast", 10, 0, 4),
    ("sort", 1, "fast", 200, 199, 5),
    ("add", 1, "slow", 10, 9, 30),
    ("add", 2, "slow", 10, 5, 1200),
    ("sort", 1, "slow", 200, 1, 50),
)


def test_the_table_as_markdown() -> None:
    title, blank, *lines = report.markdown(EXAMPLE).splitlines()
    assert (title, blank) == ("accuracy in %, by difficulty; 220 problems", "")
    assert list(map(cells, lines)) == [
        ["task", "think", "1", "2", "all", "95%", "tokens"],
        ["---", "---", "---:", "---:", "---:", "---:", "---:"],
        ["add", "fast", "100", "0", "50", "29-71", "3.5"],
        ["", "slow", "90", "50", "70", "48-86", "615.0"],
        ["sort", "fast", "99", "", "99", "97-100", "5.0"],
        ["", "slow", "1", "", "1", "0-3", "50.0"],
        ["all", "fast", "99", "0", "95", "91-98", "4.9"],
        ["", "95%", "97-100", "0-28", "", "", ""],
        ["", "slow", "5", "50", "7", "4-11", "101.4"],
        ["", "95%", "2-9", "23-77", "", "", ""],
    ]


def test_one_task_and_no_difficulty_is_one_line_a_mode() -> None:
    found = make(("all", 0, "fast", 3, 3, 1000), ("all", 0, "slow", 3, 0, 131072))
    title, _, *lines = report.markdown(found).splitlines()
    assert title == "accuracy in %; 3 problems"
    assert list(map(cells, lines))[2:] == [
        ["all", "fast", "100", "43-100", "1000"],
        ["", "slow", "0", "0-57", "131072"],
    ]


def test_no_difficulty_beside_others_is_a_dash() -> None:
    found = make(("add", 0, "fast", 1, 1, 1), ("add", 7, "fast", 1, 0, 1))
    assert cells(report.markdown(found).splitlines()[2])[2:4] == ["-", "7"]


def test_many_difficulties_are_ranges() -> None:
    found = make(*(("add", i, "fast", 2, i % 3, 1) for i in range(12)))
    header, _, row, _ = map(cells, report.markdown(found).splitlines()[2:])
    assert header[2:-3] == ["0-1", "2-3", "4-6", "7-8", "9-11"]
    assert row[2:-3] == ["25", "50", "50", "75", "33"][:2] + row[4:-3]
    right = [sum(i % 3 for i in span) for span in ([4, 5, 6], [7, 8], [9, 10, 11])]
    assert row[4:-3] == [str(round(100 * r / n)) for r, n in zip(right, (6, 4, 6), strict=True)]


groups = st.tuples(
    st.sampled_from(TASKS),
    st.integers(0, 99),
    st.sampled_from(MODES),
    st.integers(1, 60),
    st.integers(0, 60),
    st.sampled_from([1, 77, 999, 1000, 131072]),
)


@settings(max_examples=25)
@given(st.lists(groups, min_size=1, max_size=12))
def test_eighty_columns_hold_every_number(said: list[Any]) -> None:
    # Every mode answers every problem.
    said = [(t, d, mode, n, c, k) for t, d, _, n, c, k in said for mode in MODES]
    found = make(*said)
    text = drawn(found)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    numbers = lambda text: re.findall(r"\d[\d.-]*%?", text)
    assert numbers(text) == numbers(re.sub(r"\|.---.*\|\n", "", report.markdown(found)))


def test_a_task_is_no_markup() -> None:
    found = make(("[bold]x", 1, "fast", 1, 1, 1), ("y|z", 1, "fast", 1, 1, 1))
    assert "[bold]x" in drawn(found)
    assert "| y\\|z | fast |" in report.markdown(found)


def test_what_is_shown_where(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    report.show(EXAMPLE)
    out, _ = capsys.readouterr()
    assert out.startswith(report.markdown(EXAMPLE))
    assert out.splitlines()[-2:] == [f"- {line}" for line in report.speeds(EXAMPLE)]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report.show(EXAMPLE)
    out, _ = capsys.readouterr()
    assert "|" not in out
    assert "48-86" in out
    assert "…" not in out


def test_speeds() -> None:
    cut = Answer("add", 1, "fast", "?", "1", "1", "", 512, cut=True)
    speed = (
        Speed("fast", 1000, 2.0, 500, 1.5),
        Speed("slow", 1000, 2.0, 1000, 2.0),
        Speed("auto", 1000, 2.0, 0, 0.0),
    )
    found = Evaluation(score.tally([cut]), speed, (cut,), max_new_tokens=512)
    assert report.speeds(found) == [
        "fast: 1,000 tokens/s without compilation; 1,000 tokens in 2.0 s with it",
        "slow: 500 tokens/s with compilation; 1,000 tokens in 2.0 s",
        "auto: 500 tokens/s; 1,000 tokens in 2.0 s",
        "cut off at 512 tokens, so wrong: fast 1 of 1",
    ]


# --- plots


@pytest.mark.parametrize("name", ["a.png", "a.svg", "A.PNG"])
def test_a_plot_is_a_file_and_repeats(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    begins = {".png": b"\x89PNG", ".svg": b"<?xml"}
    path = tmp_path / name
    plots.check(path)
    assert not path.exists()
    plots.save(report.figure(EXAMPLE), path)
    first = path.read_bytes()
    assert first.startswith(begins[path.suffix.lower()])
    plots.save(report.figure(EXAMPLE), path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [name]


def test_panels_are_tasks_and_bars_are_intervals() -> None:
    pytest.importorskip("matplotlib")
    axes = [axis for axis in report.figure(EXAMPLE).axes if axis.axison]
    assert [axis.get_title() for axis in axes] == ["add", "sort", "all tasks"]
    for axis, task in zip(axes, ("add", "sort", None), strict=True):
        for lines, mode in zip(axis.containers, ("fast", "slow"), strict=True):
            assert lines.get_label() == mode
            mine = [
                s
                for s in EXAMPLE.scores
                if (s.mode, s.task) == (mode, task) and s.difficulty is not None
            ]
            points, _, (bars,) = lines
            assert [round(x) for x in points.get_xdata()] == [s.difficulty for s in mine]
            assert points.get_ydata() == pytest.approx([100 * s.accuracy for s in mine])
            for s, segment in zip(mine, bars.get_segments(), strict=True):
                assert segment[:, 1] / 100 == pytest.approx(s.interval)


def test_odd_names_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["$x", "$\\frac{$", "中文", "<a&b>", "_"]
    found = make(*((name, 1, "fast", 1, 1, 1) for name in names))
    for suffix in plots.SUFFIXES:
        plots.save(report.figure(found), tmp_path / f"odd{suffix}")
    assert [axis.get_title() for axis in report.figure(found).axes][:5] == names
    plots.save(report.figure(make(("all", 0, "fast", 1, 1, 1))), tmp_path / "one.png")


def test_plots_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a.jpg", "a", "png", ".png"):
        with pytest.raises(InputError, match=r"--plot writes \.png or \.svg files"):
            plots.check(tmp_path / name)
    with pytest.raises(InputError, match="no such folder"):
        plots.check(tmp_path / "missing" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="a folder"):
        plots.check(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        plots.check(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="cannot be written"):
        plots.check(tmp_path / f"{'a' * 250}.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"^--loss-plot needs matplotlib: pip install matplotlib"):
        plots.check(tmp_path / "a.png", "--loss-plot")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    files.write(path, b"old")
    (tmp_path / "link").symlink_to("a.json")
    files.write(tmp_path / "link", b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()

    def fail(old: object, new: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"newer")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "link"]
