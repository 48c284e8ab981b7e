"""config.json to ModelConfig and back: published values, spellings, look-alikes, round trips."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pangu_jax
from pangu_jax.checkpoint import hf_config
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.errors import ConfigError
from tests import folders

Raw = dict[str, Any]

# The config.json published with openPangu-Embedded-7B (V1.0, V1.1).
PUBLISHED_7B: Raw = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 45892,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12800,
    "max_position_embeddings": 32768,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 153376,
}
# The fields that set the published Pro MoE 72B apart (the defaults of its configuration class).
PUBLISHED_72B: Raw = {
    **{name: value for name, value in PUBLISHED_7B.items() if name not in ("bias", "auto_map")},
    "architectures": ["PanguProMoEForCausalLM"],
    "model_type": "PanguProMoE",
    "hidden_size": 5120,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1344,
    "num_attention_heads": 40,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5376,
}
del PUBLISHED_72B["intermediate_size"]


def refused(raw: Raw) -> str:
    """The one sentence with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        hf_config.from_hf(raw)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.isprintable()
    assert len(message) < 500
    return message


# --- published values -------------------------------------------------------------------------


def test_the_published_7b() -> None:
    config = hf_config.from_hf(PUBLISHED_7B)
    assert config == ModelConfig(
        vocab_size=153376,
        hidden_size=4096,
        num_layers=34,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=16_000_000.0,
        max_positions=32768,
        intermediate_size=12800,
        moge=None,
        attention_bias=True,
        tie_embeddings=False,
        norm_eps=1e-5,
        init_range=0.02,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_ids=(45892,),
        dtype="bfloat16",
    )
    assert config == pangu_jax.preset("embedded-7b")


def test_the_published_72b() -> None:
    config = hf_config.from_hf(PUBLISHED_72B)
    assert config.moge == MoGEConfig(
        num_experts=64, num_groups=8, expert_width=1344, shared_width=5376
    )
    assert (
        config.attention_bias
    )  # hard-coded in the published class, so config.json does not say it
    assert config.head_dim == 128
    assert config.intermediate_size is None
    assert config == pangu_jax.preset("pro-moe-72b")


@pytest.mark.parametrize("raw", [PUBLISHED_7B, PUBLISHED_72B], ids=["7b", "72b"])
def test_a_published_config_is_written_as_it_was(raw: Raw) -> None:
    assert hf_config.to_hf(hf_config.from_hf(raw), "bfloat16", raw) == raw


@pytest.mark.parametrize("raw", [PUBLISHED_7B, PUBLISHED_72B], ids=["7b", "72b"])
def test_a_preset_is_written_as_published(raw: Raw) -> None:
    """Apart from what only the original knows: its code and the version of Transformers."""
    fresh = hf_config.to_hf(hf_config.from_hf(raw), "bfloat16", None)
    only_there = ("auto_map", "transformers_version")
    assert fresh == {name: value for name, value in raw.items() if name not in only_there}


# --- spellings --------------------------------------------------------------------------------


def without(raw: Raw, *names: str) -> Raw:
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize(
    "raw",
    [
        without(PUBLISHED_7B, "architectures"),
        without(PUBLISHED_7B, "model_type"),
        {**PUBLISHED_7B, "architectures": None},
        {**PUBLISHED_7B, "architectures": []},
        without(PUBLISHED_7B, "bias"),
        {**without(PUBLISHED_7B, "bias"), "attention_bias": True},
        {**PUBLISHED_7B, "attention_bias": True, "qkv_bias": True},
        {**PUBLISHED_7B, "head_dim": 128},
        {**PUBLISHED_7B, "head_dim": None},
        {**PUBLISHED_7B, "eos_token_id": [45892]},
        {**PUBLISHED_7B, "rope_scaling": None},
        {**PUBLISHED_7B, "rope_scaling": {"rope_type": "default"}},
        {**PUBLISHED_7B, "rope_parameters": {"rope_type": "default", "rope_theta": 16000000.0}},
        {
            **without(PUBLISHED_7B, "rope_theta"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 16000000.0},
        },
        {**without(PUBLISHED_7B, "rope_theta"), "rope_parameters": {"rope_theta": 16000000.0}},
        {**PUBLISHED_7B, "rope_theta": 16000000},
        {**without(PUBLISHED_7B, "torch_dtype"), "dtype": "bfloat16"},
        {**PUBLISHED_7B, "torch_dtype": None, "dtype": "bfloat16"},
        without(PUBLISHED_7B, "torch_dtype"),
        without(PUBLISHED_7B, "hidden_act", "use_cache", "attention_dropout", "initializer_range"),
        without(PUBLISHED_7B, "rms_norm_eps", "tie_word_embeddings"),
        {**PUBLISHED_7B, "mlp_bias": False, "sliding_window": None, "quantization_config": None},
        {**PUBLISHED_7B, "num_nextn_predict_layers": None, "kv_lora_rank": None},
        {**PUBLISHED_7B, "something_new": {"a": [1]}},
    ],
)
def test_other_spellings_of_the_7b(raw: Raw) -> None:
    assert hf_config.from_hf(raw) == hf_config.from_hf(PUBLISHED_7B)


