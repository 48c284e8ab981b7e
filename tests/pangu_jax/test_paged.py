"""Pages instead of one row of slots: the same states, whatever the parts a sequence comes in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangu_jax import build
from pangu_jax import cache as caches
from pangu_jax import model as models
from pangu_jax.cache import Cache
from pangu_jax.kernels.attention import pages
from pangu_jax.model import Pangu
from pangu_jax.paged import Grid, PagedMeta
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh
from tests import layouts

SLOW = pytest.mark.slow
SIZE, PAGES = 4, 12
LENGTHS = (13, 6)
TOKENS = layouts.random_tokens(2, 13)

# The pages of the two sequences, in no order.
TABLES = np.array([[7, 2, 9, 4], [3, 8, 0, 0]], np.int32)


@functools.cache
def model_of(name: str, form: Any, where: str | None, cache: Any = None) -> Pangu:
    layout = None if where is None else layouts.named(where)
    like = layouts.abstract(layouts.MODELS[name], layout, form)
    own = layouts.lively(layouts.init(layouts.MODELS[name], form=form))
    placed = jax.device_put(own, build.places(like))
    return build.with_cache(build.with_weights(like, placed), cache)


@jax.jit
def call(model: Pangu, pool: Cache, tokens: Any, grids: tuple[Grid, ...]) -> tuple[Any, Cache]:
    """Logits of all flat tokens; every replica of attention does the same on a pool of its own."""
    where = model.layout

    def local(model: Pangu, pool: Cache, tokens: Any, grids: tuple[Grid, ...]) -> tuple:
        hidden, pool_after = models.forward(model, tokens, PagedMeta(grids), pool)
        rows = boundary.whole(hidden, tokens.size, where)
        return models.logits(model, rows), pool_after

    specs = caches.specs(pool, where)
    in_specs = (specs, where.rows, where.rows)
    return on_mesh(model, local, in_specs, (where.rows, specs))(model, pool, tokens, grids)


def in_parts(model: Pangu, parts: list[list[tuple[int, int, int]]]) -> list[np.ndarray]:
    """Logits of both sequences, read in calls of (sequence, start, count) that make a grid each, as
    wide as the widest.
    """
    ranks = model.layout.size(model.layout.of("batch"))
    pool = model.empty_cache(PAGES * ranks, SIZE)
    found = [np.zeros((length, 97), np.float32) for length in LENGTHS]
    for rows in parts:
        width = max(count for _, _, count in rows) + 1  # and some padding
        tokens = np.zeros((len(rows), width), np.int32)
        positions, valid = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        for i, (sequence, start, count) in enumerate(rows):
            tokens[i, :count] = TOKENS[sequence, start : start + count]
            positions[i, :count] = np.arange(start, start + count)
            valid[i, :count] = True
        tables = TABLES[[sequence for sequence, _, _ in rows]]
        # Half of the rows in a grid of their own.
        cuts = [slice(0, (len(rows) + 1) // 2), slice((len(rows) + 1) // 2, None)]
        grids = tuple(
            Grid(*(jnp.asarray(np.tile(a[cut], (ranks, 1))) for a in (positions, valid, tables)))
            for cut in cuts
            if len(rows[cut])
        )
        flat = np.concatenate([tokens[cut].reshape(-1) for cut in cuts])
        logits, pool = call(model, pool, jnp.asarray(np.tile(flat, ranks)), grids)
        mine = np.asarray(logits).reshape(ranks, len(rows), width, -1)[-1]
        for i, (sequence, start, count) in enumerate(rows):
            found[sequence][start : start + count] = mine[i, :count]
    return found


WHOLE = [[(0, 0, 13), (1, 0, 6)]]
ONE_BY_ONE = [[(0, i, 1), (1, i, 1)] if i < 6 else [(0, i, 1)] for i in range(13)]
# Tiles of one sequence in one call see each other's keys; rows and tiles mixed.
TILES = [[(0, 0, 5), (0, 5, 5), (1, 0, 3)], [(1, 3, 1), (0, 10, 2)], [(0, 12, 1), (1, 4, 2)]]


@pytest.mark.parametrize(
    ("name", "form", "where"),
    [
        ("dense", "separate", None),
        pytest.param("moge", "stacked", "h2p-8", marks=SLOW),
        pytest.param("dense", "stacked", "tp8", marks=SLOW),
        pytest.param("moge", "separate", "ep8", marks=SLOW),
        pytest.param("moge", "stacked", None, marks=SLOW),
        pytest.param("topk", "separate", "two axes of heads", marks=SLOW),
    ],
)
def test_parts_are_the_whole(name: str, form: Any, where: str | None) -> None:
    one = model_of(name, form, None)
    for parts in (WHOLE, ONE_BY_ONE, TILES):
        got = in_parts(model_of(name, form, where), parts)
        for sequence, length in enumerate(LENGTHS):
            wanted = one(TOKENS[sequence : sequence + 1, :length])[0]
            layouts.close(got[sequence], wanted)


def test_an_int8_pool_is_an_int8_cache() -> None:
    """The same rounded numbers: reading in parts or at once makes no difference."""
    model = model_of("dense", "separate", None, "int8")
    whole, ones = in_parts(model, WHOLE), in_parts(model, ONE_BY_ONE)
    exact = in_parts(model_of("dense", "separate", None), WHOLE)
    for a, b, c in zip(whole, ones, exact, strict=True):
        layouts.close(a, b)
        assert 0 < np.abs(a - c).max() < 0.1 * np.abs(c).max()


def test_what_somebody_left_in_a_page_is_not_seen() -> None:
    """Not even where it is no number."""
    model = model_of("dense", "separate", None)
    spoilt = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype) if leaf.ndim > 1 else leaf,
        model.empty_cache(PAGES, SIZE),
    )
    tokens = jnp.asarray(TOKENS[1, :6])
    grid = Grid(jnp.arange(6)[None], jnp.ones((1, 6), bool), jnp.asarray(TABLES[1:]))
    logits, pool = call(model, spoilt, tokens, (grid,))
    layouts.close(logits, model(TOKENS[1:, :6])[0])
    used = np.asarray(pool.keys[0])[[3, 8]].transpose(0, 2, 1, 3).reshape(8, -1)
    assert np.isfinite(used[:6]).all()
    assert np.isnan(used[6:]).all()  # padding is not written


def test_blocks_of_pages_give_what_single_pages_do(
    monkeypatch: pytest.MonkeyPatch, plain_xla: None
) -> None:
    """As on accelerators, in plain XLA."""
    model = model_of("dense", "separate", None)
    single = in_parts(model, TILES)
    monkeypatch.setattr(pages, "BLOCK", {"cpu": 2 * SIZE + 1, "default": 2 * SIZE + 1})
    jax.clear_caches()
    for a, b in zip(single, in_parts(model, TILES), strict=True):
        layouts.close(a, b)
    jax.clear_caches()
