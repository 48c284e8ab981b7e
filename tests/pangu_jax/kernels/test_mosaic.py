"""When kernels for a Hopper are taken, and that an H200's compiler takes them."""

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pangu_jax.kernels import choice, mosaic
from pangu_jax.kernels.choice import Kernel
from tests.pangu_jax.kernels import hopper

OLD = jax.__version_info__ < (0, 11)


@pytest.fixture
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic, "_missing", functools.cache(mosaic._missing.__wrapped__))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv(mosaic.WANTED, "1")


def card(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    device = SimpleNamespace(compute_capability=capability, device_kind="a card")
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.usefixtures("_asked")
def test_where_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "9.0")
    assert mosaic.why_not() == ""
    with mosaic.without():
        assert mosaic.why_not() == "within mosaic.without()"
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert mosaic.why_not() == "they need JAX 0.11"
    with mosaic.compiled():
        assert not mosaic.available()


@pytest.mark.usefixtures("_asked")
@pytest.mark.parametrize("capability", ["8.0", "10.0", ""])
def test_another_card(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, capability)
    assert mosaic.why_not() == "a card is not a Hopper"


@pytest.mark.usefixtures("_asked")
def test_they_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "9.0")
    monkeypatch.setenv(mosaic.WANTED, "0")
    assert mosaic.why_not() == "PANGU_JAX_MOSAIC is not 1"


def test_not_on_a_cpu() -> None:
    assert mosaic.why_not() in ("programs run elsewhere", "they need JAX 0.11")


@pytest.mark.usefixtures("_asked")
def test_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost counts, and nothing is left of it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for within in (mosaic.compiled, mosaic.interpreted):
        with within():
            assert mosaic.available()
            assert mosaic.is_interpreted() == (within is mosaic.interpreted)
            with mosaic.without():
                assert not mosaic.available()
                assert not mosaic.is_interpreted()
            assert mosaic.available()
        assert mosaic.why_not() == "programs run elsewhere"


@pytest.mark.skipif(OLD, reason="they need JAX 0.11")
def test_plans_take_them_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = "... cuda_compute_capability { major: 9 minor: 0 } ..."
    for wanted, description, taken in (("1", hopper, True), ("0", hopper, False), ("1", "", False)):
        monkeypatch.setenv(mosaic.WANTED, wanted)
        with mosaic.for_card(description):
            assert mosaic.available() == taken


def test_rows_that_a_tensor_core_reads() -> None:
    widths = {5120: 64, 1344: 64, 672: 32, 96: 32, 80: 16, 24: 0}
    assert {width: mosaic.swizzled(width, jnp.bfloat16) for width in widths} == widths
    assert [mosaic.swizzled(width, jnp.int8) for width in (5120, 1344, 672)] == [128, 64, 32]


def test_the_first_that_can_is_taken() -> None:
    no = Kernel(lambda x: x + 1, "cpu", lambda: "it cannot")
    yes = Kernel(lambda x: x + 2, "cpu", lambda: "")
    plain, kernels, one = lambda x: x, {"no": no, "yes": yes}, jnp.ones(())
    run = lambda wanted: float(jax.jit(choice.choose(plain, wanted, kernels))(one))
    assert [run(wanted) for wanted in (None, "yes", "plain")] == [3, 3, 1]
    with pytest.raises(NotImplementedError, match="it cannot"):
        choice.choose(plain, "no", kernels)
    gradient = lambda own: jax.grad(
        choice.choose(lambda x: 5 * x, "k", {"k": Kernel(lambda x: 7 * x, "cpu", lambda: "", own)})
    )(one)
    assert [float(gradient(own)) for own in (False, True)] == [5, 7]


def text(chosen: Any, platform: str = "cpu") -> str:
    """The program of a chosen function for a platform."""
    return jax.jit(chosen).trace(jnp.ones(())).lower(lowering_platforms=(platform,)).as_text()


def test_a_kernel_is_for_its_platform() -> None:
    """Elsewhere the plain program is; another platform's kernel is not looked for further."""
    card, own = Kernel(jnp.tanh, "cuda", lambda: ""), Kernel(jnp.cos, "cpu", lambda: "")
    both = choice.choose(jnp.sin, None, {"card": card, "own": own})
    assert "tanh" in text(both, "cuda")
    assert "stablehlo.sine" in text(both)
    assert not any(other in text(both) for other in ("tanh", "cosine"))
    one = choice.choose(jnp.sin, None, {"own": own})
    assert "cosine" in text(one)
    assert "cosine" not in text(one, "cuda")
    assert "tanh" in text(choice.choose(jnp.sin, "card", {"card": card, "own": own}))
    with mosaic.compiled():
        assert "tanh" not in text(choice.choose(jnp.sin, None, {"card": card}))
    with mosaic.interpreted():
        assert "tanh" in text(choice.choose(jnp.sin, None, {"card": card}))


