"""Compiled programs read by eye: texts written by hand, and programs for eight CPU devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from pangu_jax.plan import hlo, program
from pangu_jax.plan.hlo import Buffer, Program, Traffic

# --- texts

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def text(*lines: str, others: str = "", head: str = "(p: f32[64]) -> f32[64]") -> str:
    """A program whose entry has a parameter %p and these lines."""
    body = "\n".join(f"  {line}" for line in ("%p = f32[64]{0} parameter(0)", *lines))
    return f"HloModule test, is_scheduled=true\n{ADD}{others}\nENTRY %main {head} {{\n{body}\n}}\n"


def collectives(*lines: str, others: str = "") -> dict[str, Traffic]:
    return Program(text(*lines, others=others)).collectives()


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
REDUCE = f"%r = f32[64]{{0}} all-reduce(%p), channel_id=1, {GROUPS}, to_apply=%add"


def test_computations_and_instructions() -> None:
    found = Program(text(f"ROOT {REDUCE}, metadata={{op_name='x'}}"))
    assert found.entry == "main"
    assert set(found.computations) == {"add", "main"}
    last = found.computations["main"][-1]
    assert (last.name, last.type, last.op) == ("r", "f32[64]{0}", "all-reduce")
    assert found.computations["add"][-1].op == "add"


def test_names_without_a_percent_sign() -> None:
    assert Program(text(REDUCE).replace("%", "")).collectives() == {"all-reduce": Traffic(1, 384)}


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        (f"%g = f32[64]{{0}} all-gather(%p), {GROUPS}, dimensions={{0}}", "all-gather", 192),
        (REDUCE, "all-reduce", 384),
        (
            f"%s = f32[16]{{0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add",
            "reduce-scatter",
            192,
        ),
        (f"%t = f32[64]{{0}} all-to-all(%p), {GROUPS}, dimensions={{0}}", "all-to-all", 192),
        (
            "%c = f32[64]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            256,
        ),
    ],
)
def test_every_kind(line: str, kind: str, received: int) -> None:
    assert collectives(line) == {kind: Traffic(1, received)}


@pytest.mark.parametrize(
    ("groups", "received"),
    [
        ("{{0,1,2,3,4,5,6,7}}", 224),
        ("{{0,4},{1,5},{2,6},{3,7}}", 128),
        ("{{0},{1}}", 0),
        ("[2,4]<=[8]", 192),
        ("[1,8]<=[8]", 224),
        ("[4,2]<=[2,4]T(1,0)", 128),
    ],
)
def test_both_notations_of_groups(groups: str, received: int) -> None:
    line = f"%g = f32[64]{{0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}"
    assert collectives(line) == {"all-gather": Traffic(1, received)}


def test_results_in_parentheses_add_up() -> None:
    parts = "(f32[32]{0}, bf16[32,2]{1,0:T(8,128)(2,1)})"
    line = f"%t = {parts} all-to-all(%p, %p), replica_groups={{{{0,1}}}}"
    assert collectives(line) == {"all-to-all": Traffic(1, 128)}


def test_a_pair_counts_once_where_it_is_done() -> None:
    lines = (
        f"%s = (f32[16]{{0}}, f32[64]{{0}}) all-gather-start(%p), {GROUPS}, dimensions={{0}}",
        "%other = f32[64]{0} negate(%p)",
        "%d = f32[64]{0} all-gather-done(%s)",
        "%c = (f32[64], f32[64]) collective-permute-start(%d), source_target_pairs={{0,1}}",
        "%e = f32[64]{0} collective-permute-done(%c)",
    )
    assert collectives(*lines) == {
        "all-gather": Traffic(1, 192),
        "collective-permute": Traffic(1, 256),
    }


def test_a_wrapped_pair_counts_once_where_it_starts() -> None:
    wrapped = f"""
