"""The engine's device side: pool, slots, and the programs for a few shapes of a step."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer import thinking
from infer.engine import step as programs
from infer.engine.request import Request
from infer.engine.scheduler import Batch, Row, Tile
from infer.engine.step import FLOATS
from infer.sampler import Choice
from infer.sampling import Sampling
from infer.thinking import NO_BUDGET, NOT_THINKING, Budget
from pangu_jax.errors import ConfigError
from pangu_jax.model import Pangu
from pangu_jax.precision import same_bits
from pangu_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes that programs are compiled for, each of one replica of attention.

    slots: requests at a time
    pages, page: how many pages there are, and tokens of a page
    tile, tiles: tokens of a tile, and tiles of a step at most
    context: tokens of a request at most, prompt and answer
    steps: tokens decoded in one dispatch at most
    deterministic: what a request gets does not depend on the others, to the last bit: all steps are
        padded to one size (on accelerators with tiles, too: their products differ by size)
    """

    slots: int
    pages: int
    page: int
    tile: int
    tiles: int
    context: int
    steps: int
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.context > self.pages * self.page:
            raise ConfigError(
                f"{self.pages:,} pages of {self.page} tokens have no room for a request of "
                f"{self.context:,}; take more pages, or a smaller context"
            )

    @property
    def table(self) -> int:
        """Pages of a request at most."""
        return -(-self.context // self.page)

    def row_sizes(self) -> list[int]:
        """Numbers of rows that steps are padded to."""
        return [max(self.slots, 8)] if self.deterministic else _sizes(self.slots)

    def tile_sizes(self, platform: str) -> list[int]:
        """Numbers of tiles that steps are padded to."""
        if self.deterministic:
            return [0, self.tiles] if platform == "cpu" else [self.tiles]
        return [0, *_sizes(self.tiles)]


def _sizes(most: int) -> list[int]:
    """Powers of eight, and the most: few programs to compile, and never eight times too many."""
    powers = itertools.takewhile(lambda size: size < most, (8**i for i in itertools.count()))
    return [*powers, most]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the device must know of a request when its prompt has been read.

    which: of the n completions of its prompt
    """

    sampling: Sampling
    seed: int
    which: int
    stops: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Flight:
    """A dispatched step: where each result will be, and whether anybody wants the likeliest."""

    where: list[tuple[Row | Tile, int]]
    choice: Choice
    top: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The tokens of a row or last tile, their log-probabilities, and the likeliest at each."""

    of: Row | Tile
    ids: np.ndarray
    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None


class Runner:
    """Runs the batches of a scheduler. Not thread-safe.

    asked: what each request wants; looked up when it enters its slot
    """

    def __init__(
        self,
        model: Pangu,
        shape: Shape,
        tokenizer: Tokenizer | None,
        asked: Callable[[Request], Asked],
    ) -> None:
        self.model, self.shape = model, shape
        self._asked = asked
        self._ranks = model.layout.size(model.layout.of("batch"))
        self._vocab = model.config.vocab_size
        platform = next(iter(model.embed[...].devices())).platform
        self._row_sizes, self._tile_sizes = shape.row_sizes(), shape.tile_sizes(platform)
        self._budget = _markers(tokenizer, self._vocab)
        self._leaves, structure = jax.tree.flatten(model)
        self._pool = jax.jit(lambda: model.empty_cache(shape.pages * self._ranks, shape.page))()
        self._slots = programs.empty(model, shape.slots)
        self._place = programs.place(model)
        self._step, self._shape_slot = _programs(
            structure, self._place, shape.tile, shape.steps, shape.deterministic
        )

    @property
    def compiled(self) -> int:
        """Programs compiled so far, for models of this structure: flat once all are warm."""
        return sum(getattr(program, "_cache_size")() for program in (self._step, self._shape_slot))  # noqa: B009

    def warm_up(self) -> Iterator[str]:
        """Compiles every program; says what comes next before each."""
        sizes = list(itertools.product(self._row_sizes, self._tile_sizes))
        rows = tiles = 0
        for done, (rows, tiles) in enumerate(sizes):
            yield f"compiling {done + 1} of {len(sizes) + 1}: {rows} rows, {tiles} tiles"
            jax.block_until_ready(self._run([], [], rows, tiles, 1))
        yield f"compiling {len(sizes) + 1} of {len(sizes) + 1}: shaped logits"
        blank = np.zeros(self._vocab)
        self._set_shape(0, blank, blank, blank)
        jax.block_until_ready(self._run([], [], rows, tiles, 1))  # finds everything in its place

    def dispatch(self, batch: Batch) -> Flight:
        """Starts a step; what it chooses is in the Flight when the device is done."""
        rows = next(n for n in self._row_sizes if n >= max(map(len, batch.rows)))
        tiles = next(n for n in self._tile_sizes if n >= max(map(len, batch.tiles)))
        for tile in itertools.chain(*batch.tiles):
            if tile.last:
                self._shape_logits(tile)
        steps = max((row.steps for row in itertools.chain(*batch.rows)), default=1)
        choice = self._run(batch.rows, batch.tiles, rows, tiles, steps)
        where: list[tuple[Row | Tile, int]] = []
        for rank, (own, parts) in enumerate(zip(batch.rows, batch.tiles, strict=True)):
            first = rank * (rows + tiles)
            where += [(row, first + i) for i, row in enumerate(own)]
            where += [(part, first + rows + i) for i, part in enumerate(parts) if part.last]
        top = any(self._asked(of.request).sampling.top_logprobs for of, _ in where)
        return Flight(where, choice, top)

    def collect(self, flight: Flight) -> list[Result]:
        """The results of a step; waits for the device."""
        ids, logprobs = np.asarray(flight.choice.token), np.asarray(flight.choice.logprob)
        top = None
        if flight.top:
            assert flight.choice.top is not None
            top = np.asarray(flight.choice.top[0]), np.asarray(flight.choice.top[1])
        found = []
        for of, i in flight.where:
            own = None if top is None else (top[0][i], top[1][i])
            found.append(Result(of, ids[i], logprobs[i], own))
        return found

    def _run(
        self,
        rows: list[list[Row]],
        tiles: list[list[Tile]],
        num_rows: int,
        num_tiles: int,
        steps: int,
    ) -> Choice:
        packed_rows = self._pack_rows(rows, num_rows)
        packed_tiles = floats = None
        if num_tiles:
            packed_tiles, floats = self._pack_tiles(tiles, num_tiles)
        put = functools.partial(jax.device_put, device=self._place)
        self._pool, self._slots, choice = self._step(
            self._leaves,
            self._budget,
            self._pool,
            self._slots,
            put(packed_rows),
            packed_tiles if packed_tiles is None else put(packed_tiles),
            floats if floats is None else put(floats),
            jnp.asarray(steps, jnp.int32),
        )
        return choice

    def _pack_rows(self, rows: list[list[Row]], count: int) -> np.ndarray:
        packed = np.zeros((self._ranks, count, 2 + self.shape.table), np.int32)
        packed[:, :, 0] = self.shape.slots
        for rank, own in enumerate(rows):
            for i, row in enumerate(own):
                line = packed[rank, i]
                line[0], line[1] = row.slot, row.position
                line[2:] = row.request.table
        return packed.reshape(self._ranks * count, -1)

    def _pack_tiles(self, tiles: list[list[Tile]], count: int) -> tuple[np.ndarray, np.ndarray]:
        width = programs.width(self.shape.tile, self.shape.table)
        packed = np.zeros((self._ranks, count, width), np.int32)
        floats = np.zeros((self._ranks, count, len(FLOATS)), np.float32)
        packed[:, :, 0] = self.shape.slots
        for rank, own in enumerate(tiles):
            for i, tile in enumerate(own):
                packed[rank, i], floats[rank, i] = self._pack_tile(tile, width)
        return packed.reshape(-1, width), floats.reshape(-1, len(FLOATS))

    def _pack_tile(self, tile: Tile, width: int) -> tuple[np.ndarray, np.ndarray]:
        line, floats, count = np.zeros(width, np.int32), np.zeros(len(FLOATS)), len(tile.tokens)
        line[:4] = tile.slot, tile.start, count, tile.last
        first = width - self.shape.table - self.shape.tile
        line[first : first + count] = tile.tokens
        line[first + self.shape.tile :] = tile.request.table
        if tile.last:
            request, asked = tile.request, self._asked(tile.request)
            wish = asked.sampling
            left = request.limit - (len(request.tokens) - request.prompt)
            limit = NO_BUDGET if wish.thinking_budget is None else wish.thinking_budget
            line[4:12] = (
                left,
                self._thought(request, wish),
                limit,
                max(wish.top_k, 0),
                asked.seed,
                asked.which,
                wish.shapes_logits,
                wish.top_logprobs > 0,
            )
            line[12:first] = -1
            line[12 : 12 + len(asked.stops)] = asked.stops
            floats[:] = (
                wish.temperature,
                wish.top_p,
                wish.min_p,
                wish.repetition_penalty,
                wish.presence_penalty,
                wish.frequency_penalty,
            )
        return line, floats

    def _thought(self, request: Request, sampling: Sampling) -> int:
        if sampling.thinking_budget is None or self._budget is None:
            return NOT_THINKING
        start, end = int(self._budget.start), int(self._budget.end)
        return thinking.used_so_far(start, end, request.tokens, request.prompt)

    def _shape_logits(self, tile: Tile) -> None:
        """Puts a request's logit bias and history into its slot, where it has any use for them."""
        request, sampling = tile.request, self._asked(tile.request).sampling
        if not sampling.shapes_logits:
            return
        bias = np.zeros(self._vocab)
        for id, value in sampling.logit_bias.items():
            bias[id] = value
        prompt, chosen = request.tokens[: request.prompt], request.tokens[request.prompt :]
        seen = np.bincount(prompt, minlength=self._vocab)
        counts = np.bincount(np.asarray(chosen, np.int64), minlength=self._vocab)
        self._set_shape(request.rank * self.shape.slots + tile.slot, bias, seen, counts)

    def _set_shape(self, at: int, bias: np.ndarray, seen: np.ndarray, counts: np.ndarray) -> None:
        self._slots = self._shape_slot(
            self._slots,
            jnp.asarray(at, jnp.int32),
            jnp.asarray(bias, jnp.float32),
            jnp.asarray(seen > 0),
            jnp.asarray(counts, jnp.int32),
        )


@functools.lru_cache(maxsize=8)
def _programs(
    structure: Any, place: Any, length: int, most: int, deterministic: bool
) -> tuple[Any, Any]:
    """The step of models of one structure, and `shape_slot`.

    The step takes leaves as a list: unwrapping hundreds of modules at every call takes longer than
    a small step. Slots come back to one `place`, by one name: else the next step is compiled again.
    """

    def traced(leaves: list, *arguments: Any) -> tuple:
        model = jax.tree.unflatten(structure, leaves)
        with same_bits() if deterministic else contextlib.nullcontext():
            return programs.step(model, *arguments, length=length, most=most)

    step = jax.jit(traced, donate_argnums=(2, 3), out_shardings=(None, place, None))
    return step, jax.jit(programs.shape_slot, donate_argnums=0, out_shardings=place)


def _markers(tokenizer: Tokenizer | None, vocab: int) -> Budget | None:
    """What closes thoughts; None without a tokenizer, or where it has no such markers."""
    if tokenizer is None or not thinking.has_markers(tokenizer, vocab):
        return None
    return thinking.budget(tokenizer, [None], vocab)