def test_who_is_not_asked() -> None:
    """Other kernels than the one that is named, and all of them for the plain one's name."""

    def asked() -> str:
        raise AssertionError

    never, own = Kernel(jnp.tanh, "cuda", asked), Kernel(jnp.cos, "cpu", lambda: "")
    assert "cosine" in text(choice.choose(jnp.sin, "own", {"card": never, "own": own}))
    assert choice.choose(jnp.sin, "xla", {"card": never}) is jnp.sin
    assert choice.choose(jnp.sin, None, {}) is jnp.sin


@hopper.needs_one
@pytest.mark.skipif(hopper.ON_CARD, reason="a card does not look for races")
@pytest.mark.parametrize("waits", [True, False])
def test_who_does_not_wait_is_found(waits: bool) -> None:
    """The interpreter sees that something is read which may not have been loaded yet."""
    from jax.experimental.pallas import mosaic_gpu as gpu

    def body(x: Any, out: Any, held: Any, loaded: Any) -> None:
        i = lax.axis_index("row")
        gpu.copy_gmem_to_smem(x.at[i], held, loaded)
        if waits:
            gpu.barrier_wait(loaded)
        out[i] = held[...] * 2

    scratch = {"held": gpu.SMEM((128,), jnp.float32), "loaded": gpu.Barrier()}
    x = jnp.arange(256, dtype=jnp.float32).reshape(2, 128)
    run = jax.jit(lambda x: mosaic.call(body, [(x.shape, x.dtype)], [x], {"row": 2}, scratch)[0])
    with mosaic.interpreted():
        if waits:
            np.testing.assert_array_equal(run(x), 2 * np.asarray(x))
        else:
            with pytest.raises(Exception, match="RACE DETECTED"):
                jax.block_until_ready(run(x))


