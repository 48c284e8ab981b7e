"""The engine's program: one step for all rows and tiles, or several for rows alone.

What a request has asked for lies on the device, in its slot; what changes from step to step comes
as two arrays of integers. All of this is per replica of attention: slots, pages, rows and tiles of
one know nothing of another's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from infer import sampler
from infer.sampler import Choice, Controls, History, Shaping
from infer.sampling import MAX_TOP_LOGPROBS
from infer.thinking import NO_BUDGET, NOT_THINKING, Budget
from pangu_jax import cache as caches
from pangu_jax import model as models
from pangu_jax.cache import Cache
from pangu_jax.model import Pangu
from pangu_jax.paged import Grid, PagedMeta
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh
from pangu_jax.pytree import pytree

# Ids that may end a request (own choice): more are refused.
MOST_STOPS = 64


@pytree
class Slots:
    """What the device knows of the request in each of S slots.

    token: chosen last, and not in the pages yet
    left: tokens that may still be chosen; 0 when it has finished
    thought, budget: see `thinking.Budget`
    keys: of its random draws, as numbers
    shaped, top: whether it shapes logits, and wants to know the likeliest tokens
    """

    token: Int[Array, " S"]
    left: Int[Array, " S"]
    thought: Int[Array, " S"]
    budget: Int[Array, " S"]
    top_k: Int[Array, " S"]
    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    keys: Any
    stops: Int[Array, "S X"]
    shaped: Any
    top: Any
    shaping: Shaping
    history: History


@pytree
class Rows:
    """Rows to decode: slot (S where there is none), position of the token, pages."""

    slot: Int[Array, " B"]
    position: Int[Array, " B"]
    tables: Int[Array, "B P"]

    @classmethod
    def of(cls, packed: Int[Array, "B packed"]) -> "Rows":
        """From one array."""
        return cls(packed[:, 0], packed[:, 1], packed[:, 2:])


@pytree
class Tiles:
    """Parts of prompts. The settings count where `last` is 1: there the request enters its slot."""

    slot: Int[Array, " P"]
    start: Int[Array, " P"]
    count: Int[Array, " P"]
    last: Int[Array, " P"]
    left: Int[Array, " P"]
    thought: Int[Array, " P"]
    budget: Int[Array, " P"]
    top_k: Int[Array, " P"]
    seed: Int[Array, " P"]
    which: Int[Array, " P"]
    shaped: Int[Array, " P"]
    top: Int[Array, " P"]
    stops: Int[Array, "P X"]
    tokens: Int[Array, "P T"]
    tables: Int[Array, "P M"]

    @classmethod
    def of(cls, packed: Int[Array, "P columns"], length: int) -> "Tiles":
        """From one array, the fields side by side."""
        single = len(dataclasses.fields(cls)) - 3
        columns = [packed[:, i] for i in range(single)]
        rest = jnp.split(packed[:, single:], [MOST_STOPS, MOST_STOPS + length], axis=1)
        return cls(*columns, *rest)


# The columns of the array of settings that are no integers.
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


def width(length: int, pages: int) -> int:
    """Columns of a packed tile."""
    return len(dataclasses.fields(Tiles)) - 3 + MOST_STOPS + length + pages


def empty(model: Pangu, slots: int) -> Slots:
    """Free slots, `slots` for each replica of attention, on the model's devices."""
    S, V = slots * model.layout.size(model.layout.of("batch")), model.config.vocab_size

    def blank() -> Slots:
        integers = lambda *shape: jnp.zeros((S, *shape), jnp.int32)
        floats = lambda *shape: jnp.zeros((S, *shape), jnp.float32)
        bools = lambda *shape: jnp.zeros((S, *shape), bool)
        return Slots(
            integers(),
            integers(),
            integers() + NOT_THINKING,
            integers() + NO_BUDGET,
            integers(),
            floats(),
            floats() + 1,
            floats(),
            jnp.zeros((S, 2), jnp.uint32),
            integers(MOST_STOPS) - 1,
            bools(),
            bools(),
            Shaping(floats() + 1, floats(), floats(), floats(V)),
            History(bools(V), integers(V)),
        )

    return jax.jit(blank, out_shardings=place(model))()


def place(model: Pangu) -> NamedSharding:
    """Where slots, rows and tiles lie: each replica of attention has its own."""
    return NamedSharding(model.mesh, model.layout.rows)


def shape_slot(
    slots: Slots, at: Int[Array, ""], bias: Array, prompt: Array, counts: Array
) -> Slots:
    """Slot `at` (of all replicas) with a request's own logit bias and history, each [V]."""
    put = lambda stack, row: lax.dynamic_update_index_in_dim(stack, row, at, 0)
    history = History(put(slots.history.prompt, prompt), put(slots.history.counts, counts))
    shaping = dataclasses.replace(slots.shaping, bias=put(slots.shaping.bias, bias))
    return dataclasses.replace(slots, shaping=shaping, history=history)