def test_the_dtype_of_newer_transformers() -> None:
    raw = {**without(PUBLISHED_7B, "torch_dtype"), "dtype": "float16"}
    assert hf_config.from_hf(raw).dtype == "float16"
    written = hf_config.to_hf(hf_config.from_hf(raw), "float32", raw)
    assert written["dtype"] == "float32"
    assert hf_config.from_hf(written).dtype == "float32"


def test_the_rope_parameters_of_newer_transformers() -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    raw = {**without(PUBLISHED_7B, "rope_theta"), "rope_parameters": rope}
    assert hf_config.from_hf(raw).rope_theta == 5000.0


def test_two_values_of_rope_theta_are_refused() -> None:
    """One of them is not what the model was trained with."""
    raw = {**PUBLISHED_7B, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert "rope_theta" in refused(raw)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": None, "type": "linear", "factor": 4.0},
        {"factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 16000000.0},
        {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 16000000.0}},
        "yarn",
        [4.0],
        True,
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_refused(name: str, rope: Any) -> None:
    assert name in refused({**PUBLISHED_7B, name: rope})


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, ()), ([], ()), (7, (7,)), ([7], (7,)), ([7, 9], (7, 9))]
)
def test_end_tokens(eos: Any, expected: tuple[int, ...]) -> None:
    raw = {**PUBLISHED_7B, "eos_token_id": eos}
    assert hf_config.from_hf(raw).eos_token_ids == expected
    assert hf_config.to_hf(hf_config.from_hf(raw), "bfloat16", raw)["eos_token_id"] == eos


def test_no_special_tokens() -> None:
    config = hf_config.from_hf(without(PUBLISHED_7B, "bos_token_id", "pad_token_id"))
    assert config.bos_token_id is None
    assert config.pad_token_id is None


def test_all_heads_have_keys_when_their_number_is_not_given() -> None:
    assert hf_config.from_hf(without(PUBLISHED_7B, "num_key_value_heads")).num_kv_heads == 32


@pytest.mark.parametrize("name", ["bias", "attention_bias", "qkv_bias"])
def test_biases_that_disagree_are_refused(name: str) -> None:
    others = {"bias": True, "attention_bias": True, "qkv_bias": True}
    assert "bias" in refused({**PUBLISHED_7B, **others, name: False})


# --- look-alikes ------------------------------------------------------------------------------

V2_FIELDS: Raw = {
    "n_routed_experts": 80,
    "n_shared_experts": 1,
    "param_sink_number": 128,
    "qk_nope_dim": 128,
    "qk_rope_dim": 64,
    "v_channels": 128,
    "first_k_dense_replace": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "num_mtp_layers": 1,
}


@pytest.mark.parametrize("architectures", [["PanguProMoEForCausalLM"], [], None, ...], ids=repr)
@pytest.mark.parametrize("field", V2_FIELDS)
def test_r_72b_2512_is_told_by_its_fields(field: str, architectures: Any) -> None:
    raw = {**PUBLISHED_72B, "architectures": architectures, field: V2_FIELDS[field]}
    if architectures is ...:
        del raw["architectures"]
    message = refused(raw)
    assert "openPangu-R-72B-2512" in message
    assert field in message


