"""`quantize`: the folders it writes, as an independent reader and the other commands see them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infer
import pangu_jax
from infer import __main__ as door
from infer.door import INTERRUPTED
from infer.sampling import Sampling
from pangu_jax.checkpoint import safetensors
from tests import folders, quantised_reader, reference
from tests.pangu_jax.checkpoint.test_load import check_message
from tests.pangu_jax.checkpoint.test_quantised import both
from tests.quantised_reader import Folder, Tensors

ORACLE = Path(__file__).parent.parent / "oracle"
WEIGHTS = "model.safetensors"
GROUPS = {"dense-tiny": 32, "moge-tiny": 8}  # the largest that divide every width
KINDS = {"w8a8": "int8", "w8a16": "int8", "w4a16": "int4", "fp8": "fp8"}
INPUTS = {"w8a8": "int8", "w8a16": "float", "w4a16": "float", "fp8": "fp8"}


def quantize(source: Path, target: Path, *flags: str) -> int:
    return door.main(["quantize", "--model", str(source), "--output", str(target), *flags])


def refuse(capsys: pytest.CaptureFixture[str], argv: list[Any], *words: str) -> str:
    """The one line with which a command line is refused."""
    assert door.main([str(item) for item in argv]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    check_message(error.removesuffix("\n"))
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    return error


# --- what is written ----------------------------------------------------------------------------


@dataclasses.dataclass
class Made:
    """A folder that the command wrote, its float source, and what the independent reader says."""

    family: str
    recipe: str
    home: Path
    read: Folder
    source: Tensors
    tokens: list[int]


CASES = [
    ("dense-tiny", "w8a8", "compressed-tensors"),
    ("dense-tiny", "w8a16", "compressed-tensors"),
    ("dense-tiny", "w4a16", "compressed-tensors"),
    ("dense-tiny", "fp8", "compressed-tensors"),
    ("dense-tiny", "w8a8", "msmodelslim"),
    ("moge-tiny", "w8a8", "compressed-tensors"),
    ("moge-tiny", "w4a16", "compressed-tensors"),
]
SLOW_CASES = [
    ("moge-tiny", "w8a16", "compressed-tensors"),
    ("moge-tiny", "fp8", "compressed-tensors"),
    ("moge-tiny", "w8a8", "msmodelslim"),
]


@pytest.fixture(scope="module", params=both(CASES, SLOW_CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, recipe, how = request.param
    home = tmp_path_factory.mktemp(f"{family}-{recipe}") / "made"
    source = ORACLE / family
    assert quantize(source, home, "--recipe", recipe, "--format", how) == 0
    tokens = np.load(source / "expected.npz")["prompt_1_input_ids"].tolist()
    read = quantised_reader.read(home)
    return Made(family, recipe, home, read, quantised_reader.stored(source), tokens)


def test_numbers_and_scales_are_the_source_rounded(made: Made) -> None:
    """By NumPy, bit for bit; what is not a matrix of a layer is as it was."""
    layers = [name for name in made.source if ".layers." in name and name.endswith("_proj.weight")]
    assert sorted(made.read.matrices) == sorted(name.removesuffix(".weight") for name in layers)
    group = GROUPS[made.family] if made.recipe == "w4a16" else None
    for module, matrix in made.read.matrices.items():
        floats = made.source[f"{module}.weight"]
        numbers, scale = quantised_reader.rounded(floats, KINDS[made.recipe], group)
        assert matrix.inputs == INPUTS[made.recipe]
        np.testing.assert_array_equal(matrix.numbers, numbers.astype(np.float64), err_msg=module)
        np.testing.assert_array_equal(matrix.scale, scale, err_msg=module)
    for name in set(made.source) - set(layers):
        assert made.read.tensors[name].dtype == made.source[name].dtype
        assert made.read.tensors[name].tobytes() == made.source[name].tobytes(), name


def test_there_is_no_other_tensor(made: Made) -> None:
    suffixes = ["weight", "weight_scale"]
    if made.recipe == "w4a16":
        suffixes = ["weight_packed", "weight_scale", "weight_shape"]
    elif "quantization_config" not in made.read.raw:
        suffixes.append("weight_offset")
    wanted = {f"{module}.{suffix}" for module in made.read.matrices for suffix in suffixes}
    floats = {n for n in made.source if n.removesuffix(".weight") not in made.read.matrices}
    assert set(made.read.tensors) == wanted | floats
    if made.recipe == "w4a16":
        for module in made.read.matrices:
            shape = made.read.tensors[f"{module}.weight_shape"]
            assert tuple(shape) == made.source[f"{module}.weight"].shape


def test_the_errors_of_rounding_are_half_a_scale(made: Made) -> None:
    for module, matrix in made.read.matrices.items():
        floats = made.source[f"{module}.weight"].astype(np.float64)
        out, groups = matrix.scale.shape
        error = np.abs(matrix.floats() - floats).reshape(out, groups, -1)
        if made.recipe == "fp8":
            limit = np.maximum(np.abs(floats) / 16, matrix.scale / 1024).reshape(error.shape)
        else:
            limit = np.broadcast_to(matrix.scale[..., None] / 2, error.shape)
        assert (error <= limit * (1 + 1e-5)).all(), module


def test_logits_are_those_of_the_reader(made: Made) -> None:
    """Weight-only ones those of a float model; with rounded activations a token may tie, and its
    rounding fall the other way.
    """
    found = np.asarray(pangu_jax.load(made.home)(np.array([made.tokens])))[0]
    floats = reference.forward(made.read.floats(), made.read.raw, made.tokens)["logits"]
    largest = np.abs(floats).max()
    if INPUTS[made.recipe] == "float":
        assert np.abs(found - floats).max() < 1e-4 * largest
        return
    error = np.abs(found - made.read.logits(made.tokens)).max(-1)
    assert np.median(error) < 1e-4 * largest
    assert error.max() < 0.02 * largest
    rounding = {"w8a8": 0.05, "fp8": 0.1 if made.family == "dense-tiny" else 0.25}
    assert np.sqrt(((found - floats) ** 2).mean() / (floats**2).mean()) < rounding[made.recipe]


def test_what_the_folder_says(made: Made) -> None:
    source = json.loads((ORACLE / made.family / "config.json").read_text())
    raw = {**made.read.raw, "auto_map": source["auto_map"]}
    said = raw.pop("quantization_config", None)
    assert {name: raw.get(name) for name in source} == source
    assert (made.home / "generation_config.json").read_bytes() == (
        ORACLE / made.family / "generation_config.json"
    ).read_bytes()
    file = made.home / "quant_model_description.json"
    if said is None:
        listed = json.loads(file.read_text())
        assert set(listed) - {"model_quant_type"} == set(made.read.tensors)
    else:
        packings = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
        assert said["format"] == packings[KINDS[made.recipe]]
        assert not file.exists()
    assert [path.name for path in made.home.parent.iterdir()] == ["made"]


def test_check_finds_nothing_wrong(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["check", "--model", str(made.home), "--skip-run"]) == 0
    out = capsys.readouterr().out
    kind = {"int8": "I8", "int4": "I32", "fp8": "F8_E4M3"}[KINDS[made.recipe]]
    assert kind in out
    assert "FAIL" not in out


def test_the_line_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "a"
    assert quantize(ORACLE / "dense-tiny", home) == 0
    out, error = capsys.readouterr()
    assert error == ""
    (line,) = out.splitlines()
    assert line.startswith(f"{home}: w8a8 (compressed-tensors)")
    tensors = quantised_reader.stored(home)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    assert f"{size:,.1f} MB of" in line


def test_a_float_source_in_bfloat16(tmp_path: Path) -> None:
    """Scales are those of the bfloat16 numbers, in float32."""
    source = folders.write(tmp_path / "a", folders.DENSE, dtype="bfloat16")
    assert quantize(tmp_path / "a", tmp_path / "b", "--recipe", "w4a16") == 0
    found = quantised_reader.read(tmp_path / "b")
    for module, matrix in found.matrices.items():
        numbers, scale = quantised_reader.rounded(source[f"{module}.weight"], "int4", 16)
        np.testing.assert_array_equal(matrix.numbers, numbers)
        np.testing.assert_array_equal(matrix.scale, scale)
        assert found.tensors[f"{module}.weight_scale"].dtype == np.float32


def test_generate_takes_the_likeliest_token_of_the_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(ORACLE / "dense-tiny", tmp_path / "a", "--recipe", "w4a16") == 0
    capsys.readouterr()
    prompt = [1, 5, 9, 300]
    flags = ["--temperature", "0", "--max-new-tokens", "5", "--ignore-eos", "--json"]
    ids = ",".join(map(str, prompt))
    argv = ["generate", "--model", str(tmp_path / "a"), "--prompt-ids", ids, *flags]
    assert door.main(argv) == 0
    (completion,) = json.loads(capsys.readouterr().out)["completions"]
    tokens = completion["token_ids"]
    read = quantised_reader.read(tmp_path / "a")
    logits = reference.forward(read.floats(), read.raw, prompt + tokens)["logits"]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


# --- a calibrated folder with an int8 cache -----------------------------------------------------


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """msModelSlim's W8A8 with C8, of the tests' own making."""
    home, source = tmp_path_factory.mktemp("static"), ORACLE / "dense-tiny"
    raw = json.loads((source / "config.json").read_text())
    tokens = np.load(source / "expected.npz")["prompt_3_input_ids"].tolist()
    quantised_reader.write_static(home, raw, quantised_reader.stored(source), tokens)
    return home


@pytest.mark.parametrize("form", ["separate", pytest.param("stacked", marks=pytest.mark.slow)])
def test_generation_with_an_int8_cache_of_fixed_scales(static: Path, form: Any) -> None:
    """Log-probabilities of a NumPy pass whose keys and values are rounded as the cache's are."""
    prompt = np.load(ORACLE / "dense-tiny" / "expected.npz")["prompt_1_input_ids"].tolist()
    greedy = Sampling(max_new_tokens=6, ignore_eos=True)
    (found,) = infer.generate(pangu_jax.load(static, form=form), [prompt], greedy)
    read = quantised_reader.read(static)
    error = {}
    for cached in (True, False):
        logits = read.logits(prompt + found.token_ids, cached)[len(prompt) - 1 : -1]
        z = logits - logits.max(-1, keepdims=True)
        logprobs = z - np.log(np.exp(z).sum(-1, keepdims=True))
        own = logprobs[np.arange(len(logprobs)), found.token_ids]
        error[cached] = np.abs(own - found.logprobs)
    assert np.median(error[True]) < 1e-3
    assert error[True].max() < 0.05
    assert np.median(error[True]) < 0.1 * np.median(error[False])  # the cache's rounding is seen