def step(
    model: Pangu,
    budget: Budget | None,
    pool: Cache,
    slots: Slots,
    rows: Int[Array, "B packed"],
    tiles: Int[Array, "P columns"] | None,
    floats: Float[Array, "P 6"] | None,
    steps: Int[Array, ""],
    *,
    length: int,
    most: int,
) -> tuple[Cache, Slots, Choice]:
    """The pool and slots afterwards, and the tokens: [B, most] of rows alone; with tiles
    [B + P, 1], of tiles where they are a prompt's last. -1 where there is none.

    budget: the markers and sentence ends of the tokenizer, if any; its limits are the slots'
    steps: how many tokens rows decode at most, without tiles
    length: tokens of a tile
    """
    where = model.layout

    def local(
        model: Pangu,
        budget: Budget | None,
        pool: Cache,
        slots: Slots,
        rows: Array,
        tiles: Array | None,
        floats: Array | None,
        steps: Array,
    ) -> tuple:
        own = Rows.of(rows)
        if tiles is None:
            return _decode(model, budget, pool, slots, own, steps, most)
        parts = Tiles.of(tiles, length)
        assert floats is not None
        slots = _enter(slots, parts, floats)
        pool, slots, choice = _once(model, budget, pool, slots, own, parts)
        return pool, slots, jax.tree.map(lambda array: array[:, None], choice)

    held, by_rows, same = caches.specs(pool, where), where.rows, PartitionSpec()
    in_specs = (same, held, by_rows, by_rows, by_rows, by_rows, same)
    run = on_mesh(model, local, in_specs, (held, by_rows, by_rows))
    return run(model, budget, pool, slots, rows, tiles, floats, steps)


def _enter(slots: Slots, tiles: Tiles, floats: Array) -> Slots:
    """The requests whose last tile this is, in their slots."""
    at = jnp.where(tiles.last > 0, tiles.slot, slots.token.shape[0])
    real = {name: floats[:, i] for i, name in enumerate(FLOATS)}
    make = lambda seed, which: jax.random.fold_in(jax.random.key(seed), which)
    keys = jax.random.key_data(jax.vmap(make)(tiles.seed, tiles.which))
    put = lambda old, new: old.at[at].set(new.astype(old.dtype), mode="drop")
    shaping = Shaping(
        put(slots.shaping.repetition, real["repetition"]),
        put(slots.shaping.presence, real["presence"]),
        put(slots.shaping.frequency, real["frequency"]),
        slots.shaping.bias,
    )
    return dataclasses.replace(
        slots,
        left=put(slots.left, tiles.left),
        thought=put(slots.thought, tiles.thought),
        budget=put(slots.budget, tiles.budget),
        top_k=put(slots.top_k, tiles.top_k),
        temperature=put(slots.temperature, real["temperature"]),
        top_p=put(slots.top_p, real["top_p"]),
        min_p=put(slots.min_p, real["min_p"]),
        keys=put(slots.keys, keys),
        stops=put(slots.stops, tiles.stops),
        shaped=put(slots.shaped, tiles.shaped),
        top=put(slots.top, tiles.top),
        shaping=shaping,
    )


def _decode(
    model: Pangu,
    budget: Budget | None,
    pool: Cache,
    slots: Slots,
    rows: Rows,
    steps: Array,
    most: int,
) -> tuple[Cache, Slots, Choice]:
    B, K = rows.slot.shape[0], min(MAX_TOP_LOGPROBS, model.config.vocab_size)
    replicas = model.layout.of("batch")
    floats = lambda *shape: jnp.zeros((B, most, *shape), jnp.float32)
    ids = lambda *shape: jnp.full((B, most, *shape), -1, jnp.int32)
    blank = Choice(ids(), floats(), (ids(K), floats(K)))

    def one(carry: tuple) -> tuple:
        i, pool, slots, choices = carry
        now = dataclasses.replace(rows, position=rows.position + i)
        pool, slots, choice = _once(model, budget, pool, slots, now, None)
        put = lambda buffer, new: lax.dynamic_update_index_in_dim(buffer, new, i, axis=1)
        return i + 1, pool, slots, jax.tree.map(put, choices, choice)

    def going(carry: tuple) -> Array:
        alive = jnp.any(_alive(carry[2], rows.slot))
        if replicas:  # all of them stop together: a step has collectives
            alive = lax.pmax(alive.astype(jnp.int32), replicas) > 0
        return (carry[0] < steps) & alive

    begin = (jnp.int32(0), pool, slots, boundary.varying(blank, replicas))
    return lax.while_loop(going, one, begin)[1:]


