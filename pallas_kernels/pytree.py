"""`@pytree`: frozen dataclasses that JAX can map over. Read `partials.py` next.

`jax.tree_util.register_dataclass` rebuilds nodes through `__init__`. Under a runtime type checker that
fails, because JAX also fills nodes with things that are not arrays (axis specs, shape structs, sentinels).
Here unflattening writes the fields directly, so only a user's construction is checked.
"""

import dataclasses
from typing import Any, Generic, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declare a field that is part of the tree's structure: hashable, and a change recompiles."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, or of shapes of such, of which plans are made."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and register it as a pytree; `static()` fields are its metadata."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # pyright: ignore
    data = tuple(field.name for field in fields if not field.metadata.get("static"))
    meta = tuple(field.name for field in fields if field.metadata.get("static"))

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data]
        return children, tuple(getattr(node, name) for name in meta)

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in data], tuple(getattr(node, name) for name in meta)

    def unflatten(metadata: tuple[Any, ...], children: Any) -> T:
        node = object.__new__(cls)
        for name, value in (*zip(meta, metadata, strict=True), *zip(data, children, strict=True)):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@pytree
class Flat(Generic[T]):
    """A tree's leaves, and how they make the tree: what JAX need not look for in every call of a program.

    That a tree of many nodes written in Python costs milliseconds each time, a tuple nothing.
    """

    leaves: tuple[Any, ...]
    structure: Any = static()

    @classmethod
    def of(cls, tree: T) -> "Flat[T]":
        """Of the tree as it is now."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple(leaves), structure)

    def tree(self) -> T:
        """The tree again."""
        return jax.tree.unflatten(self.structure, self.leaves)
