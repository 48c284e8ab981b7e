"""The KV cache in pages: rows of any length share one pool.

A pool is a `Cache` whose "sequences" are pages, `model.empty_cache(M, Z)`: arrays [.., M, K, Z, H]
of M pages with Z slots each. Which pages a row has, in order, is in its table; a page may be in the
tables of several rows that begin with the same tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pangu_jax.cache import Meta
from pangu_jax.pytree import pytree


@pytree
class Grid:
    """R rows of T tokens each.

    tables: the pages of every row; beyond its last token, anything that is a page
    """

    positions: Int[Array, "R T"]
    valid: Bool[Array, "R T"]
    tables: Int[Array, "R P"]


@pytree
class PagedMeta:
    """Where the tokens of one call stand: grids of rows, one behind the other in the flat stream.
    `Meta` of paged caches.
    """

    grids: tuple[Grid, ...]

    @property
    def positions(self) -> Int[Array, "1 N"]:
        """Of all tokens, in the order of the stream."""
        return jnp.concatenate([grid.positions.reshape(1, -1) for grid in self.grids], axis=1)

    @property
    def valid(self) -> Bool[Array, "1 N"]:
        """False for padding."""
        return jnp.concatenate([grid.valid.reshape(1, -1) for grid in self.grids], axis=1)

    def places(self, slots: int) -> tuple[Int[Array, "1 N"], Int[Array, "1 N"]]:
        """The page of every token, and its slot there; padding lies behind the last slot."""
        pages = [
            jnp.take_along_axis(grid.tables, grid.positions // slots, axis=1, mode="clip")
            for grid in self.grids
        ]
        page = jnp.concatenate([part.reshape(1, -1) for part in pages], axis=1)
        return page, jnp.where(self.valid, self.positions % slots, slots)

    def lengths(self, before: Int[Array, " M"]) -> Int[Array, " M"]:
        """Pages have none: rows know how far they are."""
        return before


AnyMeta = Meta | PagedMeta
