"""Frozen dataclasses that are JAX pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are pytree children.

    Unlike `jax.tree_util.register_dataclass` it is rebuilt without its constructor: JAX puts specs,
    shapes and other placeholders where the arrays were, which no type check of the fields would let
    through.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten(value: T) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, children: Any) -> T:
        return unchecked(made, **dict(zip(names, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


def unchecked(cls: type[T], **fields: Any) -> T:
    """An instance of a `pytree` class with something else where its arrays are, such as specs."""
    value = object.__new__(cls)
    for name, content in fields.items():
        object.__setattr__(value, name, content)
    return value
