"""The plan command of training: a step of the nano run on machines that are not here."""

import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

import pangu_jax
from infer.plan import command as plans
from pangu_jax.plan import target as targets
from train import __main__ as door
from train import config as configs
from train import plan

ORACLE = Path(__file__).parent.parent / "oracle"
WEIGHTS = 4 * pangu_jax.preset("nano").num_parameters
TOML = """
vocab_size = 64
hidden_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 8
intermediate_size = 24
rope_theta = 1e4
max_positions = 64
dtype = "float32"
"""


@pytest.fixture(autouse=True)
def _leave_everything_as_it_was() -> Iterator[None]:
    """Planning sets environment variables, and takes JAX's compilation cache away."""
    cached = jax.config.jax_enable_compilation_cache
    with mock.patch.dict(os.environ):
        yield
    jax.config.update("jax_enable_compilation_cache", cached)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """`plan nano ...` in this process: exit code, stdout, stderr."""
    code = door.main(["plan", "nano", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The one plan of a command that succeeds."""
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"plans"}
    (one,) = found["plans"]
    return one


def test_a_table_by_formula(capsys) -> None:
    code, out, err = run(capsys, "--target", "v5e", "--formulas")
    assert (code, err) == (0, "")
    title = "Planned: train, nano, single on v5e:1 (TPU v5e), float32, 8 x 128 tokens: fits, "
    assert out.startswith(f"{title}by formula only\n")
    assert "| weights, gradients, moments |" in out
    assert "| cache " not in out
    assert "room for" not in out


def test_json_by_formula(capsys) -> None:
    one = as_json(capsys, "--target", "v5e", "--formulas")
    assert (one["label"], one["phase"], one["model"]) == ("planned", "train", "nano")
    assert (one["layout"], one["dtype"]) == ("single", "float32")
    assert (one["batch"], one["context"]) == (8, 128)
    assert one["formula"]["weights"] == 4 * WEIGHTS
    assert one["formula"]["cache"] == 0
    assert one["formula"]["traffic"] == {}
    assert one["compiled"] is None
    assert one["tokens_per_s_at_most"] == pytest.approx(8 * 128 / max(one["seconds"].values()))


def test_fields_of_the_run_are_flags(capsys) -> None:
    flags = ("--data.batch", "16", "--data.length", "256", "--model.preset", "nano-moge")
    one = as_json(capsys, "--target", "v5e", "--formulas", *flags, "--model.tokenizer", "nano")
    assert (one["model"], one["batch"], one["context"]) == ("nano-moge", 16, 256)


def test_fsdp_keeps_parts_of_weights(capsys) -> None:
    """An eighth of every matrix, as all of nano's sizes can be split; norms and biases whole."""
    flags = ("--target", "cpu:8", "--model.layout", "fsdp", "--formulas")
    one = as_json(capsys, *flags)
    config = pangu_jax.preset("nano")
    D, H = config.hidden_size, config.head_dim
    fused = (config.num_heads + 2 * config.num_kv_heads) * H
    vectors = config.num_layers * (3 * D + fused) + D
    matrices = config.num_parameters - vectors
    assert one["formula"]["weights"] == 4 * 4 * (matrices // 8 + vectors)
    kinds = {"all-gather", "all-to-all", "all-reduce"}  # the last for the loss alone
    assert set(one["formula"]["traffic"]) == kinds


def test_a_model_folder(capsys) -> None:
    folder = ORACLE / "dense-tiny"
    flags = ("--model.path", str(folder), "--data.length", "16", "--target", "cpu", "--formulas")
    assert as_json(capsys, *flags)["model"] == "dense-tiny"


def test_what_does_not_fit_says_so_and_what_to_do(capsys) -> None:
    flags = ("--model.preset", "embedded-7b", "--model.tokenizer", "nano", "--data.length", "4096")
    code, out, _ = run(capsys, "--target", "v5e:8", "--model.layout", "fsdp", "--formulas", *flags)
    assert code == 0
    assert "DOES NOT FIT" in out.splitlines()[0]
    assert "- 16 devices (mesh.data = 16): saves" in out
    assert "- 4 sequences instead of 8: saves" not in out  # each device has one in any case
    assert "- bfloat16 instead of float32: saves" in out


def test_a_chart(capsys, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.svg"
    code, _, err = run(capsys, "--target", "v5e", "--formulas", "--plot", str(file))
    assert code == 0
    assert f"wrote {file}" in err
    assert file.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--target", "cpu:4"], "for 1 devices; cpu:4 has 4: choose another --model.layout, such"),
        (["--target", "cpu:4", "--model.layout", "h2p-8"], "layout h2p-8 is for 8 devices; cpu:4"),
        (["--target", "cpu:12", "--model.layout", "fsdp-h2p-8"], "a multiple of 8 devices, not 12"),
        (["--target", "cpu:3", "--model.layout", "fsdp"], "cannot split a hidden size of 128"),
        (["--target", "cpu:8", "--model.layout", "tp8"], "8 ranks) cannot split 4 query and 2"),
        (["--target", "cpu", "--model.layout", "tp9"], "no layouts configuration named 'tp9'"),
        (["--target", "v9"], "no targets configuration named 'v9'"),
        (["--target", "cpu", "--data.length", "1025"], "the model has only 1024 positions"),
        (["--target", "cpu", "--data.batch", "0"], "batch must be at least 1"),
        (["--target", "cpu", "--model.preset", "mano"], "no models configuration named 'mano'"),
        (["--target", "cpu", "--model.path", "/nowhere"], "/nowhere"),
        (["--target", "cpu", "--optimizer.freeze", "nothing.*"], "nothing.*"),
        (["--target", "cpu", "--model.lay", "fsdp"], "unknown option '--model.lay'"),
        (["--target", "cpu", "--plot", "plan.pdf"], "--plot writes .png or .svg files"),
        (["--target", "cpu", "--plot", "none/plan.svg"], "no such folder"),
        (["--formulas"], "arguments are required: --target"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv: list[str], complaint: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert complaint in line
    assert err.count("error: ") == 1


def test_an_unknown_run(capsys) -> None:
    assert door.main(["plan", "mano", "--target", "cpu"]) == 2
    assert "no train configuration named 'mano'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "plugin"), [("v5p", "libtpu"), ("h200", "jax_cuda13_plugin")])
def test_without_the_compiler_there_are_the_formulas(capsys, name: str, plugin: str) -> None:
    if find_spec(plugin):
        pytest.skip("it is installed here")
    code, out, err = run(capsys, "--target", name)
    assert code == 0
    assert f"the compiler for {name}:1 is not installed here" in err
    assert "planned by formula only" in err
    assert "fits, by formula only" in out


def test_the_data_are_not_read(capsys, tmp_path: Path) -> None:
    flags = ("--data.path", str(tmp_path / "none.jsonl"), "--run.output", str(tmp_path / "run"))
    as_json(capsys, "--target", "v5e", "--formulas", *flags)
    assert list(tmp_path.iterdir()) == []


# --- phases, and how a step is computed


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run of a model of two layers."""
    (tmp_path / "tiny.toml").write_text(TOML)
    run = tmp_path / "run.toml"
    run.write_text(
        f"""
[model]
preset = "{tmp_path / "tiny.toml"}"
tokenizer = "nano"
[data]
path = "none.jsonl"
length = 16
batch = 4
[run]
output = "none"
steps = 30
[optimizer]
warmup_steps = 1
"""
    )
    return run


def of_file(capsys: pytest.CaptureFixture[str], file: Path, *argv: str) -> dict[str, Any]:
    assert door.main(["plan", str(file), "--target", "cpu", "--formulas", "--json", *argv]) == 0
    (one,) = json.loads(capsys.readouterr().out)["plans"]
    return one


@pytest.mark.parametrize(
    ("phases", "batch", "length"),
    [
        (["", "batch = 3"], 4, 16),
        (["", "batch = 9"], 9, 16),
        (["batch = 9", "length = 64", "length = 48"], 4, 64),
        (["length = 64\nbatch = 1", "length = 32\nbatch = 2"], 1, 64),
        (["length = 32\nbatch = 2", "length = 64\nbatch = 1"], 1, 64),
        (["length = 8\nbatch = 9", "length = 64\nbatch = 1"], 9, 8),
    ],
)
def test_the_largest_phase_is_planned(
    capsys, tiny: Path, phases: list[str], batch: int, length: int
) -> None:
    """Most tokens in a step; of as many tokens the longest rows, whose scores take more."""
    steps = [30 - len(phases) + 1, *[1] * (len(phases) - 1)]
    tables = [f"[[phase]]\nsteps = {n}\n{own}\n" for n, own in zip(steps, phases, strict=True)]
    tiny.write_text(tiny.read_text() + "".join(tables))
    one = of_file(capsys, tiny)
    assert (one["batch"], one["context"]) == (batch, length)


def test_no_phase_is_longer_than_the_model(capsys, tiny: Path) -> None:
    """Not even one whose batches are small."""
    phases = "[[phase]]\nsteps = 29\n[[phase]]\nsteps = 1\nbatch = 1\nlength = 65\n"
    tiny.write_text(tiny.read_text().replace("batch = 4", "batch = 400") + phases)
    assert door.main(["plan", str(tiny), "--target", "cpu", "--formulas"]) == 2
    assert capsys.readouterr().err == "error: data.length: the model has only 64 positions\n"


SIZES = {
    "embed": 64 * 16,
    "head": 64 * 16,
    "norms": 5 * 16,
    "biases": 2 * (2 * 2 * 8 + 16),
    "qkv": 2 * 4 * 8 * 16,
    "out": 2 * 16 * 16,
    "mlp": 2 * 3 * 24 * 16,
}
MATRICES = SIZES["qkv"] + SIZES["out"] + SIZES["mlp"]
WHOLE = sum(SIZES.values())


@pytest.mark.parametrize(
    ("flags", "held"),
    [
        ({}, 3 * WHOLE),
        ({"optimizer": {"ema": 0.99}}, 4 * WHOLE),
        ({"optimizer": {"name": "muon"}}, 3 * WHOLE - MATRICES + 3),
        ({"optimizer": {"freeze": ("embed",)}}, 3 * WHOLE - 2 * SIZES["embed"]),
        ({"step": {"compute": "bfloat16"}}, 3 * WHOLE),
        ({"step": {"accumulate": 3, "z_loss": 0.1, "balance": 0.1}}, 3 * WHOLE),
        ({"step": {"remat": "full"}}, 3 * WHOLE),
        ({"step": {"remat": "dots"}}, 3 * WHOLE),
    ],
    ids=str,
)
def test_every_kind_of_step_is_lowered(tiny: Path, flags: dict[str, Any], held: int) -> None:
    """It holds weights and moments in float32, and gives back what it took."""
    config = configs.load(str(tiny), flags)
    lowered = plan.lower(config, plan.of(config, targets.load("cpu")))
    state, batch = lowered.args_info[0]
    assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(4, 16)}
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == "float32"]
    assert sum(math.prod(leaf.shape) for leaf in floats) == held
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    after, _ = lowered.out_info
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [
        leaf.shape for leaf in jax.tree.leaves(state)
    ]
    low = flags.get("step", {}).get("compute") == "bfloat16"
    assert ("bf16" in lowered.as_text()) == low


def test_parts_and_what_is_computed_again(capsys, tiny: Path) -> None:
    """Less working memory: of one part of four rows, and without what is made again."""
    plain = of_file(capsys, tiny)["formula"]
    parts = of_file(capsys, tiny, "--step.accumulate=4")["formula"]
    assert parts["working"] == of_file(capsys, tiny, "--data.batch=1")["formula"]["working"]
    assert parts["weights"] == plain["weights"] + 4 * WHOLE  # a gradient, and the sum of all
    again = of_file(capsys, tiny, "--step.remat=full")["formula"]
    assert again["working"] < plain["working"]
    assert again["flops"] == pytest.approx(plain["flops"] * 4 / 3)


def test_products_of_bfloat16_are_faster_and_masters_as_large(capsys) -> None:
    plain = as_json(capsys, "--target", "v5e", "--formulas")
    low = as_json(capsys, "--target", "v5e", "--formulas", "--step.compute", "bfloat16")
    flops = plain["formula"]["flops"]
    assert low["formula"]["flops"] == flops
    assert plain["seconds"]["compute"] == pytest.approx(flops / 32.8e12)
    assert low["seconds"]["compute"] == pytest.approx(flops / 197e12)
    assert (plain["dtype"], low["dtype"]) == ("float32", "bfloat16")
    assert plain["formula"]["weights"] == 4 * WEIGHTS
    assert low["formula"]["weights"] >= 4 * WEIGHTS
    assert low["formula"]["working"] < plain["formula"]["working"]


def test_a_running_mean_is_held_too(capsys) -> None:
    one = as_json(capsys, "--target", "v5e", "--formulas", "--optimizer.ema=0.99")
    assert one["formula"]["weights"] == 5 * WEIGHTS


def held(capsys, tiny: Path, *flags: str) -> int:
    return of_file(capsys, tiny, *flags)["formula"]["weights"]


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ((), 4 * WHOLE),
        (("--optimizer.ema=0.9",), 5 * WHOLE),
        (("--optimizer.name=muon",), 4 * WHOLE - MATRICES + 3),  # three coefficients
        (("--optimizer.freeze", "embed"), 4 * WHOLE - 3 * SIZES["embed"]),
    ],
    ids=str,
)
def test_what_is_kept_of_every_weight(capsys, tiny: Path, flags: tuple, numbers: int) -> None:
    """Gradient and moments: one of Muon's, none of what is frozen."""
    assert held(capsys, tiny, *flags) == pytest.approx(4 * numbers, abs=4)


def beside(capsys, tiny: Path, *flags: str) -> dict[str, Any]:
    """The plan of adapters beside the tiny model."""
    return of_file(capsys, tiny, f"--model.path={tiny.parent / 'tiny.toml'}", *flags)


def adapters(rank: int, *matrices: tuple[int, int]) -> int:
    """Numbers of both layers' adapters beside matrices of so many rows and columns."""
    return 2 * sum(rank * (rows + columns) for rows, columns in matrices)


EVERY = ((32, 16), (16, 16), (48, 16), (16, 24))


@pytest.mark.parametrize(
    ("flags", "base", "trained"),
    [
        (("--lora.rank=2",), 4 * WHOLE, 4 * 4 * adapters(2, *EVERY)),
        (("--lora.rank=2", "--optimizer.ema=0.9"), 4 * WHOLE, 5 * 4 * adapters(2, *EVERY)),
        (("--lora.rank=2", "--optimizer.name=muon"), 4 * WHOLE, 12 * (adapters(2, *EVERY) + 1)),
        (("--lora.rank=3", "--lora.targets", "mlp.*"), 4 * WHOLE, 16 * adapters(3, *EVERY[2:])),
        (
            ("--lora.rank=2", "--lora.base=w8a16"),
            4 * (WHOLE - MATRICES) + MATRICES + 4 * 2 * (32 + 16 + 48 + 16),
            4 * 4 * adapters(2, *EVERY),
        ),
        (  # a copy of the base in what is multiplied, and of adapters with a gradient
            ("--lora.rank=2", "--step.compute=bfloat16"),
            (4 + 2) * WHOLE,
            (4 * 4 + 2 * 2) * adapters(2, *EVERY),
        ),
    ],
    ids=str,
)
def test_adapters_beside_a_base(capsys, tiny: Path, flags: tuple, base: int, trained: int) -> None:
    """The base once, in as many bits as it has."""
    assert beside(capsys, tiny, *flags)["formula"]["weights"] == base + trained


def test_adapters_take_two_passes_of_three(capsys, tiny: Path) -> None:
    """Nothing is computed for the gradient of a base."""
    whole, part = of_file(capsys, tiny), beside(capsys, tiny, "--lora.rank=2")
    assert part["formula"]["flops"] == pytest.approx(whole["formula"]["flops"] * 2 / 3)


def test_a_base_in_its_own_dtype(capsys) -> None:
    flags = ("--model.path", str(ORACLE / "dense-tiny"), "--data.length", "16")
    flags += ("--lora.rank", "2", "--step.compute", "float32")
    one = as_json(capsys, "--target", "cpu", "--formulas", *flags)
    assert one["adapters"] == {"rank": 2, "targets": [], "base": "float32"}
    assert one["quantised"] is None


def test_fewer_bits_are_advised_for_a_base(capsys) -> None:
    flags = ("--model.path", "embedded-7b", "--lora.rank", "16", "--step.compute", "bfloat16")
    code, out, _ = run(capsys, "--target", "v5e", "--formulas", *flags)
    assert code == 0
    assert "bfloat16, LoRA of rank 16, 8 x 128 tokens: DOES NOT FIT" in out.splitlines()[0]
    assert "- int8 weights (lora.base w8a16): saves" in out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--lora.base=w8a16",)], ids=["float", "int8"])
def test_a_step_of_adapters_is_compiled(capsys, tiny: Path, flags: tuple) -> None:
    """It holds what the formula says, but for gradients, which are temporary."""
    more = ("--lora.rank=2", *flags)
    formula = beside(capsys, tiny, *more)["formula"]["weights"] - 4 * adapters(2, *EVERY)
    more += (f"--model.path={tiny.parent / 'tiny.toml'}",)
    assert door.main(["plan", str(tiny), "--target", "cpu", "--json", *more]) == 0
    (one,) = json.loads(capsys.readouterr().out)["plans"]
    assert formula <= one["compiled"]["resident"] < formula + 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_all_of_it_is_compiled_for_eight_devices(capsys, name: str) -> None:
    """Moments and means lie with their weights, whatever optimizer they are of."""
    flags = ("--model.preset", name, "--model.tokenizer", "nano", "--model.layout", "fsdp")
    more = ("--step.compute", "bfloat16", "--step.accumulate", "2", "--step.remat", "dots")
    more += ("--optimizer.ema=0.99", "--step.z_loss=1e-4", "--step.balance=0.01")
    plain = as_json(capsys, "--target", "cpu:8", *flags, *more)
    muon = as_json(capsys, "--target", "cpu:8", *flags, *more, "--optimizer.name=muon")
    formula = as_json(capsys, "--target", "cpu:8", *flags, "--formulas")["formula"]
    held = formula["weights"] / 4  # that is weights, gradients and two moments
    assert 4 * held <= plain["compiled"]["resident"] < 4.2 * held
    assert 3 * held <= muon["compiled"]["resident"] < 4 * held


@pytest.mark.slow
def test_a_step_is_compiled(capsys, tmp_path: Path) -> None:
    """With gradients that are still there when moments and weights are made anew."""
    file = tmp_path / "tiny.toml"
    file.write_text(TOML)
    flags = ("--model.preset", str(file), "--model.tokenizer", "nano", "--data.length", "16")
    one = as_json(capsys, "--target", "cpu", *flags)
    made, held = one["compiled"], one["formula"]["weights"]
    assert one["model"] == "tiny"
    assert made["compile_s"] > 0
    assert made["collectives"] == {}
    # Weights and two moments; gradients are temporary.
    assert 3 * held / 4 <= made["resident"] < 3 * held / 4 + 10_000
    assert made["temporary"] >= held / 4
    assert one["needed_bytes"] == made["resident"] + made["temporary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-moge"])
def test_a_step_is_compiled_for_eight_devices(capsys, name: str) -> None:
    flags = ("--model.preset", name, "--model.tokenizer", "nano", "--model.layout", "fsdp")
    one = as_json(capsys, "--target", "cpu:8", *flags)
    made, formula = one["compiled"], one["formula"]
    assert 3 * formula["weights"] / 4 <= made["resident"] < 0.8 * formula["weights"]
    # Weights are gathered again for the backward pass, and gradients are scattered.
    assert made["collectives"]["all-gather"]["bytes"] > formula["traffic"]["all-gather"]["bytes"]
    assert made["collectives"]["reduce-scatter"]["bytes"] > 0


def test_nothing_is_compiled_where_only_formulas_are_wanted(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "lower", lambda config, plan: pytest.fail("lowered"))
    monkeypatch.setattr(plans, "compiled", lambda plan, lower: pytest.fail("compiled"))
    assert as_json(capsys, "--target", "cpu", "--formulas")["compiled"] is None