@pytest.mark.parametrize(("field", "value"), [("norm_topk_prob", False), ("num_mtp_layers", 0)])
def test_r_72b_2512_is_told_by_fields_of_any_value(field: str, value: Any) -> None:
    message = refused({**PUBLISHED_72B, field: value})
    assert "openPangu-R-72B-2512" in message
    assert field in message


@pytest.mark.parametrize(
    ("architectures", "model"),
    [
        (["PanguProMoEV2ForCausalLM"], "openPangu-R-72B-2512"),
        (["PanguProMoEV2Model"], "openPangu-R-72B-2512"),
        (["PanguProMoEForCausalLM", "PanguProMoEV2ForCausalLM"], "openPangu-R-72B-2512"),
        (["PanguUltraMoEForCausalLM"], "openPangu-Ultra-MoE-718B"),
        (["OpenPanguV2ForCausalLM"], "openPangu-2.0"),
    ],
)
@pytest.mark.parametrize("kind", ["PanguProMoE", "PanguEmbedded", ..., None], ids=repr)
def test_a_look_alike_is_told_by_its_class(architectures: list[str], model: str, kind: Any) -> None:
    raw = {**PUBLISHED_72B, "architectures": architectures, "model_type": kind}
    if kind is ...:
        del raw["model_type"]
    message = refused(raw)
    assert model in message
    assert architectures[-1] in message


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("PanguProMoEV2", "openPangu-R-72B-2512"),
        ("pangu_pro_moe_v2", "openPangu-R-72B-2512"),
        ("PanguUltraMoE", "openPangu-Ultra-MoE-718B"),
        ("pangu_ultra_moe", "openPangu-Ultra-MoE-718B"),
    ],
)
def test_a_look_alike_is_told_by_its_model_type(kind: str, model: str) -> None:
    message = refused({**without(PUBLISHED_72B, "architectures"), "model_type": kind})
    assert model in message
    assert kind in message


@pytest.mark.parametrize("field", ["q_lora_rank", "kv_lora_rank", "attention_kv_lora_dim"])
def test_latent_attention_is_told_by_its_fields(field: str) -> None:
    message = refused({**PUBLISHED_72B, field: 512})
    assert "Ultra-MoE" in message
    assert field in message


@pytest.mark.parametrize(
    ("change", "clue"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": ...}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ..., "model_type": "llama"}, "llama"),
        ({"architectures": ["PanguEmbeddedModel"]}, "PanguEmbeddedModel"),
        ({"architectures": ["panguembeddedforcausallm"]}, "panguembeddedforcausallm"),
        ({"architectures": ..., "model_type": "panguembedded"}, "panguembedded"),
        ({"architectures": [""]}, "architecture"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "PanguProMoE"}, "PanguProMoE"),
        ({"architectures": ..., "model_type": ...}, "model_type"),
        ({"architectures": ..., "model_type": "a\nb\x1b[2J"}, "model_type"),
        ({"architectures": ["n" * 10**5]}, "nnn"),
    ],
)
def test_other_models_are_named(change: Raw, clue: str) -> None:
    raw = {name: value for name, value in {**PUBLISHED_7B, **change}.items() if value is not ...}
    assert clue in refused(raw)


@pytest.mark.parametrize("value", [[], {}, [[]], 3, True, 1.5])
def test_a_kind_of_model_that_is_no_text_is_refused(value: Any) -> None:
    refused({**PUBLISHED_7B, "architectures": [value]})
    refused({**PUBLISHED_7B, "model_type": value})
    refused({**without(PUBLISHED_7B, "architectures"), "model_type": value})


@pytest.mark.parametrize("value", ["LlamaForCausalLM", {"LlamaForCausalLM": 1}, 3, True])
def test_architectures_that_are_no_list_are_refused_and_not_ignored(value: Any) -> None:
    assert "architectures" in refused({**PUBLISHED_7B, "architectures": value})


def test_what_is_read_is_named_to_who_brings_something_else() -> None:
    message = refused({**PUBLISHED_7B, "architectures": ["LlamaForCausalLM"]})
    assert "PanguEmbedded" in message
    assert "PanguProMoE" in message


