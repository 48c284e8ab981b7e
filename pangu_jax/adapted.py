"""What a low-rank adapter is to a layer: a matrix that stays, and a small product beside it."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pangu_jax.pytree import pytree, static, unchecked


@pytree
class Adapted:
    """A matrix [*out, D] and its adapter; both may have more axes in front."""

    scale: float = static()
    base: Any
    a: Float[Array, "*each r D"]
    b: Float[Array, "*out r"]

    def __getitem__(self, everything: Any) -> "Adapted":
        """As of an array: `leaf[...]`."""
        if everything is not Ellipsis:
            raise TypeError("of an adapted matrix one can only take [...]")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Axes of the matrix."""
        return self.base.ndim


@pytree
class Adapters:
    """The adapters of a model: for each of its `blocks`, (A, B) by the name of a matrix."""

    scale: float = static()
    blocks: tuple[dict[str, tuple[Array, Array]], ...]


def attach(block: Any, adapters: Adapters, place: int) -> Any:
    """A layer, or a run of them, like this one with the adapters of that place beside its matrices;
    of specs in place of arrays likewise, with adapters that are whole on every device.
    """
    specs = isinstance(jax.tree.leaves(block)[0], PartitionSpec)
    block = jax.tree.map(lambda leaf: leaf, block)
    for name, pair in adapters.blocks[place].items():
        *path, last = name.split(".")
        module = functools.reduce(getattr, path, block)
        a, b = (PartitionSpec(), PartitionSpec()) if specs else pair
        base = getattr(module, last).get_value()
        leaf = unchecked(Adapted, base=base, a=a, b=b, scale=adapters.scale)
        setattr(module, last, nnx.Param(leaf))
    return block