%wrapped (q: f32[64]) -> f32[16] {{
  %q = f32[64]{{0}} parameter(0)
  ROOT %s = f32[16]{{0}} reduce-scatter(%q), {GROUPS}, dimensions={{0}}, to_apply=%add
}}
"""
    lines = (
        "%start = ((f32[64]{0}), f32[16]{0}, s32[]) async-start(%p), calls=%wrapped",
        "%done = f32[16]{0} async-done(%start), calls=%wrapped",
    )
    assert collectives(*lines, others=wrapped) == {"reduce-scatter": Traffic(1, 192)}


def test_a_fused_all_reduce_scatter() -> None:
    """XLA's for TPU: each device keeps its part of what is reduced."""
    fused = f"""
%all-reduce-scatter.3 (q: f32[64]) -> f32[16] {{
  %q = f32[64]{{0}} parameter(0)
  %r = f32[64]{{0}} all-reduce(%q), {GROUPS}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16]{{0}} dynamic-slice(%r, %zero), dynamic_slice_sizes={{16}}
}}
"""
    line = "%f = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"
    assert collectives(line, others=fused) == {"reduce-scatter": Traffic(1, 192)}


def test_a_collective_carried_on_in_other_work_counts_where_it_starts() -> None:
    """XLA's for TPU, again: begun before a loop, carried on in its turns, done behind it."""
    part = lambda name: (
        f"""
%{name} (q: f32[16]) -> f32[64] {{
  %q = f32[16]{{0}} parameter(0)
  ROOT %g = f32[64]{{0}} all-gather(%q), channel_id=3, {GROUPS}, dimensions={{0}}
}}
"""
    )
    turn = """%f = f32[64]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %t"""
    loop = LOOP.replace("ROOT %t", turn)
    parts = "".join(map(part, ("fused.1", "async_collective_fusion.2", "fused.3")))
    lines = (
        "%async-collective-start.1 = f32[64]{0} fusion(%p), kind=kCustom, calls=%fused.1",
        WHILE + KNOWN,
        "%async-collective-done.1 = f32[64]{0} fusion(%w), kind=kCustom, calls=%fused.3",
    )
    assert collectives(*lines, others=parts + loop) == {
        "all-gather": Traffic(1, 192),
        "all-reduce": Traffic(5, 5 * 384),
    }


def test_what_a_fusion_or_a_call_runs_counts() -> None:
    inner = f"""
%inner (q: f32[64]) -> f32[64] {{
  %q = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%q), {GROUPS}, to_apply=%add
}}
"""
    fusion = "%f = f32[64]{0} fusion(%p), kind=kLoop, calls=%inner"
    call = "%g = f32[64]{0} call(%f), to_apply=%inner"
    assert collectives(fusion, call, others=inner) == {"all-reduce": Traffic(2, 768)}


LOOP = f"""
%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {{
  %s = (s32[], f32[64]{{0}}) parameter(0)
  %x = f32[64]{{0}} get-tuple-element(%s), index=1
  %r = f32[64]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add
  ROOT %t = (s32[], f32[64]{{0}}) tuple(%x, %r)
}}

%condition (s: (s32[], f32[64])) -> pred[] {{
  %s = (s32[], f32[64]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}
"""
WHILE = "%w = (s32[], f32[64]{0}) while(%p), condition=%condition, body=%body"
KNOWN = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


@pytest.mark.parametrize(
    ("line", "others", "times"),
    [
        (WHILE + KNOWN, LOOP, 5),
        (WHILE, LOOP, 7),
        (WHILE, LOOP.replace("compare(%i, %limit)", "compare(s32[] %i, s32[] %limit)"), 7),
        (WHILE, LOOP.replace("constant(7)", "parameter(1)"), 1),
        (WHILE, LOOP.replace("direction=LT", "direction=NE"), 1),
    ],
    ids=["as XLA says", "as a comparison says", "with types", "by the data", "another comparison"],
)
def test_a_loop_counts_as_often_as_it_runs(line: str, others: str, times: int) -> None:
    assert collectives(line, others=others) == {"all-reduce": Traffic(times, 384 * times)}


