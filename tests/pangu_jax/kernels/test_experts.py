"""Routed experts of every kind against a loop over pairs in NumPy float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.kernels import native
from pangu_jax.kernels.experts import mix_experts
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.precision import same_bits
from pangu_jax.quant import weight
from pangu_jax.quant.scheme import Scheme
from tests.pangu_jax.kernels import oracle
from tests.pangu_jax.kernels.oracle import FP8, KINDS, SOME, some_kinds

SLOW = pytest.mark.slow
all_kinds = pytest.mark.parametrize("kind", SOME)
IMPLEMENTATIONS = ("native", "blocks", None)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
unnamed_or_plain = pytest.mark.parametrize("implementation", [None, "blocks"])
by_name = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])


def mix(
    x: Any,
    chosen: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    implementation: Any = None,
    among: int | None = None,
    layer: Any = None,
) -> Any:
    held = Experts(gate_up, down, layer)
    return mix_experts(x, chosen, weights, held, among, implementation)


run = jax.jit(mix, static_argnames=("implementation", "among"))


def tolerance(kind: str, implementation: Any) -> float:
    """Of what is rounded in between a number may fall the other way."""
    if "dynamic" in kind:
        return 0.1 if "fp8" in kind else 0.03
    if "bfloat16" in kind:
        own = 2**-7 if kind.startswith("int4") else 2**-8
        return own if implementation == "native" else 0.03
    return 2e-6


def check(kind: str, implementation: Any, arguments: Any, got: Any) -> None:
    wanted, size = oracle.mix_experts(*arguments)
    oracle.close(got, wanted, tolerance(kind, implementation), implementation, size)


@settings(max_examples=20)
@given(
    st.sampled_from([*KINDS, *FP8]),
    st.integers(0, 999),
    st.sampled_from([(1, 1, 1, 1, 7), (1, 4, 9, 17, 130), (5, 2, 3, 130, 17), (70, 3, 16, 7, 1)]),
    st.sampled_from(["spread", "one", "some elsewhere", "all elsewhere"]),
)
def test_odd_shapes(kind: str, seed: int, shape: tuple, pattern: str) -> None:
    """Tokens, choices, experts, inner width and width; some experts have no tokens."""
    arguments, among = oracle.experts(kind, seed, *shape, pattern), 2 * shape[2]
    for implementation in ("native", "blocks"):
        got = run(*arguments, implementation, among)
        assert got.dtype == arguments[0].dtype
        check(kind, implementation, arguments, got)


@settings(max_examples=20)
@given(
    st.sampled_from(oracle.INT4[:4]),
    st.integers(0, 999),
    st.sampled_from([(1, 1, 1, 6, 6), (1, 4, 9, 18, 132), (5, 2, 3, 132, 12), (70, 3, 16, 6, 18)]),
)
def test_groups(kind: str, seed: int, shape: tuple) -> None:
    arguments = oracle.experts(kind, seed, *shape)
    for implementation in ("native", "blocks"):
        check(kind, implementation, arguments, run(*arguments, implementation))


@pytest.mark.parametrize("kind", oracle.INT4[4:6])
def test_whole_vectors_of_groups(kind: str) -> None:
    for N in (1, 40):
        arguments = oracle.experts(kind, N, N, 2, 3, 96, 160)
        for implementation in IMPLEMENTATIONS:
            check(kind, implementation, arguments, run(*arguments, implementation))


@some_kinds
@by_name
@pytest.mark.parametrize("N", [9, 70])
def test_many_pieces(N: int, kind: str, implementation: Any) -> None:
    """Both products are in pieces for several threads."""
    arguments = oracle.experts(kind, 0, N, 2, 3, 300, 517)
    got = run(*arguments, implementation)
    check(kind, implementation, arguments, got)


def test_what_is_between_is_rounded_to_int8() -> None:
    """Of these numbers none falls the other way."""
    arguments = oracle.experts("dynamic float32", 3, 5, 2, 3, 64, 17)
    wanted, _ = oracle.mix_experts(*arguments)
    for implementation in IMPLEMENTATIONS:
        oracle.close(run(*arguments, implementation), wanted, 5e-6, implementation)


@some_kinds
@by_name
def test_a_layer_of_a_stack(kind: str, implementation: Any) -> None:
    x, chosen, weights, *_ = oracle.experts(kind, 0, 5, 2, 4, 17, 64)
    held = oracle.stack(kind, 0, 3, 4, 17, 64)
    for layer in (0, 2):
        own = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf)[layer], held)
        got = run(x, chosen, weights, *held, implementation, layer=np.int32(layer))
        check(kind, implementation, (x, chosen, weights, *own), got)


@all_kinds
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    """To the last bit, with one token or seventy for an expert."""
    x, chosen, weights, *held = oracle.experts(kind, 0, 70, 3, 4, 45, 91)
    one = lambda part: mix(*(leaf[None] for leaf in part), *held, "native")[0]
    alone = jax.jit(lambda *rows: lax.map(one, rows))(x, chosen, weights)
    rows = [np.array(part) for part in (x, chosen, weights)]
    with same_bits():
        for count in (1, 2, 3, 5, 8, 70):
            first = run(*(part[:count] for part in rows), *held, "native")
            oracle.same(first, np.asarray(alone)[:count], count)
        turned = run(*(part[::-1] for part in rows), *held, "native")
        oracle.same(np.asarray(turned)[::-1], alone)
        rows[1][1:] = rows[1][0, 0]  # a crowd
        oracle.same(np.asarray(run(*rows, *held, "native"))[0], np.asarray(alone)[0])


@some_kinds
@by_name
def test_what_is_no_number_stays_in_its_row(kind: str, implementation: Any) -> None:
    for N in (9, 70):
        x, *rest = oracle.experts(kind, 0, N, 2, 3, 17, 64)
        bad = np.isnan(oracle.wide(run(x.at[4, 40].set(jnp.nan), *rest, implementation)))
        np.testing.assert_array_equal(bad, np.broadcast_to(np.arange(N)[:, None] == 4, bad.shape))


@by_name
def test_experts_that_nobody_chose_have_no_influence(implementation: Any) -> None:
    x, chosen, weights, gate_up, down = oracle.experts("float32", 0, 9, 2, 6, 17, 64)
    chosen = chosen // 2 * 2  # 0, 2 and 4
    wanted, _ = oracle.mix_experts(x, chosen, weights, gate_up, down)
    spoilt = [stack.at[1::2].set(jnp.nan) for stack in (gate_up, down)]
    oracle.close(run(x, chosen, weights, *spoilt, implementation), wanted, 1e-5)


@by_name
def test_a_token_of_nobody_here_gets_zeros(implementation: Any) -> None:
    x, chosen, weights, *held = oracle.experts("float32", 0, 9, 2, 3, 17, 64)
    got = np.asarray(run(x, chosen.at[2].set(3), weights, *held, implementation, 6))
    np.testing.assert_array_equal(got[2], 0)
    assert np.delete(got, 2, 0).all()


@oracle.kinds(["float32"], ["weight-only float32", "dynamic float32"])
def test_gradients_are_those_of_plain_xla(kind: str) -> None:
    """Of rows, routing weights and float matrices."""
    arguments = oracle.experts(kind, 0, 9, 3, 5, 17, 13, "some elsewhere")
    pull = oracle.activations("float32", 2, 9, 13)
    argnums = (0, 2, 3, 4) if kind == "float32" else (0, 2)

    def gradients(implementation: Any) -> Any:
        loss = lambda *given: (mix(*given, implementation, 10) * pull).sum()
        return jax.jit(jax.grad(loss, argnums))(*arguments)

    for got, wanted in zip(gradients(None), gradients("blocks"), strict=True):
        assert np.asarray(wanted).any()
        oracle.close(got, oracle.wide(wanted), 1e-5)


@every_implementation
def test_no_gradient_of_a_stack(implementation: Any) -> None:
    x, chosen, weights, *_ = oracle.experts("float32", 0, 5, 2, 4, 17, 64)
    held = oracle.stack("float32", 0, 3, 4, 17, 64)
    loss = lambda x, layer: mix(x, chosen, weights, *held, implementation, layer=layer).sum()
    with pytest.raises(NotImplementedError, match="of a layer's own experts"):
        jax.eval_shape(jax.grad(loss), x, jnp.int32(0))


@pytest.mark.parametrize("kind", ["float32", "dynamic float32"])
@unnamed_or_plain
def test_under_vmap(kind: str, implementation: Any) -> None:
    cases = [oracle.experts(kind, i, 5, 2, 3, 17, 9) for i in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    got = jax.jit(jax.vmap(functools.partial(mix, implementation=implementation)))(*batch)
    for row, own in zip(got, cases, strict=True):
        check(kind, implementation, own, row)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("float32", None),
        pytest.param("weight-only float32", "native", marks=SLOW),
        pytest.param("float32", "blocks", marks=SLOW),
    ],
)
def test_experts_of_eight_devices(kind: str, implementation: Any) -> None:
    """Each has two, and adds nothing for those of others; values and gradients."""
    arguments = oracle.experts(kind, 0, 9, 3, 16, 17, 13)

    def local(x: Any, chosen: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        own = chosen - 2 * lax.axis_index("x")
        own = jnp.where((own >= 0) & (own < 2), own, 2)
        return lax.psum(mix(x, own, weights, gate_up, down, implementation, 16), "x")

    specs = (P(), P(), P(), P("x"), P("x"))
    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=P())
    check(kind, implementation, arguments, jax.jit(over)(*arguments))
    argnums = (0, 2, 3, 4) if kind == "float32" else (0, 2)
    gradients = lambda f: jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argnums))(*arguments)
    plain = gradients(functools.partial(mix, implementation="blocks"))
    for got, wanted in zip(gradients(over), plain, strict=True):
        oracle.close(got, oracle.wide(wanted), 1e-5)


@unnamed_or_plain
def test_tokens_of_eight_devices(implementation: Any) -> None:
    arguments = oracle.experts("float32", 0, 16, 2, 3, 17, 13)
    specs = (P("x"), P("x"), P("x"), P(), P())
    local = functools.partial(mix, implementation=implementation)
    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=specs, out_specs=P("x"))
    check("float32", implementation, arguments, jax.jit(over)(*arguments))


@unnamed_or_plain
def test_in_a_loop_over_layers(implementation: Any) -> None:
    x, chosen, weights, *_ = oracle.experts("float32", 0, 5, 2, 4, 17, 64)
    held = oracle.stack("float32", 0, 3, 4, 17, 64)
    step = lambda x, layer: (mix(x, chosen, weights, *held, implementation, layer=layer), None)
    scanned = jax.jit(lambda x: lax.scan(step, x, jnp.arange(3))[0])(x)
    looped = jax.jit(lambda x: lax.fori_loop(0, 3, lambda i, x: step(x, i)[0], x))(x)
    wanted = oracle.wide(x)
    for layer in range(3):
        own = (np.asarray(leaf)[layer] for leaf in held)
        wanted, _ = oracle.mix_experts(wanted, chosen, weights, *own)
    oracle.close(scanned, wanted, 1e-5)
    oracle.close(looped, wanted, 1e-5)


@some_kinds
def test_where_the_kernel_is_taken(kind: str) -> None:
    """On CPU, however many rows there are; nowhere else, and not without one."""
    arguments = oracle.experts(kind, 0, 300, 2, 3, 7, 17)
    text = lambda p: jax.jit(mix).trace(*arguments).lower(lowering_platforms=(p,)).as_text()
    assert "pangu_experts" in text("cpu")
    assert "pangu_experts" not in text("tpu")
    with native.without():
        assert "pangu_experts" not in text("cpu")


@some_kinds
def test_without_kernels(kind: str, plain_xla: None) -> None:
    arguments = oracle.experts(kind, 0, 9, 2, 3, 17, 64)
    check(kind, None, arguments, run(*arguments))


def test_by_name_what_it_cannot_do() -> None:
    """Without being named it is passed over."""
    x, chosen, weights, gate_up, down = oracle.experts("float32", 0, 3, 2, 3, 16, 64)
    int4, int8, fp8 = (
        lambda matrix, scheme=scheme: weight.quantize(matrix, scheme)
        for scheme in (Scheme("int4", group=8), Scheme("int8"), Scheme("fp8"))
    )
    alone = lambda matrix: matrix
    for first, second in ((int4, int8), (fp8, int8), (alone, int8), (int8, alone)):

        def program(implementation: Any, first: Any = first, second: Any = second) -> str:
            made = lambda g, d: mix(x, chosen, weights, first(g), second(d), implementation)
            return str(jax.make_jaxpr(made)(gate_up, down))

        with pytest.raises(NotImplementedError):
            program("native")
        assert "pangu_experts" not in program(None)
        assert "pangu_experts" not in program("blocks")
    with native.without(), pytest.raises(NotImplementedError):
        mix(x, chosen, weights, gate_up, down, "native")
