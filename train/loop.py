"""One run, from its configuration to OUTPUT/final, whatever its data are.

The same configuration again goes on from the last checkpoint, and on a CPU it ends with the same
bits as a run that was never stopped: the data of a step depend on its number and the seed alone.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from infer import door, loading, plots, progress
from pangu_jax import build
from pangu_jax.checkpoint.hf import COMPANIONS
from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer
from train import optimizer as optimizers
from train import record as records
from train import step as steps
from train.checkpoints import Checkpoints
from train.config import Config
from train.packing import Example, Rows, pack
from train.record import Record
from train.run_folder import RunFolder
from train.step import State

Read = Callable[[Config, Tokenizer], Iterable[Example]]


def train(config: Config, read: Read) -> int:
    """Runs what is left of a run and returns an exit code: 0, or 130 after Ctrl-C, which saves.

    read: the examples of config.data
    Raises PanguError.
    """
    folder = RunFolder.of(config)
    if folder.final.exists():
        progress.say(f"{folder.final}: the run is complete")
        return 0
    tokenizer = Tokenizer.load(tokenizer_folder(config))
    model = _begin(config, tokenizer)
    names = [name for name, _ in build.named_leaves(model)]
    frozen = optimizers.frozen(config.optimizer.freeze, names)
    rows = _rows(config, tokenizer, read)
    folder.begin(config, rows)
    state, finished = _run(config, folder, model, frozen, rows)
    plots.try_save(lambda: records.plot(folder.metrics), folder.plot)
    if not finished:
        progress.say(f"stopped after step {int(state.step)}; the same command goes on from there")
        return door.INTERRUPTED
    _write_final(config, steps.merge(model, state.trainable, state.frozen), folder.final)
    progress.say(f"wrote {folder.final}")
    return 0


def batch_rows(step: int, batch: int, rows: int, seed: int) -> np.ndarray:
    """The rows of a step (counted from 0): one shuffled pass over all rows after another."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([_order(rows, seed, place // rows)[place % rows] for place in places])


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def tokenizer_folder(config: Config) -> Path:
    """Where the run's tokenizer lies."""
    if config.model.path is not None:
        return Path(config.model.path)
    name = str(config.model.tokenizer)
    known = configs_folder() / "tokenizers" / name
    return known if known.is_dir() else Path(name)


def _begin(config: Config, tokenizer: Tokenizer) -> Pangu:
    """The model before the first step, in float32 and its layers stacked."""
    section = config.model
    if section.path is not None:
        with progress.reading() as advance:
            model = pangu_jax.load(section.path, "float32", form="stacked", progress=advance)
    else:
        model = pangu_jax.init(
            pangu_jax.preset(str(section.preset)),
            jax.random.key(config.run.seed),
            dtype="float32",
            form="stacked",
        )
    loading.check_fits(tokenizer, model.config, tokenizer_folder(config))
    if config.data.length > model.config.max_positions:
        raise InputError(
            f"data.length ({config.data.length}) is more than the model's "
            f"{model.config.max_positions} positions"
        )
    return model


def _rows(config: Config, tokenizer: Tokenizer, read: Read) -> Rows:
    """The packed data. Examples that are too long are left out, which is told."""
    length, kept, long, longest = config.data.length, [], 0, 0
    with progress.counting("reading examples") as advance:
        for example in read(config, tokenizer):
            advance()
            if example.ids.size > length:
                long, longest = long + 1, max(longest, example.ids.size)
            else:
                kept.append(example)
    if long:
        progress.say(
            f"{config.data.path}: {long:,} of {long + len(kept):,} examples are longer than "
            f"data.length ({length}) and left out; the longest has {longest:,} tokens"
        )
    if not any(example.learn[1:].any() for example in kept):
        raise InputError(f"{config.data.path}: nothing to learn from")
    rows = pack(kept, length)
    progress.say(
        f"{config.data.path}: {len(kept):,} examples in {len(rows):,} rows of {length} tokens, "
        f"{rows.filled:.1%} filled"
    )
    return rows


def _run(
    config: Config, folder: RunFolder, model: Pangu, frozen: Callable[[str], bool], rows: Rows
) -> tuple[State, bool]:
    """The last state, and whether it is that of the last step."""
    section = config.run
    optimizer = optimizers.make(config.optimizer, section.steps)
    state = steps.start(model, optimizer, frozen)
    step = jax.jit(steps.make(_shapes(model), optimizer), donate_argnames="state")
    asked_to_stop: list[bool] = []
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder.checkpoints)))
        if checkpoints.latest is not None:
            state = checkpoints.restore(state)
            progress.say(f"going on after step {int(state.step)}")
        first = int(state.step)
        bar = stack.enter_context(progress.training(section.steps, first))
        rate = optimizers.schedule(config.optimizer, section.steps)
        record = Record(folder.metrics, first, rate, bar)
        stack.enter_context(contextlib.closing(record))
        stack.enter_context(door.interrupts(lambda: asked_to_stop.append(True)))
        for number in range(first + 1, section.steps + 1):
            batch = rows.batch(batch_rows(number - 1, config.data.batch, len(rows), section.seed))
            state, metrics = step(state, batch)
            record.add(number, metrics, int((batch.segments > 0).sum()))
            last = number == section.steps or bool(asked_to_stop)
            if last or number % section.save_every == 0:
                record.flush()
                checkpoints.save(state)
            if last:
                break
    return state, int(state.step) == section.steps


def _shapes(model: Pangu) -> Pangu:
    """The structure of a model without its weights."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)


def _write_final(config: Config, model: Pangu, target: Path) -> None:
    """The Hugging Face folder, in the dtype that the model's config names."""
    kind = jnp.dtype(model.config.dtype)
    model = jax.tree.map(lambda leaf: leaf.astype(kind), model)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pangu_jax.save_hf(model, partial)
    home = tokenizer_folder(config)
    for name in COMPANIONS:
        if (home / name).is_file() and not (partial / name).exists():
            shutil.copyfile(home / name, partial / name)
    partial.rename(target)
