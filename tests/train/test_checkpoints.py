"""Checkpoints: every bit comes back, or one line says what is wrong."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pangu_jax.errors import CheckpointError
from train.checkpoints import Checkpoints, shapes
from train.step import State

# Where a file is damaged, Orbax leaves coroutines behind that nobody waits for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _forget_coroutines() -> Iterator[None]:
    """While their warnings are ignored."""
    yield
    gc.collect()


FROZEN = {"still": jnp.arange(3)}


def state(step: int, seed: int = 0, *, moments: Any = ..., ema: bool = True) -> State:
    """With arrays of all kinds and sizes that a state may have, and any bits in them."""
    rng = np.random.default_rng(seed)

    def some(kind: Any, *shape: int) -> jax.Array:
        bits = rng.integers(0, 256, (*shape, np.dtype(kind).itemsize), np.uint8)
        return jnp.asarray(bits.view(kind).reshape(shape))

    own = {"blocks.0.mlp.down": some(np.float32, 40, 32), "norm.weight": some(np.float32, 7)}
    if moments is ...:
        moments = (some(np.int32), {"norm.weight": some(ml_dtypes.bfloat16, 7)}, some(np.int8, 3))
    mean = {name: some(np.float32, *leaf.shape) for name, leaf in own.items()} if ema else {}
    return State(jnp.int32(step), jnp.int32(seed), own, FROZEN, moments, mean)


def bits(of: State) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of everything, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(of)
    read = lambda leaf: (f"{leaf.dtype}{leaf.shape}", np.asarray(leaf).tobytes())
    return {jax.tree_util.keystr(path): read(leaf) for path, leaf in leaves}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder)
    yield checkpoints
    checkpoints.close()


def restored(folder: Path, like: State | None = None) -> State:
    """The newest state of a folder, as another program reads it."""
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(shapes(like or state(0)), FROZEN)
    finally:
        checkpoints.close()


# --- kept


def test_every_bit_comes_back(saved: Checkpoints, folder: Path) -> None:
    assert saved.latest is None
    for step in (3, 5):
        saved.save(state(step, step))
    saved.wait()
    assert saved.latest == 5
    for found in (saved.restore(shapes(state(0)), FROZEN), restored(folder)):
        assert bits(found) == bits(state(5, 5))
        assert found.frozen is FROZEN


def test_what_is_restored_lies_where_it_is_wanted(saved: Checkpoints, folder: Path) -> None:
    """Whole arrays are saved, with the same sums, whatever devices had of them."""
    mesh, name = Mesh(np.array(jax.devices()[:4]), ("x",)), "blocks.0.mlp.down"

    def spread(*spec: str | None) -> State:
        """The matrices split, everything else on all devices."""
        place = lambda leaf: NamedSharding(mesh, PartitionSpec(*(spec if leaf.ndim == 2 else ())))
        return jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), state(1))

    rows, columns = spread("x"), spread(None, "x")
    assert rows.trainable[name].addressable_shards[0].data.shape == (10, 32)
    saved.save(rows)
    saved.wait()
    found = restored(folder, columns)
    assert bits(found) == bits(state(1))
    assert found.trainable[name].sharding == columns.trainable[name].sharding
    assert json.loads((folder / "1" / "sums" / "metadata").read_text()) == naive_sums(state(1))


def test_a_state_may_go_on_while_it_is_written(saved: Checkpoints, folder: Path) -> None:
    """A step uses its arrays up at once: megabytes, of which the disk has hardly a byte yet."""
    big = {"blocks.0.mlp.down": jnp.arange(2_000_000, dtype=jnp.float32)}
    start = State(jnp.int32(1), jnp.int32(0), big, {}, (), {})
    go_on = jax.jit(lambda of: jax.tree.map(lambda leaf: leaf + 1, of), donate_argnums=0)
    current = go_on(start)
    saved.save(current)
    for _ in range(5):
        current = go_on(current)
    saved.wait()
    assert saved.latest == 2
    found = restored(folder, current)
    wanted = np.arange(2_000_000, dtype=np.float32) + 1
    np.testing.assert_array_equal(found.trainable["blocks.0.mlp.down"], wanted)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(keep: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in (1, 2, 4, 7, 8):
        checkpoints.save(state(step))
    checkpoints.close()
    assert sorted(int(each.name) for each in folder.iterdir()) == [1, 2, 4, 7, 8][-keep:]


def test_what_was_not_finished_is_none(folder: Path) -> None:
    """A save that was interrupted is neither read nor kept."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(2))
    checkpoints.close()
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    again = Checkpoints(folder)
    assert again.latest == 2
    again.save(state(3))
    again.close()
    assert sorted(each.name for each in folder.iterdir()) == ["2", "3"]


# --- check sums


def naive_sums(of: State) -> dict[str, int]:
    """Of every array the bits of each number times an odd one of its place, in whole numbers."""
    kept = {
        name: getattr(of, name) for name in ("ema", "optimizer", "skipped", "step", "trainable")
    }
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        size = leaf.dtype.itemsize
        data, total = np.asarray(leaf).tobytes(), 0
        for place in range(leaf.size):
            number = int.from_bytes(data[place * size : (place + 1) * size], "little")
            total += number * (2 * 2654435761 * place + 1)
        found[jax.tree_util.keystr(path)] = total % 2**32
    return found


