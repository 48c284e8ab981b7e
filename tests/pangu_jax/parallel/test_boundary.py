"""What crosses devices, token by token, against NumPy.

The oracle knows the coordinates of eight devices and which of them differ along which axes; every
device's result is compared. Numbers are small and whole, so sums are exact in any order.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.parallel import boundary, layout
from pangu_jax.parallel.layout import (
    AttentionRoles,
    ExpertRoles,
    FFNRoles,
    Layout,
    MeshShape,
    ParamRoles,
)
from pangu_jax.quant import rows
from tests import layouts

D = 6
EVERY = P(("data", "x", "y"))  # of arrays with an axis of devices in front
KINDS = ("flashcomm1", "all_reduce")
COUNTS = (16, 5, 1)  # tokens of a replica: shared evenly, unevenly, fewer than devices


# --- eight devices in NumPy

Place = dict[str, int]
PerDevice = list[np.ndarray]


def places(where: Layout) -> list[Place]:
    """The coordinates of every device, in the order of the mesh."""
    sizes = dataclasses.asdict(where.mesh)
    found = itertools.product(*(range(size) for size in sizes.values()))
    return [dict(zip(sizes, place, strict=True)) for place in found]


def rank(place: Place, axes: tuple[str, ...], where: Layout) -> int:
    """The number of a device among those along some axes, the first axis outermost."""
    found = 0
    for axis in axes:
        found = found * getattr(where.mesh, axis) + place[axis]
    return found


def ranks(axes: tuple[str, ...], where: Layout) -> int:
    """How many devices there are along some axes."""
    return len({rank(place, axes, where) for place in places(where)})


def peers(device: int, axes: tuple[str, ...], where: Layout) -> list[int]:
    """The devices that differ along `axes` only, in the order of the tokens."""
    found = places(where)
    same = [axis for axis in found[device] if axis not in axes]
    alike = [d for d in range(8) if all(found[d][a] == found[device][a] for a in same)]
    order = where.attention.batch + where.attention.heads
    return sorted(alike, key=lambda d: rank(found[d], order, where))


def with_zeros(tokens: np.ndarray, where: Layout) -> np.ndarray:
    """A replica's tokens, as many as the devices of its stream can share."""
    sharing = ranks(where.attention.heads, where) if where.boundary.kind == "flashcomm1" else 1
    while len(tokens) % sharing:
        tokens = np.concatenate([tokens, np.zeros_like(tokens[:1])])
    return tokens


def shards(replicas: np.ndarray, where: Layout) -> PerDevice:
    """What each device has of the tokens of all replicas."""
    found = []
    for place in places(where):
        tokens = with_zeros(replicas[rank(place, where.attention.batch, where)], where)
        if where.boundary.kind == "flashcomm1":
            heads = where.attention.heads
            tokens = np.split(tokens, ranks(heads, where))[rank(place, heads, where)]
        found.append(tokens)
    return found


def entered(held: PerDevice, axes: tuple[str, ...], where: Layout) -> PerDevice:
    """Each device's tokens and those of its peers; one copy of what several of them have."""
    if where.boundary.kind == "all_reduce":
        axes = tuple(axis for axis in axes if axis in where.attention.batch)
    return [np.concatenate([held[p] for p in peers(d, axes, where)]) for d in range(8)]


def left(parts: PerDevice, axes: tuple[str, ...], where: Layout) -> PerDevice:
    """Each device's part of the sum over its peers."""
    found = []
    for d in range(8):
        total = sum(parts[p] for p in peers(d, axes, where))
        shared = axes
        if where.boundary.kind == "all_reduce":
            shared = tuple(axis for axis in axes if axis in where.attention.batch)
        among = peers(d, shared, where)
        found.append(np.split(np.asarray(total), len(among))[among.index(d)])
    return found


# --- the same on the mesh


def on_devices(local: Callable[..., Any], where: Layout) -> Callable[..., Any]:
    """`local` of every device's own arguments; of results too there is one per device."""

    def one(arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], local(*jax.tree.map(lambda x: x[0], arguments)))

    run = jax.shard_map(one, mesh=where.make_mesh(), in_specs=EVERY, out_specs=EVERY)
    return lambda *arguments: run(arguments)