def test_a_loops_condition_counts_too() -> None:
    """Generation goes on until all devices agree to stop."""
    agreed = f"%a = f32[] all-reduce(%i), {GROUPS}, to_apply=%add\n  ROOT %lt"
    assert collectives(WHILE + KNOWN, others=LOOP.replace("ROOT %lt", agreed)) == {
        "all-reduce": Traffic(10, 5 * (384 + 6))
    }


@pytest.mark.parametrize(
    ("axes", "received"), [("'y'", 192), ("'x','y'", 224), ("'x'", 128), ("'x','y':(1)2", 192)]
)
def test_groups_by_axes_of_a_mesh(axes: str, received: int) -> None:
    """As XLA writes them since JAX 0.12."""
    groups = f"replica_groups=mesh['x'=2,'y'=4] {{{axes}}}"
    line = f"%g = f32[64]{{0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}"
    assert collectives(line) == {"all-gather": Traffic(1, received)}


def test_a_group_of_all_devices() -> None:
    line = "%g = f32[64]{0} all-gather(%p), replica_groups={}, dimensions={0}"
    whole = text(line).replace("is_scheduled=true", "is_scheduled=true, num_partitions=8")
    assert Program(whole).collectives() == {"all-gather": Traffic(1, 224)}


def test_loops_within_loops_multiply() -> None:
    outer = LOOP.replace("%body", "%outer").replace("%condition", "%until")
    outer = outer.replace(f"%r = f32[64]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add", WHILE)
    line = "%o = (s32[], f32[64]) while(%p), condition=%until, body=%outer"
    assert collectives(line + KNOWN, others=LOOP + outer) == {"all-reduce": Traffic(35, 384 * 35)}


@pytest.mark.parametrize(
    "branches",
    ["true_computation=%one, false_computation=%two", "branch_computations={%one, %two}"],
)
def test_both_branches_of_a_condition_count(branches: str) -> None:
    others = "".join(
        f"""
%{name} (q: f32[64]) -> f32[64] {{
  %q = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} {op}(%q), {GROUPS}, to_apply=%add
}}
"""
        for name, op in (("one", "all-reduce"), ("two", "all-gather"))
    )
    line = f"%c = f32[64]{{0}} conditional(%p, %p, %p), {branches}"
    assert collectives(line, others=others) == {
        "all-reduce": Traffic(1, 384),
        "all-gather": Traffic(1, 192),
    }


@pytest.mark.parametrize(
    ("kind", "ranks", "wanted"),
    [
        ("all-gather", 8, 700),
        ("all-to-all", 4, 600),
        ("all-reduce", 2, 800),
        ("all-reduce", 8, 1400),
        ("reduce-scatter", 8, 5600),
        ("collective-permute", 8, 800),
        ("all-gather", 1, 0),
        ("all-reduce", 1, 0),
        ("reduce-scatter", 1, 0),
        ("all-to-all", 1, 0),
    ],
)
def test_received(kind: str, ranks: int, wanted: int) -> None:
    """Of a result of 800 bytes."""
    assert hlo.received(kind, 800, ranks) == wanted


def test_a_reduction_in_two_halves_moves_as_much() -> None:
    halves = hlo.received("reduce-scatter", 100, 8) + hlo.received("all-gather", 800, 8)
    assert hlo.received("all-reduce", 800, 8) == halves


@pytest.mark.parametrize(
    ("type", "wanted"),
    [
        ("f32[8,2]{1,0}", [64]),
        ("bf16[3]{0}", [6]),
        ("f16[3]", [6]),
        ("s8[5]", [5]),
        ("pred[5]", [5]),
        ("s4[5]{0:E(4)}", [3]),
        ("u4[6]", [3]),
        ("s64[2]", [16]),
        ("c64[2]", [16]),
        ("f8e4m3fn[7]", [7]),
        ("f32[]", [4]),
        ("f32[0,4]", [0]),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [2048]),
        ("(f32[2]{0}, s32[], /*index=2*/bf16[2,2])", [8, 4, 8]),
        ("()", []),
    ],
)
def test_sizes(type: str, wanted: list[int]) -> None:
    assert hlo.sizes(type) == wanted


