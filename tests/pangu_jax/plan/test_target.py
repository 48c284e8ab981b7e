"""Targets: what their files say, which names and sizes mean one, compilers that are not here."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest

from pangu_jax.config import configs_folder
from pangu_jax.errors import ConfigError
from pangu_jax.plan import target as targets
from pangu_jax.plan.target import Chip, NoCompiler, Target

FILES = sorted(file.stem for file in (configs_folder() / "targets").glob("*.toml"))
MINE = """
name = "mine"
platform = "tpu"
memory_gib = 8
memory_gb_per_s = 100.0
tflops_float32 = 2.0
tflops_bf16 = 6.0
tflops_int8 = 12.0
link_gb_per_s = 10.0
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A target of one's own."""
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    return file


def refused(name: str) -> str:
    """The complaint about a target, which is one line."""
    with pytest.raises(ConfigError) as caught:
        targets.load(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_there_are_the_documented_targets() -> None:
    assert FILES == ["cpu", "h200", "v5e", "v5p", "v6e"]


@pytest.mark.parametrize("name", FILES)
def test_every_target_loads(name: str) -> None:
    target = targets.load(name)
    assert (target.kind, target.shape, target.num_devices) == (name, (1,), 1)
    assert str(target) == f"{name}:1"
    chip = target.chip
    assert chip.tflops_float32 <= chip.tflops_bf16 <= chip.tflops_int8
    assert (chip.platform == "cuda") == ("cuda_compute_capability" in chip.description)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "devices"),
    [
        ("v5p:2x2x2", "v5p", (2, 2, 2), 8),
        ("v5e:4x4", "v5e", (4, 4), 16),
        ("v5e:8", "v5e", (8,), 8),
        ("h200", "h200", (1,), 1),
        ("h200:8", "h200", (8,), 8),
        ("h200:2x8", "h200", (2, 8), 16),
        ("cpu:1024x1024", "cpu", (1024, 1024), 2**20),
    ],
)
def test_names_and_sizes(name: str, kind: str, shape: tuple[int, ...], devices: int) -> None:
    target = targets.load(name)
    assert (target.kind, target.shape, target.num_devices) == (kind, shape, devices)
    assert targets.load(str(target)) == target


def test_a_file_with_a_size_and_without(mine: Path) -> None:
    one, four = targets.load(str(mine)), targets.load(f"{mine}:2x2")
    assert (one.num_devices, four.num_devices) == (1, 4)
    assert str(four) == "mine:2x2"
    assert four.chip == Chip("mine", "tpu", 8.0, 100.0, 2.0, 6.0, 12.0, 10.0)


@pytest.mark.parametrize(
    "size", ["", "0", "08", "2x", "x2", "1x1x1x1x1", "1000000", "2x0", "2x2x-1"]
)
def test_what_is_no_size(size: str) -> None:
    text = refused(f"v5p:{size}")
    assert f"v5p:{size}" in text


@pytest.mark.parametrize("name", ["v5p:1024x1024x2", "h200:2x2x2"])
def test_sizes_that_no_machine_has(name: str) -> None:
    assert refused(name) == f"'{name}': no machine has this size"


@pytest.mark.parametrize("name", ["v9", "v9:8", "", ":8", "v5p:2x2x2:2"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    assert f"known: {', '.join(FILES)}" in refused(name)


def test_a_long_name_is_shortened() -> None:
    assert len(refused(f"v5p:{'9' * 1000}")) < 300


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(f"{tmp_path}/none.toml:4") == f"{tmp_path}/none.toml: no such file"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("memory_gib = 0", "memory_gib must be a positive number"),
        ("memory_gib = -4", "memory_gib must be a positive number"),
        ("memory_gib = 1e9", "memory_gib must be a positive number"),
        ("memory_gib = nan", "memory_gib must be a finite number"),
        ("memory_gib = true", "memory_gib must be a number"),
        ('memory_gib = "8"', "memory_gib must be a number"),
        ("memory = 8", "unknown key 'memory'; did you mean memory_gib?"),
        ("", "memory_gib"),
        ("memory_gib = ", "line"),
    ],
)
def test_bad_figures(mine: Path, line: str, complaint: str) -> None:
    mine.write_text(MINE.replace("memory_gib = 8", line))
    text = refused(f"{mine}:4")
    assert text.startswith(str(mine))
    assert complaint in text


