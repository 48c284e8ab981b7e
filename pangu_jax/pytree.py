"""Frozen dataclasses that are JAX pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static() -> Any:
    """A field that is part of a `pytree` class's structure, not of its leaves: hashable data."""
    return dataclasses.field(kw_only=True, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are pytree children, but for those that are `static()`.

    Unlike `jax.tree_util.register_dataclass` it is rebuilt without its constructor: JAX puts specs,
    shapes and other placeholders where the arrays were, which no type check of the fields would let
    through.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    names = [field.name for field in fields if "static" not in field.metadata]
    fixed = [field.name for field in fields if "static" in field.metadata]

    def flatten(value: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names]
        return children, tuple(getattr(value, name) for name in fixed)

    def unflatten(kept: tuple[Any, ...], children: Any) -> T:
        fields = dict(zip(names, children, strict=True)) | dict(zip(fixed, kept, strict=True))
        return unchecked(made, **fields)

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


def unchecked(cls: type[T], **fields: Any) -> T:
    """An instance of a `pytree` class with something else where its arrays are, such as specs."""
    value = object.__new__(cls)
    for name, content in fields.items():
        object.__setattr__(value, name, content)
    return value