# --- round trips ------------------------------------------------------------------------------


def positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


@st.composite
def tables(draw: st.DrawFn) -> Raw:
    """The fields of any valid ModelConfig; `build` makes it one, after the drawing."""
    vocab = draw(st.integers(1, 2**24))
    token = st.integers(0, vocab - 1)
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    head_dim = 2 * draw(st.integers(1, 128))
    natural = draw(st.booleans())
    width = draw(st.integers(1, 2**14))
    moge = None
    if draw(st.booleans()):
        groups = draw(st.integers(1, 16))
        moge = dict(
            num_experts=groups * draw(st.integers(1, 16)),
            num_groups=groups,
            expert_width=draw(st.integers(1, 2**14)),
            shared_width=draw(st.integers(1, 2**14)),
        )
    return dict(
        vocab_size=vocab,
        hidden_size=kv_heads * group * head_dim if natural else width,
        num_layers=draw(st.integers(1, 4096)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=draw(positive(1e-3, 1e12)),
        max_positions=draw(st.integers(1, 2**24)),
        intermediate_size=None if moge else draw(st.integers(1, 2**24)),
        moge=moge,
        attention_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        norm_eps=draw(positive(1e-30, 1.0)),
        init_range=draw(positive(1e-30, 1e30)),
        bos_token_id=draw(st.none() | token),
        pad_token_id=draw(st.none() | token),
        eos_token_ids=tuple(draw(st.lists(token, max_size=3))),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    )


def build(table: Raw) -> ModelConfig:
    moge = table["moge"] and MoGEConfig(**table["moge"])
    return ModelConfig(**{**table, "moge": moge})


@settings(max_examples=100, deadline=None)
@given(table=tables(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_round_trip(table: Raw, dtype: str) -> None:
    check_round_trip(build(table), dtype)


@pytest.mark.parametrize("name", ["nano", "nano-moge", "embedded-1b", "embedded-7b", "pro-moe-72b"])
def test_round_trip_of_the_presets(name: str) -> None:
    check_round_trip(pangu_jax.preset(name), "bfloat16")


def check_round_trip(config: ModelConfig, dtype: str) -> None:
    raw = json.loads(json.dumps(hf_config.to_hf(config, dtype, None), allow_nan=False))
    assert hf_config.from_hf(raw) == dataclasses.replace(config, dtype=dtype)
    kind = "PanguEmbedded" if config.moge is None else "PanguProMoE"
    assert raw["model_type"] == kind
    assert raw["architectures"] == [f"{kind}ForCausalLM"]
    assert raw["torch_dtype"] == dtype


EXTRAS = st.dictionaries(
    st.sampled_from(["transformers_version", "auto_map", "use_cache", "_name", "seq_length"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just({"a": [1, "b"]}),
)


@settings(max_examples=100, deadline=None)
@given(table=tables(), extras=EXTRAS, spelled=st.booleans())
def test_round_trip_keeps_the_original(table: Raw, extras: Raw, spelled: bool) -> None:
    """What the original says beyond the architecture stays, and it reads as the same config."""
    config = build(table)
    original = {**hf_config.to_hf(config, config.dtype, None), **extras}
    if spelled:
        original["eos_token_id"] = list(config.eos_token_ids)
        original["dtype"] = original.pop("torch_dtype")
        original["attention_bias"] = original.pop("bias", True)
        original["rope_parameters"] = {"rope_theta": original.pop("rope_theta")}
    read = hf_config.from_hf(original)
    assert read == config
    before = json.dumps(original)
    again = hf_config.to_hf(read, config.dtype, original)
    assert json.dumps(original) == before  # left as it was
    assert hf_config.from_hf(again) == config
    assert {name: again[name] for name in original} == original


def test_a_changed_architecture_goes_before_the_original() -> None:
    original = {**folders.DENSE, "unknown": 7}
    config = dataclasses.replace(
        hf_config.from_hf(original), num_layers=5, tie_embeddings=True, attention_bias=False
    )
    again = hf_config.to_hf(config, "float16", original)
    assert hf_config.from_hf(again) == dataclasses.replace(config, dtype="float16")
    assert again["unknown"] == 7
    assert again["num_hidden_layers"] == 5