def test_check_of_a_static_folder(static: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["check", "--model", str(static), "--skip-run"]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_check_of_a_symmetric_static_folder(
    static: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets and integer biases that are all zero are sound."""
    tensors = dict(quantised_reader.stored(static))
    for name, tensor in tensors.items():
        if name.endswith(("input_offset", "quant_bias")):
            tensors[name] = np.zeros_like(tensor)
    copy_with(static, tmp_path, tensors)
    code = door.main(["check", "--model", str(tmp_path), "--skip-run"])
    assert code == 0, capsys.readouterr().out


def copy_with(home: Path, folder: Path, tensors: Tensors) -> None:
    """The folder with other tensors, in one file."""
    for file in home.glob("*[!x].json"):
        shutil.copyfile(file, folder / file.name)
    quantised_reader.write(folder / WEIGHTS, tensors)


# --- damage, as the commands tell of it ---------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    home = tmp_path_factory.mktemp("sound")
    folders.write(home / "a", folders.DENSE)
    assert quantize(home / "a", home / "b") == 0
    return home / "b", quantised_reader.stored(home / "b")


SCALE = "model.layers.1.self_attn.k_proj.weight_scale"


@pytest.mark.parametrize(
    "damage",
    [
        np.nan,
        np.inf,
        -1.0,
        np.ones(16, np.float32),
        np.ones((16, 1), np.int8),
        None,
    ],
    ids=["nan", "inf", "negative", "shape", "dtype", "missing"],
)
def test_a_damaged_scale_is_one_line(
    sound: tuple[Path, Tensors], tmp_path: Path, capsys: Any, damage: Any
) -> None:
    """Also without loading the model: what `check --skip-run` calls sound can be loaded."""
    home, tensors = sound[0], dict(sound[1])
    if damage is None:
        del tensors[SCALE]
    elif isinstance(damage, float):
        tensors[SCALE] = tensors[SCALE].copy()
        tensors[SCALE][3] = damage
    else:
        tensors[SCALE] = damage
    copy_with(home, tmp_path, tensors)
    refuse(capsys, ["generate", "--model", tmp_path, "--prompt-ids", "1,2"], str(tmp_path), SCALE)
    for flags in ([], ["--skip-run"]):
        assert door.main(["check", "--model", str(tmp_path), *flags]) == 1
        *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith("FAIL")
        assert str(tmp_path) in last
        assert SCALE in last


def test_a_truncated_file_is_one_line(
    sound: tuple[Path, Tensors], tmp_path: Path, capsys: Any
) -> None:
    copy_with(sound[0], tmp_path, sound[1])
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-1])
    file = str(tmp_path / WEIGHTS)
    refuse(capsys, ["generate", "--model", tmp_path, "--prompt-ids", "1,2"], file, "truncated")
    assert door.main(["check", "--model", str(tmp_path)]) == 1
    assert file in capsys.readouterr().out


def test_a_nan_among_fp8_numbers_is_found(tmp_path: Path, capsys: Any) -> None:
    folders.write(tmp_path / "a", folders.DENSE)
    assert quantize(tmp_path / "a", tmp_path / "b", "--recipe", "fp8") == 0
    tensors, name = quantised_reader.stored(tmp_path / "b"), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8)[5, 5] = 0x7F
    (tmp_path / "c").mkdir()
    copy_with(tmp_path / "b", tmp_path / "c", tensors)
    capsys.readouterr()
    assert door.main(["check", "--model", str(tmp_path / "c"), "--skip-run"]) == 1
    assert f"{name} holds 1 NaN" in capsys.readouterr().out


# --- what is refused ----------------------------------------------------------------------------


def argv(source: Path, target: Path, *flags: str) -> list[Any]:
    return ["quantize", "--model", source, "--output", target, *flags]


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "fp8"])
def test_what_msmodelslim_cannot_say_is_refused_before_the_work(
    tmp_path: Path, capsys: Any, recipe: str
) -> None:
    flags = ["--recipe", recipe, "--format", "msmodelslim"]
    refuse(capsys, argv(ORACLE / "dense-tiny", tmp_path / "a", *flags), "msModelSlim")
    assert not any(tmp_path.iterdir())


def test_a_target_that_exists_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").write_text("")
    refuse(capsys, argv(ORACLE / "dense-tiny", tmp_path), str(tmp_path), "already exists")
    source = tmp_path / "source"
    shutil.copytree(ORACLE / "dense-tiny", source)
    refuse(capsys, argv(source, source), str(source), "already exists")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "source"]


def test_a_quantised_source_is_refused(sound: tuple[Path, Tensors], tmp_path: Path, capsys: Any):
    refuse(capsys, argv(sound[0], tmp_path / "a"), str(sound[0]), "quantised already")
    assert not any(tmp_path.iterdir())


def test_a_calibrated_source_is_refused(static: Path, tmp_path: Path, capsys: Any) -> None:
    refuse(capsys, argv(static, tmp_path / "a"), str(static), "quantised already")


def test_widths_without_a_group_are_refused(tmp_path: Path, capsys: Any) -> None:
    folders.write(tmp_path / "a", folders.MOGE)  # experts of a width of 20
    refuse(capsys, argv(tmp_path / "a", tmp_path / "b", "--recipe", "w4a16"), "w4a16", "20")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--recipe", "w4a4"], "w4a4"),
        (["--recipe", "W8A8"], "W8A8"),
        (["--format", "gguf"], "gguf"),
        (["--group", "128"], "--group"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(
    tmp_path: Path, capsys: Any, flags: list[str], word: str
) -> None:
    refuse(capsys, argv(ORACLE / "dense-tiny", tmp_path / "a", *flags), word)


def test_a_source_that_is_none_is_refused(tmp_path: Path, capsys: Any) -> None:
    refuse(capsys, argv(tmp_path / "nowhere", tmp_path / "a"), "does not exist")
    (tmp_path / "empty").mkdir()
    refuse(capsys, argv(tmp_path / "empty", tmp_path / "a"), "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_number_that_is_none_is_one_line(tmp_path: Path, capsys: Any) -> None:
    tensors = folders.random_tensors(folders.DENSE)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = np.nan
    folders.write(tmp_path / "a", folders.DENSE, tensors)
    refuse(capsys, argv(tmp_path / "a", tmp_path / "b"), name, "NaN")
    assert not (tmp_path / "b").exists()


def test_a_name_too_long_is_one_line(tmp_path: Path, capsys: Any) -> None:
    error = refuse(capsys, argv(ORACLE / "dense-tiny", tmp_path / ("a" * 300)), "too long")
    assert len(error) < 500


def test_ctrl_c_and_the_same_command_again(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, count = safetensors.write, iter(range(100))

    def write(*args: Any) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(safetensors, "write", write)
    assert quantize(ORACLE / "dense-tiny", tmp_path / "a") == INTERRUPTED
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "a").exists()
    assert quantize(ORACLE / "dense-tiny", tmp_path / "a") == 0
    assert next(count) == 7  # of six files three were there, and one was begun again
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
