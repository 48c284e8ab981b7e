"""A configuration's optimizer and step: what a run takes, and what is planned."""

import jax

from pangu_jax import build, lora
from pangu_jax.model import Pangu
from train import optimizer as optimizers
from train import step as steps
from train.config import Config
from train.objectives import Objective
from train.step import Leaves, State, Step


def base_dtype(config: Config, own: str) -> str:
    """In which a model lies that a run begins with: float32, if it is to be trained; what is not
    trained need not be more than it is, and than what it is multiplied in.
    """
    kept = config.lora.rank is not None and own == config.step.compute
    return own if kept else "float32"


class Recipe:
    """The optimizer, the leaves that are trained, and the step of one run's model."""

    def __init__(self, config: Config, model: Pangu) -> None:
        """model: its structure is all that is read. Raises ConfigError."""
        self._config = config
        self._like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
        self._optimizer = optimizers.make(config.optimizer, config.stages)
        names = [name for name, _ in build.named_leaves(model)]
        self._frozen = optimizers.frozen(config.optimizer.freeze, names)
        jax.eval_shape(self._adapters)  # what they cannot stand beside is told before a run begins

    def start(self, model: Pangu) -> State:
        """The state before the first step, in its place."""
        ema = self._config.optimizer.ema is not None
        return steps.start(model, self._optimizer, self._frozen, ema, self._adapters())

    def begin(self, model: Pangu) -> State:
        """The same, wherever it lies."""
        ema = self._config.optimizer.ema is not None
        return steps.begin(model, self._optimizer, self._frozen, ema, self._adapters())

    def step(self) -> Step:
        """To be jitted; its state may be donated."""
        section = self._config.step
        return steps.make(
            self._like,
            self._optimizer,
            Objective(section.z_loss, section.balance, section.remat),
            section.compute,
            section.accumulate,
            self._config.optimizer.ema,
            self._config.lora.scale,
        )

    def model(self, state: State) -> Pangu:
        """What a state's weights are together, with the running mean of those that are trained and
        adapters merged into theirs.
        """
        weights, scale = state.ema or state.trainable, self._config.lora.scale
        if scale is None:
            return steps.merge(self._like, weights, state.frozen)
        return lora.merge(steps.merge(self._like, {}, state.frozen), weights, scale)

    def _adapters(self) -> Leaves | None:
        section, seed = self._config.lora, self._config.run.seed
        if section.rank is None:
            return None
        return lora.init(self._like, section.rank, section.targets, jax.random.key(seed))