def test_sums_are_of_all_bits_in_their_places(saved: Checkpoints, folder: Path) -> None:
    saved.save(state(1))
    saved.wait()
    assert json.loads((folder / "1" / "sums" / "metadata").read_text()) == naive_sums(state(1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.integers(0, 2**32 - 1))
def test_a_flipped_bit_or_two_numbers_in_each_others_place_have_another_sum(
    place: int, bit: int, other: int
) -> None:
    """Every number is multiplied with an odd one, which is the same again after 2^31 numbers."""
    odd = lambda place: (2 * 2654435761 * place + 1) % 2**32
    assert (odd(place) << bit) % 2**32 != 0
    assert (odd(place) == odd(other)) == ((place - other) % 2**31 == 0)


# --- damaged


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(state(step, step))
    checkpoints.close()
    return folder


def refused(folder: Path, step: int = 2) -> str:
    """The one line with which the newest checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        restored(folder)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{folder / str(step)}: not a checkpoint of this run (")
    assert line.endswith("); remove it to go on from the one before")
    assert len(line) < 500
    return line


@pytest.fixture
def damaged(two: Path, folder: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(two, folder)
    return folder / "2"


def stored(folder: Path) -> list[Path]:
    """The files of a checkpoint, in an order that does not change."""
    return sorted(
        (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0),
        key=lambda path: (path.stat().st_size, path.parent.name),
    )


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    two: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In any file."""
    folder = tmp_path_factory.mktemp("flipped") / "checkpoints"
    shutil.copytree(two, folder)
    files = stored(folder / "2")
    file = files[data.draw(st.integers(0, len(files) - 1))]
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    found = None
    try:
        found = restored(folder)
    except CheckpointError:
        refused(folder)
    if found is not None:
        assert bits(found) == bits(state(2, 2)), file
    shutil.rmtree(folder / "2")
    assert bits(restored(folder)) == bits(state(1, 1))


@pytest.mark.parametrize("how", ["cut off", "empty", "missing"])
def test_a_file_that_is_not_whole_is_noticed_or_was_not_needed(
    how: str, two: Path, tmp_path: Path
) -> None:
    """Each of them."""
    for number, name in enumerate(path.relative_to(two) for path in stored(two / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        file = folder / name
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(
                file.read_bytes()[: file.stat().st_size // 2 if how == "cut off" else 0]
            )
        found = None
        try:
            found = restored(folder)
        except CheckpointError:
            refused(folder)
        if found is not None:
            assert bits(found) == bits(state(2, 2)), name


def test_numbers_that_are_not_those_that_were_saved(two: Path, tmp_path: Path) -> None:
    """A sound file of other numbers: every array has its sum."""
    names = list(naive_sums(state(2, 2)))
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        other = state(2, 2)
        kept = {
            field: getattr(other, field)
            for field in ("step", "skipped", "trainable", "optimizer", "ema")
        }

        def flip(path: Any, leaf: Any, name: str = name) -> Any:
            if jax.tree_util.keystr(path) != name:
                return leaf
            data = bytearray(np.asarray(leaf).tobytes())
            data[len(data) // 2] ^= 16
            return jnp.asarray(np.frombuffer(bytes(data), leaf.dtype).reshape(leaf.shape))

        kept = jax.tree_util.tree_map_with_path(flip, kept)
        shutil.rmtree(folder / "2" / "state")
        with ocp.StandardCheckpointer() as writer:
            writer.save((folder / "2" / "state").absolute(), kept)
        assert f"(the numbers of {name} are damaged)" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: {},
        lambda sums: {name: value for name, value in sums.items() if "ema" not in name},
        lambda sums: {name: str(value) for name, value in sums.items()},
        lambda sums: list(sums),
        lambda sums: None,
        lambda sums: 3,
    ],
)
def test_sums_that_are_not_there_are_not_right(
    change: Callable[[dict[str, int]], Any], damaged: Path
) -> None:
    file = damaged / "sums" / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    refused(damaged.parent)


@pytest.mark.parametrize("part", ["state", "sums", ""])
def test_a_part_that_is_missing(part: str, damaged: Path) -> None:
    shutil.rmtree(damaged / part)
    (damaged / part).mkdir()
    refused(damaged.parent)
    (damaged / part).rmdir()
    damaged.mkdir(exist_ok=True)
    refused(damaged.parent)


@pytest.mark.parametrize(
    "like",
    [
        state(0, ema=False),
        state(0, moments=(jnp.int32(0), {}, jnp.zeros(3, jnp.int8))),
        state(0, moments=()),
        dataclasses.replace(state(0), trainable={"norm.weight": jnp.zeros(7)}),
        dataclasses.replace(state(0), trainable={"norm.weight": jnp.zeros(8)}),
        dataclasses.replace(state(0), ema={"a": jnp.zeros(8)}),
    ],
    ids=["no mean", "other moments", "no moments", "fewer leaves", "another shape", "another name"],
)
def test_a_checkpoint_of_another_run(like: State, two: Path) -> None:
    """Of other leaves, or of arrays of other shapes."""
    with pytest.raises(CheckpointError) as caught:
        restored(two, like)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{two / '2'}: not a checkpoint of this run (")


def test_what_cannot_be_written_is_told(saved: Checkpoints, folder: Path) -> None:
    """And the checkpoint before is still good. Here no file may have more than 4 MB."""
    resource = pytest.importorskip("resource")
    saved.save(state(1))
    saved.wait()
    numbers = np.random.default_rng(0).standard_normal(2_000_000, np.float32)
    big = dataclasses.replace(state(2), trainable={"norm.weight": jnp.asarray(numbers)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save() -> None:
        saved.save(big)
        saved.wait()

    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{folder}: cannot be written (")
    assert line.endswith("the same command goes on from the checkpoint before")
    assert bits(restored(folder)) == bits(state(1))
