"""One run, from its configuration to OUTPUT/final, whatever its data are.

The same configuration again goes on from the last checkpoint, and on a CPU it ends with the same
bits as a run that was never stopped: the data of a step depend on its number and the seed alone.
"""

import contextlib
import dataclasses
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
from pangu_jax.text import markers
from pangu_jax.text.tokenizer import Tokenizer
from train import optimizer as optimizers
from train import record as records
from train import step as steps
from train.checkpoints import Checkpoints, shapes
from train.config import Config
from train.packing import Example, Rows, pack
from train.record import Record, TrainingError
from train.run_folder import RunFolder
from train.step import State, Step

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
    with folder.begin(config, model.config, rows):
        like, optimizer = _shapes(model), optimizers.make(config.optimizer, config.run.steps)
        begin = [steps.start(model, optimizer, frozen)]
        del model  # nobody holds on to the first weights: steps use them up, a restart drops them
        state = _run(config, folder, steps.make(like, optimizer), begin.pop(), rows)
        last = int(state.step)
        if finished := last == config.run.steps:
            _write_final(config, steps.merge(like, state.trainable, state.frozen), folder.final)
            progress.say(f"wrote {folder.final}")
        else:
            progress.say(f"stopped after step {last}; the same command goes on from there")
        plots.try_save(lambda: records.plot(folder.metrics), folder.plot)
    return 0 if finished else door.INTERRUPTED


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
            model = pangu_jax.load(
                section.path, "float32", section.layout, "stacked", progress=advance
            )
    else:
        preset = pangu_jax.preset(str(section.preset))
        ends = tokenizer.id(markers.of(tokenizer).turn_end)
        model = pangu_jax.init(
            dataclasses.replace(
                preset,
                bos_token_id=tokenizer.bos_id,
                eos_token_ids=preset.eos_token_ids if ends is None else (ends,),
            ),
            jax.random.key(config.run.seed),
            dtype="float32",
            where=section.layout,
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


def _run(config: Config, folder: RunFolder, step: Step, state: State, rows: Rows) -> State:
    """The state after the last step, or after the one at which Ctrl-C came."""
    section = config.run
    step = jax.jit(step, donate_argnames="state")
    rates = np.asarray(
        optimizers.schedule(config.optimizer, section.steps)(np.arange(section.steps))
    )
    asked_to_stop: list[bool] = []
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder.checkpoints)))
        if checkpoints.latest is not None:
            blank, frozen = shapes(state), state.frozen
            del state
            state = checkpoints.restore(blank, frozen)
            progress.say(f"going on after step {int(state.step)}")
        first = int(state.step)
        bar = stack.enter_context(progress.training(section.steps, first))
        record = Record(folder.metrics, first, rates, bar)
        stack.enter_context(contextlib.closing(record))
        stack.enter_context(door.interrupts(lambda: _stop(asked_to_stop)))
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
    return state


def _stop(asked: list[bool]) -> None:
    asked.append(True)
    progress.say("stopping after this step; Ctrl-C again to leave at once")


def _shapes(model: Pangu) -> Pangu:
    """The structure of a model without its weights."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)


def _write_final(config: Config, model: Pangu, target: Path) -> None:
    """The Hugging Face folder, in the dtype that the model's config names."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model)):
        raise TrainingError(
            "the last step left weights that are no numbers: begin another run with a lower "
            "optimizer.learning_rate"
        )
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
