"""SwiGLU of matrices of every kind against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pangu_jax.adapted import Adapted
from pangu_jax.kernels import native
from pangu_jax.kernels.swiglu import swiglu
from pangu_jax.precision import same_bits
from pangu_jax.quant import weight
from pangu_jax.quant.scheme import Scheme
from tests.pangu_jax.kernels import oracle
from tests.pangu_jax.kernels.oracle import FP8, KINDS, SOME, WIDTHS, some_kinds

all_kinds = pytest.mark.parametrize("kind", SOME)
IMPLEMENTATIONS = ("native", "xla", None)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
unnamed_or_plain = pytest.mark.parametrize("implementation", [None, "xla"])
by_name = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
run = jax.jit(swiglu, static_argnames="implementation")


def case(kind: str, seed: int, N: int, F: int, D: int) -> tuple[Any, Any, Any]:
    held = oracle.matrix(kind, seed + 1, 2, F, D), oracle.matrix(kind, seed + 2, D, F)
    return oracle.activations(kind, seed, N, D), *held


def tolerance(kind: str, implementation: Any) -> float:
    """In the kernel float32 all the way, but for the factors and the result (and once in between,
    where the processor multiplies bf16); bf16 in between in XLA. Of what is rounded in between, a
    number may fall the other way.
    """
    if "dynamic" in kind:
        return 0.1 if "fp8" in kind else 0.03
    if "bfloat16" in kind:
        own = 2**-7 if kind.startswith("int4") else 2**-8
        return own if implementation == "native" else 0.03
    return 2e-6


def check(kind: str, implementation: Any, arguments: Any, got: Any) -> None:
    wanted, size = oracle.swiglu(*arguments)
    oracle.close(got, wanted, tolerance(kind, implementation), implementation, size)


@pytest.mark.parametrize("kind", oracle.INT4[2:6])
def test_groups(kind: str) -> None:
    for N in (1, 9):
        arguments = case(kind, N, N, 96, 192)
        for implementation in IMPLEMENTATIONS:
            check(kind, implementation, arguments, run(*arguments, implementation))


@settings(max_examples=25)
@given(
    st.sampled_from([*KINDS, *FP8]),
    st.integers(0, 999),
    st.sampled_from([1, 2, 5, 16, 25, 64, 70]),
    st.sampled_from(WIDTHS),
    st.sampled_from(WIDTHS),
)
def test_odd_shapes(kind: str, seed: int, N: int, F: int, D: int) -> None:
    arguments = case(kind, seed, N, F, D)
    for implementation in ("native", "xla"):
        got = run(*arguments, implementation)
        assert got.dtype == arguments[0].dtype
        check(kind, implementation, arguments, got)


@some_kinds
@by_name
@pytest.mark.parametrize("N", [6, 70])
def test_many_pieces(N: int, kind: str, implementation: Any) -> None:
    """Both products are in pieces for several threads."""
    arguments = case(kind, 0, N, 1021, 515)
    got = run(*arguments, implementation)
    check(kind, implementation, arguments, got)


def test_what_is_between_is_rounded_to_int8() -> None:
    """Of these numbers none falls the other way."""
    arguments = case("dynamic float32", 3, 5, 64, 17)
    wanted, _ = oracle.swiglu(*arguments)
    for implementation in IMPLEMENTATIONS:
        oracle.close(run(*arguments, implementation), wanted, 5e-6, implementation)


@all_kinds
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    x, *held = case(kind, 0, 70, 155, 91)
    one = lambda row: swiglu(row[None], *held, "native")[0]
    alone = jax.jit(lambda x: lax.map(one, x))(x)
    counts = (1, 2, 3, 4, 5, 8, 16, 64, 70)
    with same_bits():
        together = jax.jit(lambda x: [swiglu(x[:n], *held, "native") for n in counts])(x)
        turned = run(np.asarray(x)[::-1], *held, "native")
    for n, rows in zip(counts, together, strict=True):
        oracle.same(rows, np.asarray(alone)[:n], n)
    oracle.same(np.asarray(turned)[::-1], alone)


@some_kinds
@by_name
def test_what_is_no_number_stays_in_its_row(kind: str, implementation: Any) -> None:
    for N in (5, 29):
        x, *held = case(kind, 0, N, 17, 64)
        bad = np.isnan(oracle.wide(run(x.at[3, 40].set(jnp.nan), *held, implementation)))
        np.testing.assert_array_equal(bad, np.broadcast_to(np.arange(N)[:, None] == 3, bad.shape))


@by_name
def test_large_gates_end_in_no_overflow(implementation: Any) -> None:
    """e^-gate is no float32 there: silu is 0 on one side and the gate itself on the other."""
    x = jnp.array([[-200.0], [200.0], [0.0]])
    got = run(x, jnp.ones((2, 1, 1)), jnp.ones((1, 1)), implementation)
    np.testing.assert_allclose(got, [[0], [4e4], [0]], rtol=1e-6)


@pytest.mark.parametrize("N", [1, 5])
@oracle.kinds(["float32"], ["weight-only float32", "dynamic float32"])
def test_gradients_are_those_of_plain_xla(kind: str, N: int) -> None:
    arguments, pull = case(kind, 0, N, 17, 9), oracle.activations("float32", 2, N, 9)
    argnums = (0, 1, 2) if kind == "float32" else 0

    def gradients(implementation: Any) -> Any:
        loss = lambda *given: (swiglu(*given, implementation) * pull).sum()
        return jax.jit(jax.grad(loss, argnums))(*arguments)

    compare = lambda got, wanted: oracle.close(got, oracle.wide(wanted), 1e-5)
    jax.tree.map(compare, gradients(None), gradients("xla"))


@pytest.mark.parametrize("kind", ["float32", "dynamic float32"])
@unnamed_or_plain
def test_under_vmap(kind: str, implementation: Any) -> None:
    """Over rows, and over rows with matrices of their own."""
    cases = [case(kind, i, 5, 17, 9) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    one = lambda *given: swiglu(*given, implementation)
    each = jax.jit(jax.vmap(one))(*stack)
    shared = jax.jit(jax.vmap(one, (0, None, None)))(stack[0], *cases[0][1:])
    for i, own in enumerate(cases):
        check(kind, implementation, own, each[i])
        check(kind, implementation, (own[0], *cases[0][1:]), shared[i])


SPLITS = {
    "rows": (P("x"), P(), P(), P("x")),
    "inner": (P(), P(None, "x"), P(None, "x"), P()),
}


@pytest.mark.parametrize("split", SPLITS)
@unnamed_or_plain
def test_over_devices(split: str, implementation: Any) -> None:
    """Values and gradients; partial sums where the inner width is split."""
    arguments = case("float32", 0, 16, 24, 17)
    *specs, of_y = SPLITS[split]

    def local(*given: Any) -> Any:
        y = swiglu(*given, implementation)
        return lax.psum(y, "x") if split == "inner" else y

    over = jax.shard_map(local, mesh=oracle.mesh(), in_specs=tuple(specs), out_specs=of_y)
    check("float32", implementation, arguments, jax.jit(over)(*arguments))
    gradients = lambda f: jax.jit(jax.grad(lambda *given: f(*given).sum(), (0, 1, 2)))(*arguments)
    plain = gradients(lambda *given: swiglu(*given, "xla"))
    for got, wanted in zip(gradients(over), plain, strict=True):
        oracle.close(got, oracle.wide(wanted), 1e-5)


@pytest.mark.parametrize("kind", ["float32", "weight-only float32"])
@unnamed_or_plain
def test_in_loops(kind: str, implementation: Any) -> None:
    x, *held = case(kind, 0, 3, 17, 64)
    step = lambda x: swiglu(x, *held, implementation)
    scanned = jax.jit(lambda x: lax.scan(lambda x, _: (step(x), None), x, length=3)[0])(x)
    forward = lambda i_x: (i_x[0] + 1, step(i_x[1]))
    looped = jax.jit(lambda x: lax.while_loop(lambda i_x: i_x[0] < 3, forward, (0, x))[1])(x)
    wanted = oracle.wide(x)
    for _ in range(3):
        wanted, _ = oracle.swiglu(wanted, *held)
    oracle.close(scanned, wanted, 1e-5)
    oracle.close(looped, wanted, 1e-5)


def uses_kernel(*arguments: Any, platform: str = "cpu") -> bool:
    lowered = jax.jit(swiglu).trace(*arguments).lower(lowering_platforms=(platform,))
    return "pangu_experts" in lowered.as_text()


@some_kinds
def test_the_kernel_is_taken_on_cpu_alone(kind: str) -> None:
    x, *held = case(kind, 0, 300, 17, 9)
    assert uses_kernel(x[:1], *held)
    assert uses_kernel(x, *held)
    assert not uses_kernel(x, *held, platform="tpu")


@some_kinds
def test_without_kernels(kind: str, plain_xla: None) -> None:
    arguments = case(kind, 0, 5, 17, 64)
    assert not uses_kernel(*arguments)
    check(kind, None, arguments, run(*arguments))


def adapted(matrix: Any) -> Adapted:
    *out, D = matrix.shape
    return Adapted(scale=0.5, base=matrix, a=jnp.ones((2, D)) / D, b=jnp.ones((*out, 2)))


OTHERS = {
    "int4 and int8": lambda m: weight.quantize(
        m, Scheme("int8") if m.ndim == 2 else Scheme("int4", group=8)
    ),
    "fp8 and int8": lambda m: weight.quantize(m, Scheme("fp8" if m.ndim == 2 else "int8")),
    "mixed": lambda m: weight.quantize(m, Scheme("int8")) if m.ndim == 2 else m,
    "two activations": lambda m: weight.quantize(
        m, Scheme("int8", "dynamic" if m.ndim == 2 else "float")
    ),
    "adapted": lambda m: adapted(m) if m.ndim == 2 else m,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_by_name_what_it_cannot_do(kind: str) -> None:
    """Without being named it is passed over."""
    arguments = case("float32", 0, 3, 16, 64)
    program = lambda implementation: jax.make_jaxpr(
        lambda x, *matrices: swiglu(x, *map(OTHERS[kind], matrices), implementation)
    )(*arguments)
    with pytest.raises(NotImplementedError):
        program("native")
    assert "pangu_experts" not in str(program(None))


def test_by_name_without_kernels_or_rows() -> None:
    x, *held = case("float32", 0, 3, 16, 64)
    with native.without(), pytest.raises(NotImplementedError):
        swiglu(x, *held, "native")
    with pytest.raises(NotImplementedError):
        swiglu(x[:0], *held, "native")
