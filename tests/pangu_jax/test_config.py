"""ModelConfig, presets and the published counts."""

import dataclasses

import jax
import pytest

import pangu_jax
from pangu_jax import config as configs
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.errors import ConfigError

PRESETS = [
    "nano",
    "nano-moge",
    "mini",
    "mini-moge",
    "small",
    "small-moge",
    "embedded-1b",
    "embedded-7b",
    "pro-moe-72b",
]


@pytest.mark.parametrize(
    ("name", "total", "active", "kv_bytes"),
    [
        ("embedded-1b", 1_155_912_192, 1_155_912_192, 79_872),
        ("embedded-7b", 8_030_887_936, 8_030_887_936, 139_264),
        ("pro-moe-72b", 71_988_781_056, 16_498_139_136, 196_608),
    ],
)
def test_published_counts(name: str, total: int, active: int, kv_bytes: int) -> None:
    config = pangu_jax.preset(name)
    assert config.num_parameters == total
    assert config.num_active_parameters == active
    assert config.kv_bytes_per_token() == kv_bytes


def test_published_bytes_of_the_7b() -> None:
    """The index of the published 7B: bf16 weights and one float32 inv_freq of head_dim / 2 per
    layer.
    """
    config = pangu_jax.preset("embedded-7b")
    inv_freq = config.num_layers * config.head_dim // 2 * 4
    assert 2 * config.num_parameters + inv_freq == 16_061_784_576


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_the_tree_has_as_many_numbers_as_the_formula(name: str, form: str) -> None:
    config = pangu_jax.preset(name)
    leaves = jax.tree.leaves(pangu_jax.abstract(config, form=form))
    assert sum(leaf.size for leaf in leaves) == config.num_parameters


def test_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="known: embedded-1b, embedded-7b, mini, mini-moge, nano,"
    ):
        pangu_jax.preset("embedded-8b")


def test_every_preset_and_layout_loads() -> None:
    folder = configs.configs_folder()
    assert {file.stem for file in (folder / "models").glob("*.toml")} == set(PRESETS)
    for file in (folder / "models").glob("*.toml"):
        assert pangu_jax.preset(file) == pangu_jax.preset(file.stem)


GOOD = dict(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    max_positions=128,
    intermediate_size=48,
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(hidden_size=0), "hidden_size must be an integer from 1"),
        (dict(vocab_size=2**40), "vocab_size must be an integer from 1"),
        (dict(num_layers=10**6), "num_layers must be an integer from 1"),
        (dict(num_heads=3), r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        (dict(head_dim=7), "head_dim .7. must be even"),
        (dict(norm_eps=float("nan")), "norm_eps must be a finite number"),
        (dict(rope_theta=-1.0), "rope_theta must be a positive finite number"),
        (dict(intermediate_size=None), "either intermediate_size .* or a moge table"),
        (dict(moge=MoGEConfig(8, 4, 8, 8)), "either intermediate_size .* or a moge table"),
        (dict(eos_token_ids=(64,)), "eos_token_ids 64 is outside the vocabulary of 64"),
        (dict(bos_token_id=-1), "bos_token_id -1 is outside the vocabulary"),
    ],
)
def test_inconsistent_configs_are_refused(change: dict, complaint: str) -> None:
    ModelConfig(**GOOD)
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change", [dict(rope_theta="x"), dict(eos_token_ids=("a",)), dict(vocab_size=2.5)], ids=str
)
def test_wrong_types_are_a_config_error(change: dict) -> None:
    """Past the run-time type checks, as a user without them would."""
    config = object.__new__(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        value = {**GOOD, **change}.get(field.name, field.default)
        object.__setattr__(config, field.name, value)
    with pytest.raises(ConfigError, match=next(iter(change))):
        config.__post_init__()


def test_groups_must_divide_the_experts() -> None:
    with pytest.raises(ConfigError, match=r"num_experts \(10\) must be a multiple"):
        MoGEConfig(10, 4, 8, 8)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hiden_size = 3", "unknown key 'hiden_size'; did you mean hidden_size"),
        ("vocab_size = 'x'", 'vocab_size must be an integer, not "x"'),
        ("vocab_size = true", "vocab_size must be an integer, not true"),
        ("norm_eps = nan", "norm_eps must be a finite number"),
        ("dtype = 'int8'", "dtype must be one of float32, bfloat16, float16"),
        ("vocab_size = 3", "missing hidden_size"),
        ("moge = 3", "moge must be a table"),
        ("vocab_size = ", "not valid TOML"),
    ],
)
def test_bad_toml_is_one_line_with_the_path(tmp_path, text: str, complaint: str) -> None:
    file = tmp_path / "model.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        pangu_jax.preset(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_is_hashable_and_small() -> None:
    config = pangu_jax.preset("nano-moge")
    assert hash(config) == hash(dataclasses.replace(config))
    assert len(dataclasses.fields(config)) <= 20