CASES = [
    *((name, kind) for name in ("h2p-8", "tp8", "two axes of heads") for kind in KINDS),
    ("ep8", "flashcomm1"),  # which has no heads to split: both kinds are one
    pytest.param(("another order", "flashcomm1"), marks=pytest.mark.slow),
    pytest.param(("another order", "all_reduce"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def where(request: pytest.FixtureRequest) -> Layout:
    return layouts.named(*request.param)


def modules(where: Layout) -> list[tuple[str, ...]]:
    """The axes of all modules that tokens enter; the vocabulary's have an order of their own."""
    every = (where.of("heads"), where.routed, where.of("ffn"), where.of("vocab"))
    return sorted({frozenset(axes): axes for axes in every if axes}.values())


def weights(axes: tuple[str, ...], where: Layout) -> np.ndarray:
    """A number per device for a module to multiply with: devices have the same part of a module's
    weights where they differ along other axes than the module's.
    """
    numbers = np.array([3, -2, 5, 7, -4, 1, 6, 2], np.float32)
    return numbers[[rank(place, axes, where) for place in places(where)]]


@dataclasses.dataclass
class Run:
    """Tokens of all replicas, and what every function made of them."""

    tokens: np.ndarray
    results: dict[tuple[str, ...], dict[str, Any]]
    """By the axes of a module and the name of the function."""
    padded: Any
    whole: Any


@pytest.fixture(scope="module")
def runs(where: Layout) -> list[Run]:
    """One program for all counts of tokens."""
    rng = np.random.default_rng(0)
    replicas = [rank(place, where.attention.batch, where) for place in places(where)]
    tokens = [rng.integers(-9, 9, (max(replicas) + 1, n, D)).astype(np.float32) for n in COUNTS]
    factors = {axes: weights(axes, where) for axes in modules(where)}

    def of_count(known: jax.Array, held: jax.Array, factors: Any) -> Any:
        of_modules = {}
        for axes in modules(where):
            h = boundary.enter(held, axes, where)
            summed = boundary.leave(h * factors[axes], axes, where)
            of_modules[axes] = {
                "enter": h,
                "gather": boundary.gather(held[:, 0], axes, where),
                "own": boundary.own(h, axes, where),
                "spread": boundary.spread(known, axes, where),
                "leave": summed,
                "back": boundary.leave(h, axes, where),
                "sums": boundary.whole(summed, len(known), where),
            }
        padded, whole = boundary.pad(known, where), boundary.whole(held, len(known), where)
        return of_modules, padded, whole

    def local(known: list[jax.Array], held: list[jax.Array], factors: Any) -> Any:
        return [of_count(*each, factors) for each in zip(known, held, strict=True)]

    known = [each[replicas] for each in tokens]
    held = [np.stack(shards(each, where)) for each in tokens]
    results = jax.jit(on_devices(local, where))(known, held, factors)
    return [Run(each, *found) for each, found in zip(tokens, results, strict=True)]


def equal(got: Any, wanted: PerDevice) -> None:
    np.testing.assert_array_equal(got, np.stack(wanted))


def test_tokens_enter_in_the_order_of_the_stream(runs: list[Run], where: Layout) -> None:
    for run in runs:
        held = shards(run.tokens, where)
        for axes in modules(where):
            wanted = entered(held, axes, where)
            equal(run.results[axes]["enter"], wanted)
            equal(run.results[axes]["gather"], [tokens[:, 0] for tokens in wanted])
            equal(run.results[axes]["own"], held)


def test_what_all_ranks_know_is_spread_alike(runs: list[Run], where: Layout) -> None:
    """A device has the ids of the very tokens that enter brings to it."""
    for run in runs:
        for axes in modules(where):
            equal(run.results[axes]["spread"], entered(shards(run.tokens, where), axes, where))


def test_a_sum_leaves_to_the_devices_its_tokens_are_of(runs: list[Run], where: Layout) -> None:
    for run in runs:
        for axes in modules(where):
            h = entered(shards(run.tokens, where), axes, where)
            parts = [
                tokens * factor for tokens, factor in zip(h, weights(axes, where), strict=True)
            ]
            equal(run.results[axes]["leave"], left(parts, axes, where))


def test_leaving_undoes_entering(runs: list[Run], where: Layout) -> None:
    """But for as many copies as devices took part."""
    for run in runs:
        held = shards(run.tokens, where)
        for axes in modules(where):
            count = len(peers(0, axes, where))
            equal(run.results[axes]["back"], [tokens * count for tokens in held])


def test_padding_and_the_whole_of_a_replica(runs: list[Run], where: Layout) -> None:
    for run in runs:
        own = [run.tokens[rank(p, where.attention.batch, where)] for p in places(where)]
        equal(run.padded, [with_zeros(tokens, where) for tokens in own])
        equal(run.whole, own)


def test_both_boundaries_give_the_same_sums(runs: list[Run], where: Layout) -> None:
    """All tokens of a replica, times the numbers of all devices that took part."""
    for run in runs:
        own = [run.tokens[rank(p, where.attention.batch, where)] for p in places(where)]
        for axes in modules(where):
            total = sum(weights(axes, where)[peers(0, axes, where)])
            equal(run.results[axes]["sums"], [tokens * total for tokens in own])


def test_over_no_axes_nothing_happens() -> None:
    one, x = layout.load("single"), jnp.ones((3, D))
    for gather in ("exact", "int8"):
        boundaries = dataclasses.replace(one.boundary, gather=gather)
        where = dataclasses.replace(one, boundary=boundaries)
        for axes in ((), ("x", "y")):
            assert boundary.enter(x, axes, where) is x
            assert boundary.gather(x, axes, where) is x
            assert boundary.own(x, axes, where) is x
            assert boundary.spread(x, axes, where) is x
        assert boundary.leave(x, (), where) is x
        assert boundary.pad(x, where) is x
        assert boundary.unshard({"a": x}, {"a": P("data", None)}, where)["a"] is x


# --- int8

# Within float32's normal numbers, scales too.
finite = st.integers(-(2**20), 2**20) | st.floats(-(2.0**99), 2.0**99, width=32)
elements = finite.map(lambda x: 0.0 if abs(x) < 1e-30 else float(x))
quantized = jax.jit(rows.quantize)
restored = jax.jit(rows.dequantize, static_argnums=2)


def check_quantized(x: np.ndarray, numbers: Any, scale: Any) -> None:
    """What NumPy makes of float32 numbers, token by token: the numbers bit for bit, the scale but
    for its last bit, as XLA multiplies by 1 / 127.
    """
    assert numbers.dtype == np.int8
    assert scale.dtype == np.float32
    for token, row, one in zip(x.astype(np.float32), numbers, scale, strict=True):
        np.testing.assert_array_max_ulp(one, np.abs(token).max(keepdims=True) / np.float32(127), 1)
        np.testing.assert_array_equal(row, np.rint(token / one) if one else 0 * token)


@settings(deadline=None)
@given(arrays.arrays(np.float32, (4, D), elements=elements))
def test_quantized_numbers_are_within_half_a_scale(x: np.ndarray) -> None:
    numbers, scale = quantized(x)
    check_quantized(x, np.asarray(numbers), np.asarray(scale))
    back = np.asarray(restored(numbers, scale, np.float32), np.float64)
    assert (np.abs(back - x) <= np.asarray(scale, np.float64) * (0.5 + 1e-4)).all()
    assert (np.abs(np.asarray(numbers)).max(1) == np.where(x.any(1), 127, 0)).all()


def test_tokens_of_zeros_and_halves() -> None:
    """A scale of 0, and no division by it; halves go to the even number; signs are kept."""
    x = np.array([[0, 0, 0, 0], [127, 0.5, 1.5, -2.5], [-254, 254, -1, 1]], np.float32)
    with jax.debug_nans(True):
        numbers, scale = rows.quantize(jnp.asarray(x))
    np.testing.assert_array_equal(scale, [[0], [1], [2]])
    np.testing.assert_array_equal(numbers, [[0, 0, 0, 0], [127, 0, 2, -2], [-127, 127, 0, 0]])
    back = rows.dequantize(numbers, scale, jnp.float32)
    np.testing.assert_array_equal(back, [[0, 0, 0, 0], [127, 0, 2, -2], [-254, 254, 0, 0]])


def test_bf16_tokens_are_scaled_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, D)), jnp.bfloat16)
    numbers, scale = quantized(x)
    check_quantized(np.asarray(x), np.asarray(numbers), np.asarray(scale))
    assert restored(numbers, scale, jnp.bfloat16).dtype == jnp.bfloat16


