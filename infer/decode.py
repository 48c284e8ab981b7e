"""The programs of generation: one prefill, then a decode loop that stays on the device for up to
CHUNK tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from infer import sampler
from infer.sampler import Choice, Controls, History
from infer.thinking import Budget
from pangu_jax import cache as caches
from pangu_jax import model as models
from pangu_jax.cache import Cache, Meta
from pangu_jax.model import Pangu
from pangu_jax.parallel import boundary
from pangu_jax.parallel.layout import Layout
from pangu_jax.parallel.on_mesh import on_mesh
from pangu_jax.pytree import pytree, unchecked

# Decode steps of one dispatch at most (own choice): few host round trips, and Ctrl-C still answers.
CHUNK = 32


@pytree
class State:
    """Where decoding stands.

    token: chosen last, and not in the cache yet
    left: tokens each row may still choose; 0 when it has finished
    history, thought: only where a request needs them
    """

    cache: Cache
    token: Int[Array, " B"]
    left: Int[Array, " B"]
    history: History | None
    thought: Int[Array, " B"] | None


@pytree
class Request:
    """What stays the same for the rows of a batch.

    limits: the most tokens of each row
    stops: ids that end a row, padded with -1
    sources: the prompt that each row continues; None where each has its own, and on layouts with
        replicas of attention, which share no cache
    thought: how far the thought is that a prompt leaves open
    """

    controls: Controls
    limits: Int[Array, " B"]
    stops: Int[Array, "B X"]
    sources: Int[Array, " B"] | None
    budget: Budget | None
    thought: Int[Array, " B"] | None


@jax.jit(static_argnames="top")
def prefill(
    model: Pangu, tokens: Int[Array, "P T"], mask: Bool[Array, "P T"], request: Request, top: int
) -> tuple[State, Choice]:
    """The prompts in a fresh cache of their own width, and the first token of each row."""
    where, blank = model.layout, model.empty_cache(*tokens.shape)

    def local(model: Pangu, blank: Cache, tokens: Array, mask: Array, request: Request) -> tuple:
        P, T = tokens.shape
        hidden, cache = models.forward(model, tokens.reshape(-1), Meta.from_mask(mask), blank)
        assert cache is not None
        last = jnp.maximum(cache.length - 1, 0)
        ends = boundary.whole(hidden, P * T, where).reshape(P, T, -1)[jnp.arange(P), last]
        final = tokens[jnp.arange(P), last]
        history = None
        if request.controls.shaping is not None:
            history = History.of(tokens, mask, model.config.vocab_size)
        if request.sources is not None:
            take = lambda array: array[request.sources]
            cache = caches.take_rows(cache, request.sources)
            ends, final, history = take(ends), take(final), jax.tree.map(take, history)
        state = State(cache, final, request.limits, history, request.thought)
        return _advance(model, state, ends, request, top)

    rows, held = where.rows, caches.specs(blank, where)
    in_specs = (held, rows, rows, _request_specs(request, where))
    run = on_mesh(model, local, in_specs, (_state_specs(held, where), rows))
    state, choice = run(model, blank, tokens, mask, request)
    return state, jax.tree.map(lambda array: array[:, None], choice)


@jax.jit(static_argnames="top", donate_argnames="state")
def decode(
    model: Pangu, state: State, request: Request, steps: Int[Array, ""], top: int
) -> tuple[State, Choice]:
    """Up to `steps` more tokens of every unfinished row, in a Choice of [B, CHUNK] arrays; the
    token is -1 where a row had finished.
    """
    where = model.layout
    replicas = where.of("batch")

    def local(model: Pangu, state: State, request: Request, steps: Array) -> tuple:
        B = state.token.shape[0]
        K = min(top, model.config.vocab_size)
        floats = lambda *shape: jnp.zeros(shape, jnp.float32)
        blank = Choice(
            jnp.full((B, CHUNK), -1, jnp.int32),
            floats(B, CHUNK),
            (jnp.zeros((B, CHUNK, K), jnp.int32), floats(B, CHUNK, K)) if top else None,
        )

        def step(carry: tuple) -> tuple:
            i, state, choices = carry
            state, choice = _decode_one(model, state, request, top)
            put = lambda buffer, new: lax.dynamic_update_index_in_dim(buffer, new, i, axis=1)
            return i + 1, state, jax.tree.map(put, choices, choice)

        def going(carry: tuple) -> Array:
            alive = jnp.any(carry[1].left > 0)
            if replicas:  # all of them stop together: a step has collectives
                alive = lax.pmax(alive.astype(jnp.int32), replicas) > 0
            return (carry[0] < steps) & alive

        begin = (jnp.int32(0), state, boundary.varying(blank, replicas))
        _, state, choices = lax.while_loop(going, step, begin)
        return state, choices

    states = _state_specs(caches.specs(state.cache, where), where)
    in_specs = (states, _request_specs(request, where), PartitionSpec())
    run = on_mesh(model, local, in_specs, (states, where.rows))
    return run(model, state, request, steps)


def _state_specs(cache: Any, where: Layout) -> State:
    """How the mesh splits a State: its rows over replicas of attention."""
    rows = where.rows
    return unchecked(State, cache=cache, token=rows, left=rows, history=rows, thought=rows)


def _request_specs(request: Request, where: Layout) -> Request:
    rows, same, budget = where.rows, PartitionSpec(), None
    if request.budget is not None:
        budget = unchecked(Budget, limit=rows, start=same, end=same, ends_sentence=same)
    return unchecked(
        Request,
        controls=rows,
        limits=rows,
        stops=rows,
        sources=same,
        budget=budget,
        thought=rows,
    )


@jax.jit(static_argnames="capacity")
def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` slots."""
    return caches.grow(cache, capacity)


def _decode_one(model: Pangu, state: State, request: Request, top: int) -> tuple[State, Choice]:
    alive = state.left > 0
    meta = Meta(state.cache.length[:, None], alive[:, None])
    hidden, cache = models.forward(model, state.token, meta, state.cache)
    assert cache is not None
    hidden = boundary.whole(hidden, alive.size, model.layout)
    return _advance(model, dataclasses.replace(state, cache=cache), hidden, request, top)


def _advance(
    model: Pangu, state: State, ends: Float[Array, "B D"], request: Request, top: int
) -> tuple[State, Choice]:
    """The state after choosing the token that follows each row's last hidden state."""
    logits = models.logits(model, ends)
    choice = sampler.choose(logits, request.controls, state.cache.length, state.history, top)
    token, logprob, thought = choice.token, choice.logprob, state.thought
    if request.budget is not None:
        assert thought is not None
        closes = request.budget.closes(thought, state.token)
        token = jnp.where(closes, request.budget.end, token)
        logprob = jnp.where(closes, 0.0, logprob)  # it could not have been another
        thought = request.budget.count(thought, token)
    alive = state.left > 0
    token = jnp.where(alive, token, -1)
    stopped = jnp.any(token[:, None] == request.stops, axis=1)
    left = jnp.where(stopped | ~alive, 0, state.left - 1)
    history = state.history.add(token, alive) if state.history is not None else None
    return State(state.cache, token, left, history, thought), Choice(token, logprob, choice.top)
