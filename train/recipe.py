"""A configuration's optimizer and step: what a run takes, and what is planned."""

from pangu_jax import build
from pangu_jax.model import Pangu
from train import optimizer as optimizers
from train import step as steps
from train.config import Config
from train.objectives import Objective
from train.step import State, Step


class Recipe:
    """optimizer, the leaves that are frozen, and the step of one run's model."""

    def __init__(self, config: Config, model: Pangu) -> None:
        """model: its structure is all that is read. Raises ConfigError."""
        self._config, self._like = config, model
        self.optimizer = optimizers.make(config.optimizer, config.stages)
        self._ema = config.optimizer.ema is not None
        names = [name for name, _ in build.named_leaves(model)]
        self.frozen = optimizers.frozen(config.optimizer.freeze, names)

    def start(self, model: Pangu) -> State:
        """The state before the first step, in its place."""
        return steps.start(model, self.optimizer, self.frozen, self._ema)

    def begin(self, model: Pangu) -> State:
        """The same, wherever it lies."""
        return steps.begin(model, self.optimizer, self.frozen, self._ema)

    def step(self) -> Step:
        """To be jitted; its state may be donated."""
        section = self._config.step
        wanted = Objective(section.z_loss, section.balance, section.remat)
        return steps.make(
            self._like,
            self.optimizer,
            wanted,
            section.compute,
            section.accumulate,
            self._config.optimizer.ema,
        )
