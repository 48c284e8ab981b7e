"""Layouts: names, files, and what is refused."""

import dataclasses

import pytest

from pangu_jax.errors import ConfigError
from pangu_jax.parallel import layout


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