def test_bare_types() -> None:
    assert hlo.bare("bf16[8,128]{1,0:T(8,128)(2,1)}") == "bf16[8,128]"
    assert hlo.bare("(f32[2]{0}, s32[]{:T(128)})") == "(f32[2], s32[])"


def named(name: str) -> str:
    return f'metadata={{op_name="jit(f)/shard_map/while/body/closed_call/{name}"}}'


def test_buffers_are_the_largest_arrays_largest_first() -> None:
    lines = (
        f"%small = f32[10]{{0}} negate(%p), {named('small')}",
        f"%large = f32[100,100]{{1,0}} broadcast(%p), {named('mlp/mul')}",
        f"%again = f32[100,100]{{0,1}} negate(%large), {named('mlp/mul')}",
        f"%pair = (f32[3]{{0}}, f32[50]{{0}}) fusion(%p), kind=kLoop, calls=%add, {named('pair')}",
        "%tuple = (f32[100,100], f32[10]) tuple(%large, %small)",
        "%view = f32[10000]{0} bitcast(%large)",
        "%part = f32[100,100]{1,0} get-tuple-element(%tuple), index=0",
    )
    found = Program(text(*lines))
    assert found.buffers(9) == [
        Buffer(40_000, "broadcast", "f32[100,100]", "jit(f)/mlp/mul"),
        Buffer(200, "fusion", "(f32[3], f32[50])", "jit(f)/pair"),
        Buffer(40, "negate", "f32[10]", "jit(f)/small"),
    ]
    assert found.buffers(1) == found.buffers(9)[:1]


def test_a_changed_argument_is_no_buffer_but_its_copy_is() -> None:
    changed = f"%u = f32[64]{{0}} dynamic-update-slice(%p, %p, %p), {named('write')}"
    assert Program(text(changed)).buffers(9) == []
    for op in ("copy", "transpose"):
        copied = f"%c = f32[64]{{0}} {op}(%p), {named('write')}"
        wanted = [Buffer(256, op, "f32[64]", "jit(f)/write")]
        assert Program(text(changed, copied)).buffers(9) == wanted


def test_buffers_of_a_loops_body_but_not_within_a_fusion() -> None:
    loop = LOOP.replace("ROOT %t", "%big = f32[99]{0} negate(%x)\n  ROOT %t")
    inside = """
%inside (q: f32[64]) -> f32[64] {
  %q = f32[64]{0} parameter(0)
  %never = f32[640]{0} broadcast(%q)
  ROOT %out = f32[64]{0} reduce(%never, %q), to_apply=%add
}
"""
    fusion = "%f = f32[64]{0} fusion(%p), kind=kLoop, calls=%inside"
    found = Program(text(WHILE, fusion, others=loop + inside)).buffers(9)
    assert [(buffer.bytes, buffer.type) for buffer in found if buffer.bytes > 1] == [
        (396, "f32[99]")
    ]


# --- programs of this machine's compiler

BOTH = PartitionSpec(("x", "y"))


