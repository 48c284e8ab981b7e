"""Layouts: names, files, what is refused, and what the roles of the axes come to."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

import pangu_jax
from pangu_jax import build, config
from pangu_jax.errors import ConfigError
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import (
    AttentionRoles,
    Boundary,
    ExpertRoles,
    FFNRoles,
    Layout,
    MeshShape,
    ParamRoles,
)
from tests import layouts

FILES = sorted((config.configs_folder() / "layouts").glob("*.toml"))
H2P = layout.load("h2p-8")
FSDP_H2P = layout.load("fsdp-h2p-8")


def changed(**fields: Any) -> Layout:
    """H2P with other roles."""
    return dataclasses.replace(H2P, **fields)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_published_layout_has_a_mesh_here(file: Path) -> None:
    found = layout.load(file.stem)
    assert found == layout.load(file)
    here = found.over(8)
    assert here.num_devices == (1 if file.stem == "single" else 8)
    assert here.make_mesh().shape == here.abstract_mesh().shape == dataclasses.asdict(here.mesh)


def test_one_device_is_a_mesh_of_ones() -> None:
    single = layout.load(None)
    assert single == layout.load("single") == layout.load(single)
    mesh = single.make_mesh()
    assert dict(mesh.shape) == {"data": 1, "x": 1, "y": 1}
    assert single.split(("x", "y")) == ()  # nothing to gather: boundaries are the identity


def test_unknown_layout() -> None:
    with pytest.raises(ConfigError, match="no layouts configuration named 'tp99'; known: ep8, "):
        layout.load("tp99")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("x = 1", "x = 0", "mesh sizes must be at least 1"),
        ("x = 1", "z = 1", "unknown key 'z'"),
        (
            'vocab = ["x", "y"]',
            'vocab = ["q"]',
            "vocab: unknown mesh axis .q.; there are data, x, y",
        ),
        ('vocab = ["x", "y"]', "vocab = [1]", r"vocab\[0\] must be a string, not 1"),
    ],
)
def test_bad_layouts_name_the_file_and_the_fix(tmp_path, old, new, complaint) -> None:
    text = layout.config.named_file("layouts", "single").read_text()
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=complaint) as caught:
        layout.load(file)
    assert str(file) in str(caught.value)


def test_too_few_devices() -> None:
    with pytest.raises(ConfigError, match="needs 1 devices; JAX sees 0"):
        layout.load(None).make_mesh([])


def test_a_layout_is_static() -> None:
    single = layout.load(None)
    assert hash(single) == hash(dataclasses.replace(single))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"attention": AttentionRoles(("data", "x"), ("y", "x"))},
            "attention.batch and attention.heads must together name every mesh axis once "
            r"\(data, x, y\), not data, x, y, x",
        ),
        (
            {"attention": AttentionRoles(("data",), ("y",))},
            r"name every mesh axis once \(data, x, y\), not data, y",
        ),
        ({"attention": AttentionRoles((), ())}, "every mesh axis once .*, not none"),
        (
            {"experts": ExpertRoles(("y",), ("x", "y"))},
            "experts.expert and experts.ffn: an axis is named twice: y, x, y",
        ),
        ({"shared": FFNRoles(("x", "y", "x"))}, "shared.ffn: an axis is named twice: x, y, x"),
        ({"vocab": ("y", "y")}, "vocab: an axis is named twice: y, y"),
        ({"experts": ExpertRoles(("z",), ())}, "experts.expert: unknown mesh axis 'z'"),
        (
            {"shared": FFNRoles(("y",))},
            r"shared.ffn \(y\) must be the axes of the routed experts \(x, y\), or none",
        ),
        ({"shared": FFNRoles(("x",))}, r"shared.ffn \(x\) must be the axes of the routed"),
        (
            {"params": ParamRoles(("y",))},
            r"params.fsdp: y must be one of attention.batch \(data, x\)",
        ),
        (
            {"params": ParamRoles(("x",))},
            r"params.fsdp: x splits the weights already \(experts.ffn\)",
        ),
        (
            {"params": ParamRoles(("data",)), "vocab": ("data", "y")},
            r"params.fsdp: data splits the weights already \(vocab\)",
        ),
        ({"mesh": MeshShape(-1, -1, 4)}, "mesh sizes must be at least 1, and one may be -1, not"),
        ({"mesh": MeshShape(1, -2, 4)}, "mesh sizes must be at least 1"),
        ({"mesh": MeshShape(2**10, 2**10, 2)}, "a mesh of more than 1048576 devices: .*'y': 2"),
        ({"mesh": MeshShape(-1, 2**20, 2)}, "a mesh of more than 1048576 devices"),
    ],
)
def test_roles_that_contradict_each_other(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        changed(**fields)
    assert "\n" not in str(caught.value)


def test_roles_that_do_not() -> None:
    """Nothing shared, nothing routed; axes of size one, which split nothing, anywhere."""
    assert changed(shared=FFNRoles(())).of("ffn") == ()
    assert changed(experts=ExpertRoles((), ())).routed == ()
    assert changed(shared=FFNRoles(("data", "x", "y"))).of("ffn") == ("x", "y")
    most = changed(mesh=MeshShape(2**10, 2, 2**9))
    assert most.num_devices == layout.MAX_DEVICES


def test_a_size_that_is_left_open() -> None:
    for devices in (8, 24, 64):
        found = FSDP_H2P.over(devices)
        assert found.mesh == MeshShape(devices // 8, 2, 4)
        assert found == dataclasses.replace(FSDP_H2P, mesh=found.mesh)
        assert found.num_devices == devices
    assert FSDP_H2P.num_devices == 8
    assert H2P.over(3) is H2P  # nothing is open


@pytest.mark.parametrize("devices", [0, 4, 12])
def test_devices_that_would_be_left_over(devices: int) -> None:
    complaint = f"'x': 2, 'y': 4}} needs a multiple of 8 devices, not {devices}"
    with pytest.raises(ConfigError, match=complaint):
        FSDP_H2P.over(devices)


def test_more_devices_than_there_are() -> None:
    where = changed(mesh=MeshShape(2, 2, 4))
    hint = "needs 16 devices; JAX sees 8; JAX_NUM_CPU_DEVICES=16 makes as many of one CPU"
    with pytest.raises(ConfigError, match=hint):
        where.make_mesh()


ROLES = ("batch", "heads", "expert", "expert_ffn", "ffn", "vocab", "fsdp")


@pytest.mark.parametrize(
    ("where", "axes"),
    [
        (layout.load("single"), [(), (), (), (), (), (), ()]),
        (layout.load("tp8"), [(), ("y",), (), ("y",), ("y",), ("y",), ()]),
        (layout.load("ep8"), [("y",), (), ("y",), (), (), ("y",), ()]),
        (H2P, [("x",), ("y",), ("y",), ("x",), ("x", "y"), ("y", "x"), ()]),
        (
            FSDP_H2P,  # an open size may split something
            [("data", "x"), ("y",), ("y",), ("x",), ("x", "y"), ("y", "x"), ("data",)],
        ),
        (
            layouts.ODD["another order"],
            [
                ("y", "data"),
                ("x",),
                ("data", "x"),
                ("y",),
                ("y", "data", "x"),
                ("x", "data"),
                (),
            ],
        ),
    ],
    ids=["single", "tp8", "ep8", "h2p-8", "fsdp-h2p-8", "another order"],
)
def test_the_axes_of_a_role(where: Layout, axes: list[tuple[str, ...]]) -> None:
    """Those that split something, in the order of the tokens; the vocabulary has heads first."""
    assert [where.of(role) for role in ROLES] == axes


def test_the_axes_of_the_stream_and_of_the_routed_experts() -> None:
    other = layouts.ODD["another order"]
    assert H2P.stream == ("x", "y")
    assert other.stream == ("y", "data", "x")
    assert dataclasses.replace(other, boundary=Boundary("all_reduce")).stream == ("y", "data")
    assert H2P.routed == ("x", "y")
    assert other.routed == ("y", "data", "x")
    assert layouts.ODD["nothing shared"].routed == ("x",)
    assert layout.load("fsdp").over(8).routed == ()


def test_sizes() -> None:
    assert [H2P.size(axes) for axes in ((), ("data",), ("y",), ("x", "y"))] == [1, 1, 4, 8]


@pytest.mark.parametrize(
    ("name", "replicas", "rows"),
    [
        ("single", 1, PartitionSpec(None)),
        ("tp8", 1, PartitionSpec(None)),
        ("h2p-8", 2, PartitionSpec(("x",))),
        ("ep8", 8, PartitionSpec(("y",))),
        ("fsdp-h2p-4x2", 4, PartitionSpec(("data", "x"))),
    ],
)
def test_rows_are_shared_by_the_replicas(name: str, replicas: int, rows: PartitionSpec) -> None:
    where = layout.load("single") if name == "single" else layouts.named(name)
    assert where.rows == rows
    for batch in range(20):
        enough = next(n for n in itertools.count(batch) if n % replicas == 0)
        assert where.round_rows(batch) == enough


# --- H2P as published for one server (arXiv 2505.21411, section 4.2.1): attention DP2 x TP4, routed
# experts EP4 x TP2 in whole groups, shared experts TP8


def test_devices_that_attend_to_the_same_sequences() -> None:
    mesh = H2P.make_mesh()
    rows = jax.sharding.NamedSharding(mesh, H2P.rows).devices_indices_map((2,))
    groups: dict[int, set[int]] = {0: set(), 1: set()}
    for device, (part,) in rows.items():
        groups[part.start].add(device.id)
    assert groups == {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}


def test_experts_of_pro_moe_on_a_server() -> None:
    """Four ranks of two whole groups each; the two devices of a rank share their width."""
    like = layouts.abstract(dataclasses.replace(pangu_jax.preset("pro-moe-72b"), num_layers=1), H2P)
    leaves = dict(build.named_leaves(like))
    of = lambda name: leaves[name].sharding.devices_indices_map(leaves[name].shape)
    gate_up, down = of("blocks.0.mlp.gate_up"), of("blocks.0.mlp.down")
    held: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for device in jax.devices():
        _, experts, _, width, _ = gate_up[device]
        assert down[device][1] == experts
        assert down[device][3] == width
        ids = range(64)[experts]
        groups = sorted({expert // 8 for expert in ids})
        assert len(ids) == 8 * len(groups)  # whole ones
        held.setdefault(tuple(groups), []).append((width.start, width.stop))
    assert set(held) == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert all(sorted(parts) == [(0, 672), (672, 1344)] for parts in held.values())


def test_shared_experts_and_heads_of_pro_moe_on_a_server() -> None:
    like = layouts.abstract(dataclasses.replace(pangu_jax.preset("pro-moe-72b"), num_layers=1), H2P)
    leaves = dict(build.named_leaves(like))
    local = lambda name: leaves[name].sharding.shard_shape(leaves[name].shape)
    assert local("blocks.0.mlp.shared.gate_up") == (1, 2, 5376 // 8, 5120)
    assert local("blocks.0.attention.qkv") == (1, 8 // 4, 40 // 8 + 2, 128, 5120)
    assert local("blocks.0.mlp.router") == (1, 64, 5120)