SENT = [("h2p-8", "flashcomm1"), ("h2p-8", "all_reduce"), ("two axes of heads", "flashcomm1")]


def random_stream(where: Layout, dtype: Any, tokens: int = 3) -> jax.Array:
    """As many random tokens on every device; the first of them zero."""
    x = np.random.default_rng(0).normal(size=(8, tokens, D)).astype(np.float32)
    x[:, 0] = 0
    if where.boundary.kind == "all_reduce":  # the same for all ranks of a replica
        x = x[[rank(place, where.attention.batch, where) for place in places(where)]]
    return jnp.asarray(x, dtype)


def entering(where: Layout, exact: bool) -> Callable[[jax.Array], jax.Array]:
    """`enter` of the routed experts, of every device's tokens."""
    return on_devices(lambda x: boundary.enter(x, where.routed, where, exact=exact), where)


@pytest.fixture(scope="module", params=SENT, ids="-".join)
def sending(request: pytest.FixtureRequest) -> Layout:
    return layouts.named(*request.param, "int8")


@dataclasses.dataclass
class Sent:
    """What int8 and exact gathers give, and the gradients of both for the same cotangent."""

    int8: np.ndarray
    exact: np.ndarray
    cotangent: np.ndarray
    int8_gradient: np.ndarray
    exact_gradient: np.ndarray