def compiled(local: Callable[..., Any], *shapes: tuple[int, ...], donate: int = 0) -> Any:
    """`local` on two by four devices, which split the first axis of everything."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(local, mesh=mesh, in_specs=BOTH, out_specs=BOTH)
    arguments = [jax.ShapeDtypeStruct((8 * n, *rest), jnp.float32) for n, *rest in shapes]
    return jax.jit(run, donate_argnums=tuple(range(donate))).lower(*arguments)


def counted(local: Callable[..., Any], *shapes: tuple[int, ...]) -> dict[str, Traffic]:
    return Program(compiled(local, *shapes).compile().as_text()).collectives()


def varying(x: jax.Array, *axes: str) -> jax.Array:
    return lax.pcast(x, axes, to="varying")


def test_a_compiled_program_of_every_kind() -> None:
    """Of [16, 6] float32 on each device, 384 bytes."""

    def local(x: jax.Array) -> tuple[jax.Array, ...]:
        ring = [(i, (i + 1) % 4) for i in range(4)]
        return (
            lax.all_gather(x, "y", axis=0, tiled=True),
            lax.psum_scatter(x, ("x", "y"), scatter_dimension=0, tiled=True),
            lax.all_to_all(x, "x", split_axis=0, concat_axis=1, tiled=True),
            lax.ppermute(x, "y", ring),
            varying(lax.psum(x, ("x", "y")), "x", "y"),
        )

    assert counted(local, (16, 6)) == {
        "all-gather": Traffic(1, 3 * 384),
        "reduce-scatter": Traffic(1, 7 * 48),
        "all-to-all": Traffic(1, 192),
        "collective-permute": Traffic(1, 384),
        "all-reduce": Traffic(1, 2 * 7 * 48),
    }


def test_a_compiled_loop() -> None:
    def local(x: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = lax.all_gather(jnp.sin(x), "y", axis=0, tiled=True)
            return lax.psum_scatter(whole, "y", scatter_dimension=0, tiled=True), None

        return lax.scan(step, lax.ppermute(x, "x", [(0, 1), (1, 0)]), None, length=5)[0]

    assert counted(local, (16, 6)) == {
        "collective-permute": Traffic(1, 384),
        "all-gather": Traffic(5, 5 * 3 * 384),
        "reduce-scatter": Traffic(5, 5 * 3 * 384),
    }


def test_a_loop_that_the_data_end_counts_once() -> None:
    def local(x: jax.Array) -> jax.Array:
        going = lambda state: state[0] < 100
        step = lambda state: (lax.psum(state[1].sum(), ("x", "y")), state[1] * 2)
        return lax.while_loop(going, step, (jnp.float32(0), x))[1]

    assert counted(local, (16, 6)) == {"all-reduce": Traffic(1, 7)}


def test_a_compiled_programs_memory() -> None:
    """8 x 512 numbers on each device, whose products with each other are 512 x 512."""

    def local(x: jax.Array) -> jax.Array:
        with jax.named_scope("products"):
            return jnp.sin(x.T @ x) @ x.T

    made = program.build(compiled(local, (8, 512)))
    assert made.compile_s > 0
    assert made.resident == 2 * 8 * 512 * 4
    assert made.temporary >= 512 * 512 * 4
    assert made.collectives == {}
    largest = made.buffers[0]
    assert (largest.bytes, largest.type) == (512 * 512 * 4, "f32[512,512]")
    assert "products" in largest.source
    assert [buffer.bytes for buffer in made.buffers] == sorted(
        (buffer.bytes for buffer in made.buffers), reverse=True
    )


def write(cache: jax.Array, new: jax.Array) -> jax.Array:
    """A cache with a row changed."""
    return lax.dynamic_update_slice_in_dim(cache, new * 2, 3, axis=0)


def test_a_given_argument_is_changed_in_place() -> None:
    made = program.build(compiled(write, (1000, 10), (1, 10), donate=1))
    assert made.resident == 4 * (1000 * 10 + 10)
    assert "f32[1000,10]" not in {buffer.type for buffer in made.buffers}


def test_the_copy_of_an_argument_that_was_not_given_is_found() -> None:
    made = program.build(compiled(write, (1000, 10), (1, 10)))
    assert made.resident == 4 * (2 * 1000 * 10 + 10)
    (copy,) = [buffer for buffer in made.buffers if buffer.type == "f32[1000,10]"]
    assert (copy.op, copy.bytes) == ("copy", 40_000)
