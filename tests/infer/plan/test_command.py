"""The plan command as users run it: tables, JSON, charts, sweeps, and mistakes in one line."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from infer import __main__ as door
from infer.plan import command

ORACLE = Path(__file__).parent.parent.parent / "oracle"
NANO = ("plan", "--model", "nano", "--context", "64")
MOGE = ("plan", "--model", "nano-moge", "--context", "64")
H2P = ("--layout", "h2p-8", "--target", "cpu:8")


@pytest.fixture(autouse=True)
def _leave_everything_as_it_was() -> Iterator[None]:
    """Planning sets environment variables, and takes JAX's compilation cache away.

    The search for the most sequences that there is room for is a short one here.
    """
    from pangu_jax.plan import advice

    cached = jax.config.jax_enable_compilation_cache
    with mock.patch.dict(os.environ), mock.patch.object(advice, "MOST_SEQUENCES", 16):
        yield
    jax.config.update("jax_enable_compilation_cache", cached)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    code = door.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """The plans of a command that succeeds."""
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"plans"}
    return found["plans"]


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without the rule."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set(row[0]) != {"-"}]


# --- tables


def test_a_table_of_each_program(capsys) -> None:
    code, out, err = run(capsys, *NANO, "--target", "v5e", "--batch", "4", "--formulas")
    assert (code, err) == (0, "")
    decode, prefill = out.split("\n\nPlanned: prefill")
    assert decode.startswith("Planned: decode, nano, single on v5e:1 (TPU v5e), float32, 4 x 1 of")
    assert "4 x 1 of 64 tokens: fits, by formula only" in decode
    assert "1 x 64 tokens: fits, by formula only" in prefill
    for table in (decode, prefill):
        names = [row[0] for row in rows(table)]
        assert {"weights", "cache", "working memory", "in all", "FLOPs"} <= set(names)
        assert {len(row) for row in rows(table)} == {2}
    assert "- room for 15 sequences of 64 tokens" in decode
    assert "room for" not in prefill


def test_columns_are_aligned(capsys) -> None:
    _, out, _ = run(capsys, *MOGE, *H2P, "--formulas", "--phase", "decode")
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    assert {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"} <= {
        row[0] for row in rows(out)
    }


def test_what_does_not_fit_says_so_and_what_to_do(capsys) -> None:
    argv = ("plan", "--model", "pro-moe-72b", "--target", "v5e:8", "--layout", "h2p-8")
    code, out, _ = run(capsys, *argv, "--formulas", "--phase", "decode")
    assert code == 0
    assert "DOES NOT FIT" in out.splitlines()[0]
    assert "- layout tp8: saves 0.75 GiB\n" in out
    assert "room for" not in out


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_only_one_program(capsys, phase: str) -> None:
    (plan,) = as_json(capsys, *NANO, "--target", "v5e", "--formulas", "--phase", phase)
    assert plan["phase"] == phase


def test_a_model_folder(capsys) -> None:
    argv = ("plan", "--model", str(ORACLE / "moge-tiny"), "--context", "16", "--target", "cpu")
    decode, _ = as_json(capsys, *argv, "--formulas", "--dtype", "float32")
    assert decode["model"] == "moge-tiny"
    assert decode["formula"]["weights"] > 0


# --- JSON


def test_json_is_one_object_and_says_that_it_is_planned(capsys) -> None:
    decode, prefill = as_json(capsys, *MOGE, *H2P, "--batch", "3", "--formulas")
    for plan in (decode, prefill):
        assert plan["label"] == "planned"
        assert set(plan) == {
            *("label", "model", "target", "layout", "boundary", "dtype", "quantised"),
            *("phase", "batch"),
            *("context", "memory_bytes", "needed_bytes", "fits", "formula", "refused"),
            *("compiled", "seconds", "bound", "tokens_per_s_at_most", "advice"),
        }
        assert set(plan["formula"]) == {
            *("weights", "cache", "working", "flops", "read", "traffic"),
        }
        parts = [plan["formula"][part] for part in ("weights", "cache", "working")]
        assert plan["needed_bytes"] == sum(parts)
        assert set(plan["seconds"]) == {"compute", "memory", "network"}
        assert plan["seconds"][plan["bound"]] == max(plan["seconds"].values())
        assert plan["compiled"] is plan["refused"] is None
        assert plan["fits"] is True
        assert plan["memory_bytes"] == 4 * 2**30
        assert (plan["model"], plan["target"], plan["layout"]) == ("nano-moge", "cpu:8", "h2p-8")
        assert plan["boundary"] == {"kind": "flashcomm1", "gather": "exact"}
        assert (plan["dtype"], plan["context"]) == ("float32", 64)
    assert (decode["phase"], decode["batch"]) == ("decode", 3)
    assert (prefill["phase"], prefill["batch"]) == ("prefill", 2)  # one for each replica
    slowest = max(decode["seconds"].values())
    assert decode["tokens_per_s_at_most"] == pytest.approx(3 / slowest)
    assert prefill["tokens_per_s_at_most"] == pytest.approx(
        2 * 64 / max(prefill["seconds"].values())
    )


def test_prompts_read_at_a_time(capsys) -> None:
    (plan,) = as_json(capsys, *MOGE, *H2P, "--formulas", "--phase", "prefill", "--prompts", "6")
    assert plan["batch"] == 6


def test_the_published_72b(capsys) -> None:
    argv = ("plan", "--model", "pro-moe-72b", "--target", "h200", "--phase", "prefill")
    (plan,) = as_json(capsys, *argv, "--formulas")
    assert plan["dtype"] == "bfloat16"
    assert plan["formula"]["weights"] == 143_977_562_112
    assert plan["formula"]["cache"] == 2048 * 196_608
    assert plan["memory_bytes"] == 139 * 2**30
    assert plan["fits"] is True


# --- several


SEVERAL = (
    *("--layout", "h2p-8", "--layout", "ep8", "--dtype", "float32", "--dtype", "bfloat16"),
    *("--batch", "8,16,32", "--target", "cpu:8"),
)


def test_several_plans_are_a_row_each(capsys) -> None:
    """Two layouts, two dtypes, three batches; a prefill does not depend on the batch."""
    argv = ("plan", "--model", "nano-moge", "--context", "64", *SEVERAL)
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert "several plans: by formula only" in err
    assert out.startswith("Planned: nano-moge on cpu:8 (virtual CPU device), per device\n")
    head, *found = rows(out)
    assert head[:5] == ["program", "layout", "dtype", "batch", "context"]
    decodes = [tuple(row[1:5]) for row in found if row[0] == "decode"]
    prefills = [tuple(row[1:5]) for row in found if row[0] == "prefill"]
    assert len(decodes) == len(set(decodes)) == 2 * 2 * 3
    assert len(prefills) == len(set(prefills)) == 2 * 2
    assert {row[2] for row in decodes} == {"8", "16", "32"}
    assert len(decodes) + len(prefills) == len(found)


def test_json_of_several(capsys) -> None:
    argv = (*MOGE, *H2P, "--batch", "8,16", "--phase", "decode", "--formulas")
    small, large = as_json(capsys, *argv)
    assert (small["batch"], large["batch"]) == (8, 16)
    assert 2 * small["formula"]["cache"] == large["formula"]["cache"]
    assert small["formula"]["weights"] == large["formula"]["weights"]


def test_a_sweep_says_what_is_too_much(capsys) -> None:
    argv = ("plan", "--model", "pro-moe-72b", "--target", "v5p:2x2x2", "--layout", "h2p-8")
    _, out, _ = run(capsys, *argv, "--phase", "decode", "--batch", "8,256,100000")
    shares = [row[8] for row in rows(out)[1:]]
    assert [share.endswith("TOO MUCH") for share in shares] == [False, False, True]


# --- charts


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_chart(capsys, tmp_path: Path, suffix: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{suffix}"
    argv = (*MOGE, *H2P, "--batch", "8,16", "--plot", str(file))
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert out.startswith("Planned: ")
    assert f"wrote {file}" in err
    data = file.read_bytes()
    assert data.startswith(begin)
    assert list(tmp_path.iterdir()) == [file]
    if suffix == "svg":
        assert b"Planned, not measured" in data
        run(capsys, *argv)
        assert file.read_bytes() == data


# --- mistakes


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that ends with exit code 2."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--layout", "h2p-8"], "layout h2p-8 is for 8 devices; cpu:4 has 4"),
        ([], "layout single is for 1 devices; cpu:4 has 4"),
        (["--layout", "fsdp-h2p-8"], "needs a multiple of 8 devices, not 4"),
        (["--layout", "tp9"], "no layouts configuration named 'tp9'"),
        (["--layout", "h2p-8", "--target", "cpu:8", "--batch", "0"], "--batch must be from 1"),
        (["--target", "cpu", "--batch", "1,99999999999"], "--batch must be from 1"),
        (["--target", "cpu", "--batch", ","], "--batch must be from 1"),
        (["--target", "cpu", "--batch", "x"], "'x' is not N,N,..."),
        (["--target", "cpu", "--context", "0"], "--context must be from 1"),
        (["--target", "cpu", "--context", "64,1025"], "the model has only 1024 positions"),
        (["--target", "cpu", "--prompts", "0"], "--prompts must be from 1"),
        (["--target", "cpu", "--dtype", "int8"], "dtype must be one of float32, bfloat16"),
        (["--target", "cpu", "--form", "flat"], "'flat' is not one of separate, stacked"),
        (["--target", "cpu", "--phase", "train"], "'train' is not one of decode, prefill"),
        (["--target", "v9:8"], "no targets configuration named 'v9'"),
        (["--target", "v5p:two"], "no targets configuration named 'v5p:two'"),
        (["--target", "v5p:0"], "a target's size is such as 8, 4x4 or 2x2x2"),
        (["--target", "cpu", "--model", "mano"], "no models configuration named 'mano'"),
        (["--target", "cpu", "--modle", "nano"], "did you mean --model?"),
        (["--target", "cpu:8", "--layout", "tp8"], "8 ranks) cannot split 4 query and 2 key/value"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv: list[str], complaint: str) -> None:
    base = ("--model", "nano-moge", "--context", "64", "--target", "cpu:4")
    assert complaint in mistake(capsys, "plan", *base, *argv)


def test_what_must_be_given(capsys) -> None:
    assert "arguments are required: --target" in mistake(capsys, "plan", "--model", "nano")


def test_a_damaged_model_file(capsys, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("vocab_size = -1\n")
    argv = ("plan", "--model", str(file), "--target", "cpu")
    assert mistake(capsys, *argv).startswith(str(file))
    assert "config.json" in mistake(capsys, "plan", "--model", str(tmp_path), "--target", "cpu")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("plan.pdf", "--plot writes .png or .svg files"),
        ("none/plan.png", "no such folder"),
        (".", "--plot writes"),
        ("folder.png", "a folder"),
    ],
)
def test_a_chart_that_cannot_be_written(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    """Which is said before anything is planned."""
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(command, "prepare", lambda target: pytest.fail("planned"))
    file = tmp_path / name
    assert complaint in mistake(capsys, *NANO, "--target", "cpu", "--plot", str(file))


# --- compilers


@pytest.mark.parametrize(("name", "extra"), [("v5p", "tpu"), ("h200", "gpu")])
def test_without_the_compiler_there_are_the_formulas(
    capsys, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    from infer.plan import programs

    if find_spec("libtpu" if extra == "tpu" else "jax_cuda13_plugin"):
        pytest.skip("it is installed here")
    argv = (*NANO, "--target", name, "--phase", "prefill")
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert (f"the compiler for {name}:1 is not installed here (pangu-jax[{extra}])") in err
    assert "planned by formula only" in err
    assert "fits, by formula only" in out
    monkeypatch.setattr(programs, "lower", lambda plan, form: pytest.fail("asked again"))
    _, formulas, err = run(capsys, *argv, "--formulas")
    assert (formulas, err) == (out, "")


def fail(message: str) -> Any:
    """What XLA does with a program that it does not like."""

    def lower(plan: Any, form: Any) -> Any:
        raise RuntimeError(message)

    return lower


def test_a_program_that_is_too_much_for_the_compiler(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infer.plan import programs

    monkeypatch.setattr(programs, "lower", fail("RESOURCE_EXHAUSTED: Used 20G\n of 16G hbm"))
    argv = (*NANO, "--target", "v5e", "--phase", "decode", "--batch", "2")
    (plan,) = as_json(capsys, *argv)
    assert plan["fits"] is False
    assert plan["refused"] == "RESOURCE_EXHAUSTED: Used 20G of 16G hbm"
    assert plan["advice"]
    assert not any("fits" in line for line in plan["advice"])
    _, out, _ = run(capsys, *argv)
    assert "DOES NOT FIT" in out
    assert "- the compiler: RESOURCE_EXHAUSTED" in out


def test_a_program_that_does_not_compile(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from infer.plan import programs

    monkeypatch.setattr(programs, "lower", fail("INTERNAL: Mosaic\nfailed"))
    code, out, err = run(capsys, *NANO, "--target", "v5e")
    assert (code, out) == (2, "")
    line = "error: v5e:1: the program does not compile (INTERNAL: Mosaic failed)"
    assert err.splitlines()[-1] == line


def test_a_compiled_plan_of_one_device(capsys, tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(
        "vocab_size = 64\nhidden_size = 16\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"
        "head_dim = 8\nintermediate_size = 24\nrope_theta = 1e4\nmax_positions = 64\n"
    )
    argv = ("plan", "--model", str(file), "--target", "cpu", "--context", "32", "--batch", "4")
    (plan,) = as_json(capsys, *argv, "--dtype", "float32", "--phase", "decode")
    made = plan["compiled"]
    assert plan["model"] == "tiny"
    assert made["compile_s"] > 0
    assert plan["needed_bytes"] == made["resident"] + made["temporary"]
    assert made["collectives"] == plan["formula"]["traffic"] == {}
    assert made["buffers"]
    held = plan["formula"]["weights"] + plan["formula"]["cache"]
    assert held <= made["resident"] < held + 20_000


@pytest.mark.slow
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_a_compiled_plan_of_eight_devices(capsys, form: str) -> None:
    """Collectives are the formula's; a decode step asks once whether any sequence goes on."""
    argv = (*MOGE, *H2P, "--batch", "8", "--form", form)
    decode, prefill = as_json(capsys, *argv)
    assert decode["formula"]["traffic"].pop("all-reduce") == {"count": 1, "bytes": 4}
    assert decode["compiled"]["collectives"].pop("all-reduce") == {"count": 1, "bytes": 4}
    for plan in (decode, prefill):
        found = plan["compiled"]["collectives"]
        assert set(found) == {"all-gather", "reduce-scatter", "all-to-all"}
        assert found == plan["formula"]["traffic"]
        held = plan["formula"]["weights"] + plan["formula"]["cache"]
        assert held <= plan["compiled"]["resident"] < 1.02 * held


# --- what planning leaves behind


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "mine")
    monkeypatch.delenv("TPU_STDERR_LOG_LEVEL", raising=False)
    run(capsys, *NANO, "--target", "v5e", "--formulas")
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "mine"
    assert os.environ["TPU_STDERR_LOG_LEVEL"] == "3"
    assert jax.config.jax_enable_compilation_cache is False
