"""Layouts of eight devices, and tiny models that need all of what a layout can do: key/value heads
to repeat, a vocabulary and widths to pad.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

import pangu_jax
from pangu_jax import build
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.model import Pangu
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

BASE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e4,
    max_positions=64,
    init_range=0.3,
    dtype="float32",
)
DENSE = ModelConfig(**BASE, intermediate_size=44)
MOGE = ModelConfig(**BASE, moge=MoGEConfig(16, 8, 11, 20))
TOPK = ModelConfig(**BASE, moge=MoGEConfig(16, 1, 11, 20, per_group=4, router="topk"))

MODELS = {
    "dense": DENSE,
    "moge": MOGE,
    "topk": TOPK,
    "tied": dataclasses.replace(DENSE, tie_embeddings=True, attention_bias=False),
    "pairs": dataclasses.replace(MOGE, moge=MoGEConfig(16, 4, 11, 20, per_group=2)),
    "voted": dataclasses.replace(MOGE, moge=MoGEConfig(16, 8, 11, 20, voted_experts=1)),
}

# Those of configs/layouts, and H2P within two servers of four devices.
NAMES = ("tp8", "ep8", "h2p-8", "fsdp", "h2p-4x2", "fsdp-h2p-4x2")

# Roles that no published layout has: two axes of heads and neither of them with the experts, a
# vocabulary in few parts or whole, axes in another order than the mesh's, experts across servers.
ODD = {
    "two axes of heads": Layout(
        MeshShape(2, 2, 2),
        AttentionRoles(("data",), ("x", "y")),
        ExpertRoles(("x",), ("data",)),
        FFNRoles(("data", "x")),
        ("y",),
    ),
    "nothing shared": Layout(
        MeshShape(1, 2, 4),
        AttentionRoles(("data", "x"), ("y",)),
        ExpertRoles(("x",), ()),
        FFNRoles(()),
        (),
    ),
    "another order": Layout(
        MeshShape(2, 2, 2),
        AttentionRoles(("y", "data"), ("x",)),
        ExpertRoles(("data", "x"), ("y",)),
        FFNRoles(("x", "y", "data")),
        ("data", "x"),
    ),
}


def named(name: str, kind: str = "flashcomm1", gather: str = "exact") -> Layout:
    """A layout by its name here, over eight devices, with the boundary of that kind."""
    boundary: Any = dict(kind=kind, gather=gather)
    if name in ODD:
        return dataclasses.replace(ODD[name], boundary=Boundary(**boundary))
    if name.endswith("h2p-4x2"):
        found = dataclasses.replace(layout.load("h2p-8"), mesh=MeshShape(2, 2, 2))
        if name.startswith("fsdp"):
            found = dataclasses.replace(found, params=ParamRoles(("data",)))
    else:
        found = layout.load(name).over(8)
    return dataclasses.replace(found, boundary=Boundary(**boundary))


def lively(model: Pangu) -> dict[str, np.ndarray]:
    """A model's numbers with noise in all of them: norms, biases and scales that differ."""
    rng = np.random.default_rng(0)
    add = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return {name: add(np.asarray(leaf)) for name, leaf in build.weights(model).items()}


def close(got: Any, wanted: Any, tolerance: float = 1e-5, what: str = "") -> None:
    """Equal but for `tolerance` of the largest number."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, what
    largest = max(np.abs(wanted).max(), 1e-30)
    np.testing.assert_allclose(
        got / largest, wanted / largest, atol=tolerance, rtol=0, err_msg=what
    )


def close_leaves(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Of two dictionaries by leaf name, every leaf is `close`."""
    assert set(got) == set(wanted)
    for name, leaf in wanted.items():
        close(got[name], leaf, tolerance, name)


def close_steps(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Of weights some steps on, by leaf name: every difference is a vector of `tolerance` of the
    leaf's length. Adam makes whole steps of gradients that are next to nothing, so that single
    numbers may differ by more than how well sums agree.
    """
    assert set(got) == set(wanted)
    for name, leaf in wanted.items():
        one, other = np.asarray(got[name], np.float64), np.asarray(leaf, np.float64)
        assert one.shape == other.shape, name
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other), name


def random_tokens(*shape: int, vocab: int = 97) -> np.ndarray:
    """Token ids, the same for the same shape."""
    return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


def abstract(config: ModelConfig, where: Layout | None = None, form: Any = "stacked") -> Pangu:
    """The shapes of a float32 model."""
    return build.abstract(config, dtype="float32", where=where, form=form)


def init(config: ModelConfig, where: Layout | None = None, form: Any = "stacked") -> Pangu:
    """Random weights, the same under every layout."""
    return pangu_jax.init(config, jax.random.key(0), dtype="float32", where=where, form=form)