def test_an_unknown_platform(mine: Path) -> None:
    mine.write_text(MINE.replace('"tpu"', '"npu"'))
    assert "platform must be one of tpu, cuda, cpu" in refused(str(mine))


def test_flops_by_size_of_a_number() -> None:
    chip = Chip("mine", "tpu", 8.0, 100.0, 2.0, 6.0, 12.0, 10.0)
    assert [chip.tflops(size) for size in (1, 2, 4)] == [12.0, 6.0, 2.0]


@pytest.mark.parametrize("name", ["v5p:2x2x2", "h200:8", "cpu:8"])
def test_the_environment_keeps_jax_off_the_accelerator(name: str) -> None:
    environment = targets.load(name).environment
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert all(isinstance(value, str) for value in environment.values())


def test_the_environment_of_each_platform() -> None:
    of = lambda name: targets.load(name).environment
    assert of("cpu:2x8")["JAX_NUM_CPU_DEVICES"] == "16"
    assert of("v5e:4x4")["TPU_SKIP_MDS_QUERY"] == "1"
    assert of("h200")["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert not [key for name in ("cpu", "h200") for key in of(name) if key.startswith("TPU")]


def test_virtual_devices_of_the_cpu() -> None:
    assert targets.load("cpu:4").devices() == jax.devices("cpu")[:4]
    assert len(targets.load("cpu:2x4").devices()) == 8
    with pytest.raises(NoCompiler, match=r"cpu:2x8 needs JAX_NUM_CPU_DEVICES=16 in the env"):
        targets.load("cpu:2x8").devices()


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("v5p:2x2x2", "pangu-jax[tpu]"),
        ("v5e:4x4", "pangu-jax[tpu]"),
        ("h200", "pangu-jax[gpu]"),
        ("h200:2x8", "pangu-jax[gpu]"),
    ],
)
def test_a_compiler_that_is_not_installed(name: str, extra: str) -> None:
    target = targets.load(name)
    if find_spec("libtpu" if extra.endswith("[tpu]") else "jax_cuda13_plugin"):
        pytest.skip("it is installed here")
    with pytest.raises(NoCompiler) as caught:
        target.devices()
    assert str(caught.value) == f"the compiler for {target} is not installed here ({extra})"


ASKED = [
    ("v5p:2x2x2", {"platform": "tpu", "topology_name": "v5p:2x2x2"}),
    ("h200", {"platform": "cuda", "topology_name": "h200", "topology": "1x1x1"}),
    ("h200:8", {"platform": "cuda", "topology_name": "h200", "topology": "1x1x8"}),
    ("h200:2x8", {"platform": "cuda", "topology_name": "h200", "topology": "1x2x8"}),
]


@pytest.mark.parametrize(("name", "wanted"), ASKED)
def test_what_a_compiler_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, wanted: dict[str, str]
) -> None:
    """And that its own complaint about a shape is one line."""
    from jax.experimental import topologies

    asked: dict[str, Any] = {}

    def refuse(**options: Any) -> Any:
        asked.update(options)
        raise ValueError("no such shape\nat line 1")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    target: Target = targets.load(name)
    with pytest.raises(ConfigError) as caught:
        target.devices()
    assert not isinstance(caught.value, NoCompiler)
    assert str(caught.value) == f"{target}: no such topology (no such shape)"
    description = asked.pop("target_config", "")
    assert asked == wanted
    assert description == target.chip.description