# What a subprocess compiles for an H200: bytes of arguments and temporaries, and calls of kernels.
PROGRAM = """
import json, os, sys
from pangu_jax.plan import target
h200 = target.load("h200")
os.environ.update(h200.environment)
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pangu_jax.cache import LayerCache
from pangu_jax.kernels import mosaic
from pangu_jax.kernels.attention import attend, attend_cached
from pangu_jax.kernels.experts import Experts, mix_experts
from pangu_jax.paged import Grid, PagedMeta
from pangu_jax.quant.cached import Rows
from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight

mesh = Mesh(np.array(h200.devices()), ("x",), axis_types=(AxisType.Auto,))
where = NamedSharding(mesh, PartitionSpec())
S = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)

def matrix(kind, *shape):
    if kind == "bf16":
        return S("bfloat16", *shape)
    scheme = Scheme("int8", *(["dynamic"] if kind == "w8a8" else []))
    return Weight(
        scheme=scheme, numbers=S("int8", *shape), scale=S("float32", *shape[:-1], 1)
    )

def experts(kind, tokens):
    mix = lambda x, chosen, weights, *held: mix_experts(x, chosen, weights, Experts(*held))
    given = S("bfloat16", tokens, 5120), S("int32", tokens, 8), S("float32", tokens, 8)
    return mix, (*given, matrix(kind, 64, 2, 1344, 5120), matrix(kind, 64, 5120, 1344))

def gradient(tokens):
    mix, given = experts("bf16", tokens)
    loss = lambda *given: mix(*given).sum(dtype="float32")
    return jax.grad(loss, (0, 2, 3, 4)), given

def layers(kind, tokens):
    def program(x, chosen, weights, *held):
        own = lambda layer: Experts(*held, layer)
        step = lambda x, layer: (mix_experts(x, chosen, weights, own(layer)), None)
        return lax.scan(step, x, jnp.arange(2))[0]
    given = S("bfloat16", tokens, 5120), S("int32", tokens, 8), S("float32", tokens, 8)
    return program, (*given, matrix(kind, 2, 64, 2, 1344, 5120), matrix(kind, 2, 64, 5120, 1344))

def eight(tokens, gradient):
    devices = np.array(target.load("h200:8").devices())
    mesh, split = Mesh(devices, ("x",), axis_types=(AxisType.Auto,)), PartitionSpec("x")
    def local(x, chosen, weights, *held):
        own = chosen - lax.axis_index("x") * 8
        own = jnp.where((own >= 0) & (own < 8), own, 8)
        return lax.psum(mix_experts(x, own, weights, Experts(*held), 64), "x")
    specs = (PartitionSpec(),) * 3 + (split,) * 2
    over = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    given = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec))
        for one, spec in zip(experts("bf16", tokens)[1], specs)
    ]
    loss = lambda *given: over(*given).sum(dtype="float32")
    return jax.grad(loss, (0, 2, 3, 4)) if gradient else over, given

def attention_of_layers(kind, rows, queries, slots, page):
    shape = 4, rows * slots // page, 8, page, 128
    held = S("bfloat16" if kind == "bf16" else "int8", *shape)
    if kind != "bf16":
        held = Rows(held, S("float32", *shape[:-1]) if kind == "slots" else None)
    scales = S("float32", 8, 2, 128) if kind == "fixed" else None
    tables = S("int32", rows, slots // page)
    grid = Grid(S("int32", rows, queries), S("bool", rows, queries), tables)
    def program(q, k, v, grid, scales):
        own = lambda layer: LayerCache(k, v, layer)
        meta = PagedMeta((grid,))
        step = lambda q, layer: (attend_cached(q, own(layer), meta, scales), None)
        return lax.scan(step, q, jnp.arange(4))[0]
    return program, (S("bfloat16", 1, rows * queries, 8, 5, 128), held, held, grid, scales)

def attention(kind, rows, queries, slots):
    pages = rows * slots // 64
    held = S("bfloat16" if kind == "bf16" else "int8", pages, 8, 64, 128)
    held = held if kind == "bf16" else Rows(held, S("float32", pages, 8, 64))
    grid = Grid(S("int32", rows, queries), S("bool", rows, queries), S("int32", rows, slots // 64))
    attend = lambda q, k, v, grid: attend_cached(q, LayerCache(k, v, None), PagedMeta((grid,)))
    return attend, (S("bfloat16", 1, rows * queries, 8, 4, 128), held, held, grid)

def whole(tokens):
    loss = lambda q, k, v, at: attend(q, k, v, at, at, at).sum(dtype="float32")
    held = S("bfloat16", 2, 8, tokens, 128)
    queries = S("bfloat16", 2, tokens, 8, 4, 128)
    return jax.grad(loss, (0, 1, 2)), (queries, held, held, S("int32", 2, tokens))

name, *rest = json.loads(sys.argv[1])
with mosaic.compiled():
    program, given = globals()[name](*rest)
    made = jax.jit(program).lower(*given).compile()
text, memory = made.as_text(), made.memory_analysis()
calls = [text.count(f'custom_call_target="{name}') for name in ("mosaic_gpu", "__cudnn")]
print(json.dumps([memory.argument_size_in_bytes, memory.temp_size_in_bytes, *calls]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    OLD or find_spec("jax_cuda13_plugin") is None, reason="needs JAX 0.11's compiler for NVIDIA"
)
@pytest.mark.parametrize(
    ("what", "most", "calls"),
    [
        (["experts", "bf16", 1], 0.01, [2, 0]),
        (["experts", "bf16", 256], 0.05, [2, 0]),
        (["experts", "w8a16", 256], 0.1, [2, 0]),
        (["experts", "w8a8", 256], 0.1, [2, 0]),
        (["experts", "w8a16", 4096], 0.75, [2, 0]),  # eight rows of each token
        (["layers", "bf16", 16], 0.01, [2, 0]),
        (["layers", "w8a16", 1], 0.01, [2, 0]),
        (["layers", "w8a8", 256], 0.05, [2, 0]),
        (["eight", 64, False], 0.1, [2, 0]),
        (["eight", 64, True], 0.25, [5, 0]),
        (["gradient", 1024], 0.2, [5, 0]),
        (["attention", "bf16", 1, 1, 8192], 0.1, [1, 0]),
        (["attention", "int8", 256, 1, 2048], 0.02, [1, 0]),
        (["attention_of_layers", "bf16", 1, 1, 32768, 64], 0.01, [1, 0]),
        (["attention_of_layers", "slots", 1, 512, 32768, 64], 0.1, [1, 0]),
        (["attention_of_layers", "fixed", 64, 1, 2048, 128], 0.01, [1, 0]),
        (["attention", "bf16", 1, 512, 2048], 1.5, [1, 0]),  # nearly all of it are the queries
        (["whole", 4096], 4, [0, 2]),
    ],
)
def test_an_h200_takes_them(what: list, most: float, calls: list[int]) -> None:
    """With no copy of weights or of a cache: temporaries are a small part of the arguments."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(what)]
    environment = {key: os.environ[key] for key in os.environ if key != "XLA_FLAGS"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    arguments, temporaries, *found = json.loads(done.stdout.splitlines()[-1])
    assert found == calls
    assert temporaries <= most * arguments