def _alive(slots: Slots, at: Array) -> Array:
    return (at < slots.left.shape[0]) & (slots.left.at[at].get(mode="clip") > 0)


def _once(
    model: Pangu,
    budget: Budget | None,
    pool: Cache,
    slots: Slots,
    rows: Rows,
    tiles: Tiles | None,
) -> tuple[Cache, Slots, Choice]:
    """One token of every row, and of every tile that is a prompt's last."""
    B, alive = rows.slot.shape[0], _alive(slots, rows.slot)
    tokens = jnp.maximum(slots.token.at[rows.slot].get(mode="clip"), 0)
    grids = [Grid(rows.position[:, None], alive[:, None], rows.tables)]
    at, positions = jnp.where(alive, rows.slot, slots.token.shape[0]), rows.position + 1
    if tiles is not None:
        P, T = tiles.tokens.shape
        offsets = jnp.arange(T)[None, :]
        valid = offsets < tiles.count[:, None]
        positions_of = tiles.start[:, None] + jnp.where(valid, offsets, 0)
        grids.append(Grid(positions_of, valid, tiles.tables))
        tokens = jnp.concatenate([tokens, tiles.tokens.reshape(-1)])
        at = jnp.concatenate([at, jnp.where(tiles.last > 0, tiles.slot, slots.token.shape[0])])
        positions = jnp.concatenate([positions, tiles.start + tiles.count])
    hidden, pool = _forward(model, tokens, PagedMeta(tuple(grids)), pool)
    ends = hidden[:B]
    if tiles is not None:
        of_tiles = hidden[B:].reshape(P, T, -1)[jnp.arange(P), jnp.maximum(tiles.count - 1, 0)]
        ends = jnp.concatenate([ends, of_tiles])
        last = tiles.tokens[jnp.arange(P), jnp.maximum(tiles.count - 1, 0)]
        put = slots.token.at[at[B:]].set(last, mode="drop")
        slots = dataclasses.replace(slots, token=put)
    slots, choice = _choose(models.logits(model, ends), budget, slots, at, positions)
    return pool, slots, choice


def _forward(model: Pangu, tokens: Array, meta: PagedMeta, pool: Cache) -> tuple[Array, Cache]:
    hidden, pool = models.forward(model, tokens, meta, pool)  # type: ignore[assignment]
    return boundary.whole(hidden, tokens.size, model.layout), pool


def _choose(
    logits: Float[Array, "N V"], budget: Budget | None, slots: Slots, at: Array, positions: Array
) -> tuple[Slots, Choice]:
    """The next token of the requests in slots `at`; nothing for those past the last slot."""
    own: Callable[[Array], Array] = lambda array: array.at[at].get(mode="clip")
    alive = at < slots.token.shape[0]

    def shaped() -> Array:
        shaping, history = jax.tree.map(own, (slots.shaping, slots.history))
        mine = (own(slots.shaped) & alive)[:, None]
        return jnp.where(mine, sampler.shape(logits, shaping, history), logits)

    logits = lax.cond(jnp.any(own(slots.shaped) & alive), shaped, lambda: logits)
    controls = Controls(
        jnp.where(alive, own(slots.temperature), 0.0),
        own(slots.top_k),
        own(slots.top_p),
        own(slots.min_p),
        jax.random.wrap_key_data(own(slots.keys)),
        None,
    )
    wanted = jnp.any(own(slots.top) & alive)
    choice = sampler.choose(logits, controls, positions, None, MAX_TOP_LOGPROBS, wanted)
    token, logprob, thought = choice.token, choice.logprob, own(slots.thought)
    if budget is not None:
        limited = dataclasses.replace(budget, limit=own(slots.budget))
        closes = limited.closes(thought, own(slots.token))
        token = jnp.where(closes, limited.end, token)
        logprob = jnp.where(closes, 0.0, logprob)  # it could not have been another
        thought = limited.count(thought, token)
    stopped = jnp.any(token[:, None] == own(slots.stops), axis=1)
    left = jnp.where(stopped, 0, own(slots.left) - 1)
    put = lambda old, new: old.at[at].set(new, mode="drop")
    once = own(slots.shaped).astype(jnp.int32)
    counts = slots.history.counts.at[at, token].add(once, mode="drop")
    slots = dataclasses.replace(
        slots,
        token=put(slots.token, token),
        left=put(slots.left, left),
        thought=put(slots.thought, thought),
        history=dataclasses.replace(slots.history, counts=counts),
    )
    return slots, Choice(jnp.where(alive, token, -1), logprob, choice.top)
