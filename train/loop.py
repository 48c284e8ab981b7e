"""One run, from its configuration to OUTPUT/final, whatever its data are.

The same configuration again goes on from the last checkpoint, and on a CPU it ends with the same
bits as a run that was never stopped: the data of a step depend on its number and the seed alone.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pangu_jax
from infer import door, loading, plots, progress
from pangu_jax.checkpoint import hf, save
from pangu_jax.checkpoint.hf import COMPANIONS
from pangu_jax.config import configs_folder
from pangu_jax.errors import CheckpointError, InputError
from pangu_jax.model import Pangu
from pangu_jax.text import markers
from pangu_jax.text.tokenizer import Tokenizer
from train import optimizer as optimizers
from train import record as records
from train.checkpoints import Checkpoints, shapes
from train.config import Config, Stage
from train.data.mixture import Data, Reader
from train.flops import peak, step_flops
from train.objectives import Batch
from train.recipe import Recipe, base_dtype
from train.record import Failure, Record, Taken, TrainingError
from train.run_folder import RunFolder
from train.step import State

# Times in one go that a run goes back to a checkpoint (own choice).
MOST_BACK = 3


def train(config: Config, reader: Reader) -> int:
    """Runs what is left of a run and returns an exit code: 0, or 130 after Ctrl-C and 143 after
    SIGTERM, which both save.

    Raises PanguError.
    """
    folder = RunFolder.of(config)
    if folder.final.exists():
        progress.say(f"{folder.final}: the run is complete")
        return 0
    home = tokenizer_folder(config)
    tokenizer = Tokenizer.load(home)
    model = _begin(config, tokenizer)
    recipe = Recipe(config, model)
    with folder.claimed(config):
        data = Data(config, reader, tokenizer, home, folder.data)
        for stage in config.stages:
            data.feed(stage)  # what cannot be fed is told before the first step
        folder.check_inputs(config, model.config, data.digest)
        like, begin, said = _shapes(model), [recipe.start(model)], _unpublished(model)
        if said is not None:
            progress.say(f"{said}: there will be no {folder.final}; {folder.path} opens as a model")
        folder.describe(config, model, begin[0].frozen, home)
        del model  # nobody holds on to the first weights: steps use them up, a restart drops them
        state, code = Run(config, folder, recipe, data, like).go(begin.pop())
        if code == 0:
            if said is None:
                _write_final(config, recipe.model(state), folder.final)
            progress.say(f"wrote {folder.path if said else folder.final}")
        else:
            progress.say(
                f"stopped after step {int(state.step)}; the same command goes on from there"
            )
        plots.try_save(lambda: records.plot(folder.metrics), folder.plot)
    return code


def _unpublished(model: Pangu) -> str | None:
    """Why the model cannot become a Hugging Face folder, if it cannot."""
    try:
        save.check_expressible(model.config, json.loads(model.origin.config))
    except CheckpointError as error:
        return str(error)
    return None


def tokenizer_folder(config: Config) -> Path:
    """Where the run's tokenizer lies."""
    if config.model.path is not None:
        return Path(config.model.path)
    name = str(config.model.tokenizer)
    known = configs_folder() / "tokenizers" / name
    return known if known.is_dir() else Path(name)


def _begin(config: Config, tokenizer: Tokenizer) -> Pangu:
    """The model before the first step, its layers stacked."""
    section = config.model
    loading.kernels()
    if section.path is not None:
        dtype = base_dtype(config, hf.read_config(Path(section.path))[0].dtype)
        with progress.reading() as advance:
            model = pangu_jax.load(section.path, dtype, section.layout, "stacked", progress=advance)
        if config.lora.base is not None:
            model = pangu_jax.quantize(model, config.lora.base)
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
    longest = max(stage.length for stage in config.stages)
    if longest > model.config.max_positions:
        raise InputError(
            f"data.length ({longest}) is more than the model's "
            f"{model.config.max_positions} positions"
        )
    return model


