"""What a run writes down: a line per step, loads of experts, the picture; and what it refuses."""

import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_jax.errors import ConfigError, InputError
from train import __main__ as door
from train import flops, record
from train.objectives import Router
from train.record import Failure, Record, Taken
from train.run_folder import RunFolder
from train.step import Metrics

KEPT = ["step", "loss", "grad_norm", "weight_norm", "z", "learning_rate", "tokens"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def metrics(loss: float = 2.0, **more: Any) -> Metrics:
    """Of a step, on the device; `load` and `entropy` of a MoGE."""
    numbers = {"grad_norm": 1.5, "weight_norm": 12.0, "z": 3.0, "balance": None, **more}
    load, entropy = (numbers.pop(name, None) for name in ("load", "entropy"))
    found = {name: None if x is None else jnp.float32(x) for name, x in numbers.items()}
    of_load = lambda x: jnp.array(x, jnp.float32)
    router = None if load is None else Router(of_load(load), of_load(entropy))
    return Metrics(loss=jnp.float32(loss), router=router, **found)


def taken(step: int, tokens: int = 100, rate: float = 0.01, flops: float = 5e12) -> Taken:
    return Taken(step, rate, tokens, flops)


def opened(folder: RunFolder, step: int = 0, **more: Any) -> Record:
    return Record(folder, step, lambda step, loss, rate: None, **more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second between two looks at it."""
    now = iter(np.arange(100) / 4)
    monkeypatch.setattr(record.time, "perf_counter", lambda: float(next(now)))


# --- lines


@pytest.mark.usefixtures("clock")
def test_every_field_of_a_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "memory", lambda: 123_456_789)
    shown: list[tuple[int, float, float]] = []
    held = Record(folder, 0, lambda *each: shown.append(each), peak=1e14)
    held.add(taken(1), metrics(2.5))
    held.flush()
    held.close()
    assert lines(folder.metrics) == [
        {
            "step": 1,
            "loss": 2.5,
            "grad_norm": 1.5,
            "weight_norm": 12.0,
            "z": 3.0,
            "learning_rate": 0.01,
            "tokens": 100,
            "seconds": 0.25,
            "tokens_per_s": 400.0,
            "tflops": 20.0,
            "mfu": 0.2,
            "memory_gb": 0.123,
        }
    ]
    assert shown == [(1, 2.5, 400.0)]
    assert folder.router.read_text() == ""


def test_what_nobody_knows_is_not_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "memory", lambda: None)
    held = opened(folder)
    held.add(taken(1), metrics())
    held.close()
    assert folder.metrics.read_text() == ""  # one step behind
    held = opened(folder)
    held.add(taken(1), metrics())
    held.add(taken(2), metrics())
    held.close()
    (line,) = lines(folder.metrics)
    assert set(line) == {*KEPT, "seconds", "tokens_per_s", "tflops"}


def test_what_experts_had_to_do(folder: RunFolder) -> None:
    load = [[2, 2, 4, 0], [3, 3, 3, 3]]
    held = opened(folder)
    held.add(taken(1), metrics(load=load, entropy=[1.0, 1.5], balance=1.25))
    held.flush()
    held.close()
    (line,) = lines(folder.metrics)
    assert line["balance"] == 1.25
    assert line["load_max"] == 2.0  # 4 of a mean of 2
    assert line["load_spread"] == pytest.approx(math.sqrt(2) / 2 / 2, abs=1e-4)  # of one layer
    assert line["idle_experts"] == 0.125
    assert line["router_entropy"] == 1.25
    assert lines(folder.router) == [{"step": 1, "load": load}]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), st.booleans()),
        min_size=1,
        max_size=9,
    )
)
def test_loads_are_summed_between_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[list[int], bool]]
) -> None:
    """A line of router.jsonl is everything since the one before."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    held, wanted, since = opened(folder), [], np.zeros(3, int)
    for number, (load, flush) in enumerate(steps, 1):
        held.add(taken(number), metrics(load=[load], entropy=[0.0], balance=1.0))
        since = since + np.array(load)
        if flush:
            held.flush()
            wanted.append({"step": number, "load": [since.tolist()]})
            since = np.zeros(3, int)
    held.close()
    assert lines(folder.router) == wanted


def test_the_device_does_not_wait(folder: RunFolder) -> None:
    """A step is looked at when the next one is under way."""
    held = opened(folder)
    for step in (1, 2, 3):
        held.add(taken(step), metrics())
    held.close()
    assert [line["step"] for line in lines(folder.metrics)] == [1, 2]


def test_memory_is_that_of_this_process() -> None:
    resource = pytest.importorskip("resource")
    before = record.memory()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before is not None
    assert 50e6 < before <= most * (1 if sys.platform == "darwin" else 1024)


def test_peaks_are_the_vendors() -> None:
    """Of dense products, per chip; twice as many of numbers half as wide."""
    assert flops.peak("TPU v5p", 2) == 459e12
    assert flops.peak("TPU v5 lite", 2) == 197e12
    assert flops.peak("TPU v6 lite", 2) == 918e12
    assert flops.peak("NVIDIA H200", 2) == 989e12
    assert flops.peak("cpu", 2) is None


# --- going on


def written(folder: RunFolder, steps: int) -> None:
    """Lines of so many steps, with a checkpoint after every second."""
    held = opened(folder)
    for step in range(1, steps + 1):
        load = [[step, 2 * step]]
        held.add(taken(step), metrics(float(step), load=load, entropy=[0.0], balance=1.0))
        if step % 2 == 0:
            held.flush()
    held.close()


@settings(max_examples=50)
@given(st.integers(0, 9), st.integers(0, 5000), st.integers(0, 500))
def test_what_was_written_after_a_checkpoint_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, step: int, end: int, end_of_router: int
) -> None:
    """Wherever the program was killed: half a line is none, and no line is there twice."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    written(folder, 8)
    wanted = []
    for path, cut in ((folder.metrics, end), (folder.router, end_of_router)):
        text = path.read_text()[:cut]
        path.write_text(text)
        whole = text.split("\n")[:-1]
        wanted.append([line for line in map(json.loads, whole) if line["step"] <= step])
    held = opened(folder, step)
    held.add(taken(step + 1), metrics(load=[[1, 2]], entropy=[0.0], balance=1.0))
    held.flush()
    held.close()
    for path, before in zip((folder.metrics, folder.router), wanted, strict=True):
        *old, new = lines(path)
        assert old == before
        assert new["step"] == step + 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"loss": 1.0}\n', "line 1: no metrics of a step"),
        ('{"step": 1}\n', "line 1: no metrics of a step"),
        ('{"step": 1, "loss": 2.0}\n{"step": "2", "loss": 2.0}\n', "line 2: no metrics of a step"),
        ('{"step": 1, "loss": "low"}\n', "line 1: no metrics of a step"),
        ("once upon a time\n", "line 1: not valid JSON"),
        ("[]\n", "line 1: "),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, complaint: str, folder: RunFolder) -> None:
    folder.metrics.write_text(text)
    with pytest.raises(ConfigError) as caught:
        opened(folder, 5)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{folder.metrics}, ")
    assert complaint in line
    assert folder.metrics.read_text() == text


# --- failures


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("loss", "loss"),
        ("grad_norm", "norm of the gradients"),
        ("weight_norm", "norm of the weights"),
        ("z", "mean of logsumexp(logits)^2"),
    ],
)
def test_no_number_is_a_failure(field: str, name: str, value: float, folder: RunFolder) -> None:
    """It is told with its step, and not among the metrics: they can be read again."""
    held = opened(folder)
    held.add(taken(1), metrics())
    held.add(taken(2), metrics(**{field: value}))
    with pytest.raises(Failure) as caught:
        held.flush()
    held.close()
    assert str(caught.value) == f"the {name} is {value} at step 2"
    assert caught.value.step == 2
    assert [line["step"] for line in record.read(folder.metrics)] == [1]


WINDOW = 4


@pytest.fixture(scope="module")
def short_window() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "SPIKE_WINDOW", WINDOW)
        yield


@pytest.mark.usefixtures("short_window")
@given(
    st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 7.0]), min_size=1, max_size=14),
    st.integers(0, 14),
)
def test_a_spike_is_told_from_the_losses_before_it(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], stop: int
) -> None:
    """More than twice the median of the last four, wherever the run was stopped in between."""
    wanted = None
    for step, loss in enumerate(losses, 1):
        before = sorted(losses[max(step - 1 - WINDOW, 0) : step - 1])
        if len(before) == WINDOW and loss > 2 * (before[1] + before[2]) / 2:
            wanted = step
            break
    folder, found = RunFolder(tmp_path_factory.mktemp("run")), None
    held = opened(folder, spike=2.0)
    try:
        for step, loss in enumerate(losses, 1):
            held.add(taken(step), metrics(loss))
            if step == stop:
                held.flush()
                held.close()
                held = opened(folder, step, spike=2.0)
        held.flush()
    except Failure as failure:
        found = failure.step
    held.close()
    assert found == wanted


@pytest.mark.usefixtures("short_window")
def test_spikes_pass_where_nobody_asked(folder: RunFolder) -> None:
    held = opened(folder)
    for step, loss in enumerate([1.0] * 9 + [1e6], 1):
        held.add(taken(step), metrics(loss))
    held.flush()
    held.close()
    assert len(lines(folder.metrics)) == 10


# --- TensorBoard


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of all scalars, and the purges, from the files themselves."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = proto.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "purge", 0.0))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_the_same_numbers(folder: RunFolder) -> None:
    pytest.importorskip("tensorboardX")
    held = opened(folder, tensorboard=True)
    for step in (1, 2, 3):
        held.add(taken(step), metrics(step / 2, load=[[1, 3]], entropy=[0.5], balance=1.0))
    held.flush()
    held.close()
    wanted = {
        (line["step"], name): np.float32(value)
        for line in lines(folder.metrics)
        for name, value in line.items()
    }
    assert len(wanted) == 3 * len(lines(folder.metrics)[0])
    first = events(folder.tensorboard)
    assert {(step, name): value for step, name, value in first if name != "purge"} == wanted
    held = opened(folder, 2, tensorboard=True)
    held.add(taken(3), metrics(7.0))
    held.flush()
    held.close()
    assert len(list(folder.tensorboard.iterdir())) == 2
    again = events(folder.tensorboard)
    assert again[: len(first)] == first
    assert (3, "purge", 0.0) in again[len(first) :]
    assert (3, "loss", 7.0) in again[len(first) :]


def test_tensorboard_without_its_writer_is_one_line(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError) as caught:
        opened(folder, tensorboard=True)
    assert str(caught.value) == "run.tensorboard needs `pip install tensorboardX`"


# --- the picture


def drawn(folder: RunFolder, count: int, **more: Any) -> dict[str, np.ndarray]:
    """The lines of the picture of so many steps, by the name of their axis and colour."""
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    rows = [
        {
            "step": step,
            "loss": float(rng.uniform(1, 9)),
            "grad_norm": float(rng.uniform(1, 2)),
            "learning_rate": 1e-3 / step,
            "tokens_per_s": float(rng.uniform(100, 200)),
            **{name: float(rng.uniform(1, 2)) for name in more},
        }
        for step in range(1, count + 1)
    ]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = record.plot(folder.metrics)
    found = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            found[f"{axes.get_ylabel()} {line.get_color()}"] = np.array(line.get_data())
    return found


def column(folder: RunFolder, name: str) -> list[float]:
    return [line[name] for line in lines(folder.metrics)]


@pytest.mark.parametrize(("count", "window"), [(20, 1), (250, 5)])
def test_a_picture_shows_every_step_and_the_mean_of_the_last(
    count: int, window: int, folder: RunFolder
) -> None:
    found = drawn(folder, count)
    steps, losses = np.arange(1, count + 1), column(folder, "loss")
    mean = lambda values: [
        np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))
    ]
    wanted = {
        "cross-entropy,\nnats per token lightsteelblue": losses,
        "learning rate tab:gray": column(folder, "learning_rate"),
        "norm of the\ngradients tab:green": mean(column(folder, "grad_norm")),
        "tokens/s tab:orange": mean(column(folder, "tokens_per_s")),
    }
    if window > 1:
        wanted["cross-entropy,\nnats per token tab:blue"] = mean(losses)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name][0], steps)
        np.testing.assert_allclose(found[name][1], values, rtol=1e-12, err_msg=name)


def test_a_picture_of_many_steps_has_few_points(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "DRAWN", 100)
    found = drawn(folder, 250)
    assert all(points.shape[1] == 84 for points in found.values())
    steps, losses = np.arange(1, 251), np.array(column(folder, "loss"))
    points = found["cross-entropy,\nnats per token lightsteelblue"]
    np.testing.assert_array_equal(points, [steps[::3], losses[::3]])


def test_a_picture_shows_what_experts_had_to_do(folder: RunFolder) -> None:
    found = drawn(folder, 9, load_max=..., load_spread=...)
    for name, color in (("load_max", "tab:red"), ("load_spread", "tab:purple")):
        points = found[f"load of experts,\nto the mean {color}"]
        np.testing.assert_allclose(points[1], column(folder, name))


def test_a_picture_at_any_time(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By a command, also of a line that is still being written; of nothing there is none."""
    pytest.importorskip("matplotlib")
    assert door.main(["plot", str(tmp_path)]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().err
    folder.metrics.write_text("")
    assert door.main(["plot", str(tmp_path)]) == 2
    assert "metrics.jsonl: no step yet" in capsys.readouterr().err
    written(folder, 4)
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    assert door.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert door.main(["plot", str(tmp_path), "--output", str(tmp_path / "x.svg")]) == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()
