"""Queries against caches of every kind, and what they get in NumPy float64."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pangu_jax.cache import LayerCache, Meta
from pangu_jax.kernels.attention import attend_cached
from pangu_jax.paged import Grid, PagedMeta
from pangu_jax.quant.cached import Rows
from tests.pangu_jax.kernels.oracle import array, wide

# Numbers of the cache and dtype of the queries; int8 with a scale for each slot or for each head's
# channels.
KINDS = (
    "float32",
    "bfloat16",
    *(f"{scales} {dtype}" for scales in ("slots", "fixed") for dtype in ("float32", "bfloat16")),
)


@dataclasses.dataclass
class Shape:
    """R rows of T queries, K heads of g queries and H channels; a row has S slots, in pages of Z
    where that is given.
    """

    R: int
    T: int
    K: int
    g: int
    H: int
    S: int
    Z: int | None = None

    @property
    def pages(self) -> int:
        """Of a row."""
        return 1 if self.Z is None else math.ceil(self.S / self.Z)


SHAPES = {
    "one slot": Shape(1, 1, 1, 1, 16, 1),
    "one query each": Shape(3, 1, 2, 5, 48, 70, 16),
    "pages of one slot": Shape(3, 2, 1, 3, 64, 66, 1),
    "pages beyond a vector": Shape(1, 33, 2, 2, 16, 67, 65),
    "odd pages": Shape(2, 5, 1, 4, 128, 130, 7),
    "contiguous": Shape(2, 3, 2, 1, 64, 200),
    "contiguous, many queries": Shape(3, 9, 2, 4, 32, 90),
    "many rows of many queries": Shape(5, 9, 2, 4, 64, 90, 32),
    "many queries": Shape(1, 40, 1, 5, 48, 150),
    "large pages": Shape(2, 1, 8, 2, 128, 300, 128),
}


@dataclasses.dataclass
class Case:
    """Arguments of an attention. `keys` and `values` are floats or Rows, without an axis for layers
    [M, K, Z, H]; scales are [K, 2, H] or None.
    """

    shape: Shape
    queries: jax.Array
    keys: Any
    values: Any
    scales: jax.Array | None
    tables: np.ndarray
    positions: np.ndarray
    valid: np.ndarray

    def meta(self) -> Any:
        """A Meta, or a PagedMeta with half of the rows in a grid of their own."""
        if self.shape.Z is None:
            return Meta(jnp.asarray(self.positions), jnp.asarray(self.valid))
        half = (len(self.tables) + 1) // 2
        parts = [slice(0, half), slice(half, None)] if half < len(self.tables) else [slice(None)]
        arrays = (self.positions, self.valid, self.tables)
        return PagedMeta(tuple(Grid(*(jnp.asarray(a[cut]) for a in arrays)) for cut in parts))

    def rows(self, which: Any) -> "Case":
        """Some of the rows; they keep their pages."""
        own = dict(queries=self.queries[which], tables=self.tables[which])
        own |= dict(positions=self.positions[which], valid=self.valid[which])
        if self.shape.Z is None:
            of = lambda held: jax.tree.map(lambda leaf: leaf[which], held)
            own |= dict(keys=of(self.keys), values=of(self.values))
            own["tables"] = np.arange(len(own["tables"]), dtype=np.int32)[:, None]
        return dataclasses.replace(self, **own)

    def of_layer(self, held: Any) -> Any:
        """The middle one of three layers, of which the others have no numbers."""
        other = lambda leaf: np.full_like(leaf, 99 if leaf.dtype == np.int8 else np.nan)
        stack = lambda leaf: jnp.asarray(np.stack([other(leaf), np.asarray(leaf), other(leaf)]))
        return jax.tree.map(stack, held)


def case(kind: str, seed: int, shape: Shape, sharp: float = 1.0, padding: bool = True) -> Case:
    """Pages in no order, the first of them shared by the first two rows; padding anywhere."""
    rng = np.random.default_rng(seed)
    R, T, K, S, Z = shape.R, shape.T, shape.K, shape.S, shape.Z or shape.S
    dtype = kind.split()[-1]
    spare = 0 if shape.Z is None else 2
    M = R * shape.pages + spare
    tables = np.arange(M).reshape(R, 1) if shape.Z is None else rng.permutation(M)[: M - spare]
    tables = tables.reshape(R, -1).astype(np.int32)
    if shape.Z and R > 1:
        tables[1, 0] = tables[0, 0]
    start = rng.integers(0, S - T + 1, (R, 1))
    start[0] = S - T  # one row is full
    valid = rng.uniform(size=(R, T)) < 0.8 if padding else np.ones((R, T), bool)
    valid[0, 0] = True

    def held(which: int) -> Any:
        if not kind.startswith(("slots", "fixed")):
            return array(rng.normal(size=(M, K, Z, shape.H)), dtype)
        numbers = array(rng.integers(-127, 128, (M, K, Z, shape.H)), "int8")
        scale = array(rng.uniform(0.3, 2, (M, K, Z)) / 73, "float32")
        return Rows(numbers, scale if kind.startswith("slots") else None)

    scales = array(rng.uniform(0.3, 2, (K, 2, shape.H)) / 73, "float32")
    return Case(
        shape,
        array(sharp * rng.normal(size=(R, T, K, shape.g, shape.H)), dtype),
        held(0),
        held(1),
        scales if kind.startswith("fixed") else None,
        tables,
        (start + np.arange(T)).astype(np.int32),
        valid,
    )


def attend(
    queries: Any,
    keys: Any,
    values: Any,
    meta: Any,
    scales: Any = None,
    implementation: Any = None,
    layer: Any = None,
) -> Any:
    """[R, T, K, g, H] of a cache of either kind."""
    flat = queries.reshape(1, -1, *queries.shape[2:]) if isinstance(meta, PagedMeta) else queries
    mixed = attend_cached(flat, LayerCache(keys, values, layer), meta, scales, implementation)
    return mixed.reshape(queries.shape)


def worth(case: Case, held: Any, which: int) -> np.ndarray:
    """The floats [M, K, Z, H] of keys or values."""
    if not isinstance(held, Rows):
        return wide(held)
    if held.scale is not None:
        return wide(held.numbers) * wide(held.scale)[..., None]
    assert case.scales is not None
    return wide(held.numbers) * wide(case.scales)[:, which, None]


def wanted(case: Case) -> np.ndarray:
    """Query by query, over the slots at or before it; zeros for padding."""
    q, Z = wide(case.queries), case.shape.Z or case.shape.S
    keys, values = worth(case, case.keys, 0), worth(case, case.values, 1)
    out = np.zeros(q.shape)
    for r, t in np.argwhere(case.valid):
        slots = np.arange(case.positions[r, t] + 1)
        pages = case.tables[r, slots // Z]
        scores = np.einsum("kgh,skh->kgs", q[r, t], keys[pages, :, slots % Z])
        scores /= np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[r, t] = np.einsum("kgs,skh->kgh", weights, values[pages, :, slots % Z])
    return out


def spoil(held: Any, where: np.ndarray) -> Any:
    """NaN in the slots where [M, Z] says so; of int8 caches in their scales."""
    at = jnp.asarray(where)[:, None]
    if not isinstance(held, Rows):
        return jnp.where(at[..., None], jnp.nan, held)
    assert held.scale is not None
    return dataclasses.replace(held, scale=jnp.where(at, jnp.nan, held.scale))


def unused(own: Case, beyond_own: bool) -> np.ndarray:
    """The slots [M, Z] that no query may see; or that the first query of a row may not."""
    Z = own.shape.Z or own.shape.S
    spoilt = np.ones((len(jax.tree.leaves(own.keys)[0]), Z), bool)
    for row, table in enumerate(own.tables):
        seen = own.positions[row] + 1
        last = seen[0] if beyond_own else seen[own.valid[row]].max(initial=0)
        slots = np.arange(last)
        spoilt[table[slots // Z], slots % Z] = False
    return spoilt