class Run:
    """The steps of a run."""

    def __init__(
        self, config: Config, folder: RunFolder, recipe: Recipe, data: Data, like: Pangu
    ) -> None:
        """like: the model's structure"""
        self._config, self._folder, self._data, self._like = config, folder, data, like
        self._step = jax.jit(recipe.step(), donate_argnames="state")
        every = np.arange(config.run.steps)
        self._rates = np.asarray(optimizers.schedule(config.optimizer, config.stages)(every))
        self._code = 0

    def go(self, state: State) -> tuple[State, int]:
        """The state after the last step, or after the one at which somebody asked to stop; and the
        exit code.
        """
        section = self._config.run
        with contextlib.ExitStack() as stack:
            saved = Checkpoints(self._folder.checkpoints, section.keep)
            stack.enter_context(contextlib.closing(saved))
            blank, frozen = shapes(state), state.frozen
            if saved.latest is not None:
                del state
                state = saved.restore(blank, frozen)
                progress.say(f"going on after step {int(state.step)}")
            stack.enter_context(door.interrupts(lambda: self._stop(door.INTERRUPTED)))
            stack.enter_context(door.terminations(lambda: self._stop(door.TERMINATED)))
            back = 0
            while True:
                skipped = int(state.skipped)
                try:
                    state = self._go(state, saved)
                    saved.wait()
                    return state, self._code if int(state.step) < section.steps else 0
                except Failure as failure:
                    saved.wait()
                    self._give_up(failure, saved, back)
                    state = saved.restore(blank, frozen)
                    back += 1
                    state = self._skip(state, failure, skipped)

    def _go(self, state: State, saved: Checkpoints) -> State:
        first, section = int(state.step), self._config.run
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress.training(section.steps, first))
            record = Record(
                self._folder,
                first,
                bar,
                spike=section.spike,
                peak=self._peak(),
                tensorboard=section.tensorboard,
            )
            stack.enter_context(contextlib.closing(record))
            skipped = int(state.skipped)
            for number, stage, batch in self._batches(first, skipped):
                state, metrics = self._step(state, batch)
                record.add(self._taken(number, stage, batch), metrics)
                last = number == section.steps or bool(self._code)
                if last or number % section.save_every == 0:
                    record.flush()
                    saved.save(state)
                if last:
                    break
        return state

    def _batches(self, done: int, skipped: int) -> Iterator[tuple[int, Stage, Batch]]:
        """Number (from 1), phase and batch of every step after `done`."""
        for stage in self._config.stages:
            if done >= stage.end:
                continue
            at = max(done, stage.begin)
            feed = self._data.feed(stage).since(at - stage.begin + skipped)
            for number in range(at + 1, stage.end + 1):
                yield number, stage, next(feed)

    def _taken(self, number: int, stage: Stage, batch: Batch) -> Taken:
        flops = step_flops(self._like.config, stage.length, stage.batch)
        tokens = int((batch.segments > 0).sum())
        return Taken(number, float(self._rates[number - 1]), tokens, flops)

    def _peak(self) -> float | None:
        """FLOP/s of all devices of the run."""
        devices = list(np.ravel(np.asarray(self._like.mesh.devices)))
        size = jnp.dtype(self._config.step.compute).itemsize
        one = peak(devices[0].device_kind, size)
        return None if one is None else one * len(devices)

    def _give_up(self, failure: Failure, saved: Checkpoints, back: int) -> None:
        """Raises TrainingError where the run is not to go back, or cannot."""
        if saved.latest is None:
            good = "there is no checkpoint yet"
        else:
            good = f"the last good checkpoint is of step {saved.latest}"
        if self._config.run.failure == "stop":
            advice = "--run.failure skip goes back to it and leaves those batches out; or begin"
            advice = "begin" if saved.latest is None else advice
            raise TrainingError(
                f"{failure}; {good}: {advice} another run with a lower optimizer.learning_rate"
            )
        if saved.latest is None or back == MOST_BACK:
            raise TrainingError(
                f"{failure}; {good}, and the run went back {back} times: begin another with a "
                "lower optimizer.learning_rate"
            )

    def _skip(self, state: State, failure: Failure, before: int) -> State:
        """The state with the batches up to the failure left out.

        before: how many were left out when it came to the failure
        """
        step = int(state.step)
        lost = before - int(state.skipped) + failure.step - step
        progress.say(f"{failure}: back to step {step}, and its next {lost} batches are left out")
        skipped = jax.device_put(np.int32(int(state.skipped) + lost), state.skipped.sharding)
        return dataclasses.replace(state, skipped=skipped)

    def _stop(self, code: int) -> None:
        self._code = code
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
    for left in target.parent.glob(f"*.{target.name}.partial*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    pangu_jax.save_hf(model, partial)
    home = tokenizer_folder(config)
    for name in COMPANIONS:
        if (home / name).is_file() and not (partial / name).exists():
            shutil.copyfile(home / name, partial / name)
    partial.rename(target)