@pytest.fixture(scope="module")
def sent(sending: Layout) -> list[Sent]:
    """Of float32 and of bfloat16."""

    def of_tokens(x: jax.Array) -> Any:
        """Gradients are taken outside of shard_map."""
        (int8, to_int8), (exact, to_exact) = (
            jax.vjp(entering(sending, exact), x) for exact in (False, True)
        )
        cotangent = (jnp.arange(int8.size, dtype=jnp.int32) % 7).reshape(int8.shape)
        cotangent = cotangent.astype(x.dtype)
        return int8, exact, cotangent, to_int8(cotangent)[0], to_exact(cotangent)[0]

    streams = [random_stream(sending, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    return [Sent(*found) for found in jax.jit(lambda xs: [of_tokens(x) for x in xs])(streams)]


def test_int8_on_the_wire_is_int8_after_the_gather(sent: list[Sent]) -> None:
    """Bit for bit, and not the exact numbers."""
    for run, dtype in zip(sent, (jnp.float32, jnp.bfloat16), strict=True):
        assert run.int8.dtype == run.exact.dtype == dtype
        pieces = (each.reshape(-1, 6, D) for each in map(np.asarray, (run.int8, run.exact)))
        for int8, exact in zip(*pieces, strict=True):
            np.testing.assert_array_equal(int8, restored(*quantized(exact), dtype))
            assert (int8 != exact).any()


def test_what_must_be_exact_is_exact(sent: list[Sent], sending: Layout) -> None:
    stream = random_stream(sending, jnp.float32)
    equal(sent[0].exact, entered(list(np.asarray(stream)), sending.routed, sending))


def test_the_gradient_of_an_int8_gather_is_that_of_an_exact_one(
    sent: list[Sent], sending: Layout
) -> None:
    axes = tuple(axis for axis in sending.routed if axis in sending.stream)
    for run in sent:
        np.testing.assert_array_equal(run.int8_gradient, run.exact_gradient)
        cotangents = list(np.asarray(run.cotangent, np.float32))
        scatter = dataclasses.replace(sending, boundary=layout.Boundary("flashcomm1"))
        equal(np.asarray(run.exact_gradient, np.float32), left(cotangents, axes, scatter))


GATHER = re.compile(r"stablehlo\.all_gather.*-> tensor<(?:\d+x)*(\d+)x([a-z]\w*)>")


def test_what_really_moves_is_int8(sending: Layout) -> None:
    """Numbers of a byte and one float32 per token; no activations."""
    x = jax.ShapeDtypeStruct((8, 3, D), jnp.bfloat16)
    moved = lambda exact: GATHER.findall(jax.jit(entering(sending, exact)).lower(x).as_text())
    assert sorted(moved(False)) == [("1", "f32"), (str(D), "i8")]
    assert moved(True) == [(str(D), "bf16")]


# --- weights in parts

SERVERS = {
    "fsdp": layouts.named("fsdp"),
    "fsdp-h2p-4x2": layouts.named("fsdp-h2p-4x2"),
    "two axes": Layout(
        MeshShape(2, 2, 2),
        AttentionRoles(("data", "x"), ("y",)),
        ExpertRoles((), ("y",)),
        FFNRoles(("y",)),
        ("y",),
        ParamRoles(("data", "x")),
    ),
}


@pytest.fixture(params=SERVERS, scope="module")
def servers(request: pytest.FixtureRequest) -> Layout:
    return SERVERS[request.param]


def whole_numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)


def test_weights_come_together_and_their_gradients_part(servers: Layout) -> None:
    """Of a layer, of a stack of layers (with an axis in front of its spec), of what has no parts;
    each device wants something else of them.
    """
    fsdp = servers.params.fsdp
    parts = fsdp if len(fsdp) > 1 else fsdp[0]
    specs = {"layer": P(None, parts), "stack": P(parts, None), "norm": P(None)}
    placed = {**specs, "stack": P(None, parts, None)}
    weights = {
        "layer": whole_numbers(3, 8),
        "stack": whole_numbers(2, 16, 3),
        "norm": whole_numbers(5),
    }
    wanted = {name: whole_numbers(8, *leaf.shape) for name, leaf in weights.items()}

    def local(weights: Any, wanted: Any) -> Any:
        found = boundary.unshard(weights, specs, servers)
        return jax.tree.map(lambda leaf, factor: leaf[None] * factor, found, wanted)

    run = jax.shard_map(local, mesh=servers.make_mesh(), in_specs=(placed, EVERY), out_specs=EVERY)

    @jax.jit
    def both(weights: Any, wanted: Any) -> Any:
        products, back = jax.vjp(lambda weights: run(weights, wanted), weights)
        return products, back(jax.tree.map(jnp.ones_like, products))[0]

    products, gradients = both(weights, wanted)
    for name, leaf in weights.items():
        np.testing.assert_array_equal(products[name], leaf * wanted[name])
        np.testing.assert_array_equal(gradients[name], wanted[name].sum(0))


def test_rows_are_looked_up_where_they_lie(servers: Layout) -> None:
    """As if every device had the whole table; a row's gradient is the sum over its tokens."""
    table, ids = whole_numbers(11, 16), np.random.default_rng(1).integers(0, 11, (8, 3))
    factors = whole_numbers(8, 3, 16)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        return boundary.look_up(table, ids[0], servers)[None]

    specs = (P(None, servers.params.fsdp), EVERY)
    run = jax.shard_map(local, mesh=servers.make_mesh(), in_specs=specs, out_specs=EVERY)

    @jax.jit
    def both(table: Any, ids: Any, factors: Any) -> Any:
        found, back = jax.vjp(lambda table: run(table, ids), table)
        return found, back(factors)[0]

    found, gradient = both(table, ids.astype(np.int32), factors)
    np.testing.assert_array_equal(found, table[ids])
    wanted = np.zeros_like(table)
    for device, token in np.ndindex(ids.shape):
        wanted[ids[device, token]] += factors[device, token]
    np.testing.assert_array_equal(gradient, wanted)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_that_looks_up_makes_no_copy_of_the_table(dtype: str) -> None:
    """With the flags of this suite JAX 0.10 makes none in any case; later ones have no flags."""

    @jax.jit
    def walk(table: jax.Array, ids: jax.Array, steps: jax.Array) -> jax.Array:
        def step(i: jax.Array, ids: jax.Array) -> jax.Array:
            return jnp.argmax(boundary.look_up(table, ids, layout.load(None)), axis=-1) + i

        return lax.fori_loop(0, steps, step, ids)

    table = jax.ShapeDtypeStruct((512, 256), dtype)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = walk.lower(table, jax.ShapeDtypeStruct((3,), jnp.int32), count).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256
