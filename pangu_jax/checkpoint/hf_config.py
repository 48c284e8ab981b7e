"""Hugging Face `config.json` and ModelConfig, both ways; look-alikes are recognised and refused."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from pangu_jax import strict
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError

DENSE, MOE = "PanguEmbedded", "PanguProMoE"
CLASSES = {DENSE: "PanguEmbeddedForCausalLM", MOE: "PanguProMoEForCausalLM"}
SUPPORTED = (
    "pangu_jax reads openPangu-Embedded 1B/7B (PanguEmbedded) and Pangu Pro MoE 72B "
    "(PanguProMoE, MoGE)"
)

MOE_FIELDS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "shared_expert_intermediate_size",
)

# Where config.json has another name for a field of ModelConfig or MoGEConfig.
THEIRS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "bias",
    "eos_token_ids": "eos_token_id",
    "dtype": "torch_dtype",
    "num_groups": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "shared_width": "shared_expert_intermediate_size",
}

# Other networks of the family, by the class their config names.
LOOK_ALIKES = {
    "PanguProMoEV2": "openPangu-R-72B-2512 (PanguProMoE V2)",
    "PanguUltraMoE": "openPangu-Ultra-MoE-718B",
    "PanguUltra": "a Pangu Ultra model",
    "PanguV2": "openPangu-2.0",
    "Pangu2": "openPangu-2.0",
    "OpenPanguV2": "openPangu-2.0",
    "OpenPangu2": "openPangu-2.0",
}

# Fields only other networks have. R-72B-2512 keeps model_type "PanguProMoE" and would otherwise
# load half-way.
V2_FIELDS = (
    *("n_routed_experts", "n_shared_experts", "param_sink_number", "qk_nope_dim", "qk_rope_dim"),
    *("v_channels", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob"),
    *("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"),
)
MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MLA_FIELDS = (*MLA_FIELDS, "attention_q_lora_dim", "attention_kv_lora_dim")

# Parts of a network that pangu_jax does not implement: any other value is refused, never ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "sandwich_norm": (False, None),
    "sliding_window": (None, 0, False),
    "use_sliding_window": (False, None),
    "mlp_only_layers": ([], None),
    "attention_sink": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}


def refuse_look_alike(raw: dict[str, Any]) -> None:
    """Raises ConfigError when the config describes another network of the Pangu family."""
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(
            f"architectures must be a list of names, not {strict.describe(named)}; {SUPPORTED}"
        )
    kind = raw.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"model_type must be a name, not {strict.describe(kind)}; {SUPPORTED}")
    for clue in [*named, *([kind] if kind else [])]:
        for prefix, model in LOOK_ALIKES.items():
            if clue.replace("_", "").lower().startswith(prefix.lower()):
                raise ConfigError(
                    f"this is {model}, a different network ({strict.shorten(clue)}); {SUPPORTED}"
                )
    for fields, model in (
        (MLA_FIELDS, "an MLA model such as openPangu-Ultra-MoE"),
        (V2_FIELDS, "openPangu-R-72B-2512 (PanguProMoE V2) or openPangu-Ultra-MoE"),
    ):
        found = next((field for field in fields if raw.get(field) is not None), None)
        if found:
            raise ConfigError(f"this is {model}, a different network (field {found}); {SUPPORTED}")


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed `config.json`.

    Raises ConfigError: look-alikes, unsupported or bad values.
    """
    refuse_look_alike(raw)
    kind = _family(raw)
    for name, neutral in NEUTRAL.items():
        if name in raw and raw[name] not in neutral:
            raise ConfigError(f"{name} = {strict.describe(raw[name])} is not supported")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(layer != "full_attention" for layer in kinds):
        raise ConfigError(f"layer_types = {strict.describe(kinds)} is not supported")
    experts = [name for name in MOE_FIELDS if kind == DENSE and raw.get(name) is not None]
    if experts:
        raise ConfigError(f"{experts[0]} is given, but {DENSE} is a dense model")
    if raw.get("qkv_bias") is not None and raw["qkv_bias"] != _bias(raw):
        raise ConfigError("qkv_bias differs from bias: separate biases are not supported")
    required = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")
    table: dict[str, Any] = {name: _required(raw, THEIRS.get(name, name)) for name in required}
    table["num_kv_heads"] = _optional(raw, "num_key_value_heads", table["num_heads"])
    table["head_dim"] = _head_dim(raw, table)
    table["rope_theta"] = _rope_theta(raw)
    table["attention_bias"] = _bias(raw)
    table["dtype"] = _dtype(raw)
    for name in ("tie_embeddings", "norm_eps", "init_range"):
        if raw.get(THEIRS[name]) is not None:
            table[name] = raw[THEIRS[name]]
    for name in ("bos_token_id", "pad_token_id"):
        table[name] = raw.get(name)
    table["eos_token_ids"] = eos_token_ids(raw)
    if kind == DENSE:
        table["intermediate_size"] = _required(raw, "intermediate_size")
    else:
        table["moge"] = _moge(raw)
    with _their_words():
        return strict.build(ModelConfig, table, "")


def with_eos(config: ModelConfig, eos: Any) -> ModelConfig:
    """The config with other end-of-sequence ids. Raises ConfigError."""
    with _their_words():
        ids = strict.coerce(tuple[int, ...], eos, "eos_token_ids")
        return dataclasses.replace(config, eos_token_ids=ids)


@contextlib.contextmanager
def _their_words() -> Iterator[None]:
    """Complaints about a ModelConfig in the names config.json uses."""
    try:
        yield
    except ConfigError as error:
        message = str(error).replace("moge: ", "")
        message = re.sub(r"\w+", lambda word: THEIRS.get(word[0], word[0]), message)
        raise ConfigError(message) from None


def _family(raw: dict[str, Any]) -> str:
    """PanguEmbedded or PanguProMoE, from model_type and architectures, which must agree."""
    classes, kind = raw.get("architectures"), raw.get("model_type")
    if classes:
        by_class = {name: family for family, name in CLASSES.items()}
        if classes[0] not in by_class:
            raise ConfigError(
                f"architecture {strict.describe(classes[0])} is not supported; {SUPPORTED}"
            )
        family = by_class[classes[0]]
        if kind not in (None, family):
            raise ConfigError(
                f"model_type {strict.describe(kind)} and architecture {classes[0]} disagree"
            )
        return family
    if kind not in CLASSES:
        raise ConfigError(f"model_type {strict.describe(kind)} is not supported; {SUPPORTED}")
    return kind


def _required(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ConfigError(f"{name} is missing")
    return raw[name]


def _optional(raw: dict[str, Any], name: str, default: Any) -> Any:
    return default if raw.get(name) is None else raw[name]


def _head_dim(raw: dict[str, Any], table: dict[str, Any]) -> Any:
    if raw.get("head_dim") is not None:
        return raw["head_dim"]
    hidden, heads = table["hidden_size"], table["num_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        raise ConfigError("hidden_size and num_attention_heads must be positive integers")
    if hidden % heads:
        raise ConfigError(
            f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) and no "
            "head_dim is given"
        )
    return hidden // heads


def _rope_theta(raw: dict[str, Any]) -> Any:
    """rope_theta, at the top level or in rope_parameters (newer); scaling is refused."""
    given = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and all(
            key == "rope_theta" or (key in ("rope_type", "type") and kind in (None, "default"))
            for key, kind in rope.items()
        )
        if not plain:
            raise ConfigError(f"{name} = {strict.describe(rope)} is not supported: RoPE scaling")
        if rope.get("rope_theta") is not None:
            given.append(rope["rope_theta"])
    if not given:
        raise ConfigError("rope_theta is missing")
    if any(theta != given[0] for theta in given):
        raise ConfigError(f"two values of rope_theta disagree: {strict.describe(given)}")
    return given[0]


def _bias(raw: dict[str, Any]) -> Any:
    """The published dense configs say `bias`; Pro MoE hard-codes biases and says nothing."""
    given = [raw[name] for name in ("bias", "attention_bias") if raw.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError("bias and attention_bias disagree")
    return given[0] if given else True


def _dtype(raw: dict[str, Any]) -> Any:
    """`torch_dtype`, or `dtype` in newer Transformers; bfloat16, as published, when absent."""
    return _optional(raw, "torch_dtype", _optional(raw, "dtype", "bfloat16"))


def _moge(raw: dict[str, Any]) -> dict[str, Any]:
    """One expert per group, so the groups are as many as the experts of a token (the published
    rule).
    """
    names = ("num_experts", "num_groups", "expert_width", "shared_width")
    return {name: _required(raw, THEIRS.get(name, name)) for name in names}


def eos_token_ids(raw: dict[str, Any]) -> Any:
    """`eos_token_id` of a config as a tuple: one id, a list, or none."""
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


# Keys of config.json that a ModelConfig says, and other spellings of some of them.
SAID = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "hidden_act", "rope_theta"),
    *("intermediate_size", "num_experts", "quantization_config", *THEIRS.values()),
)
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")
SPELLINGS = ("dtype", "head_dim", "bias", "attention_bias")


def remembered(raw: dict[str, Any]) -> dict[str, Any]:
    """What `to_hf` needs of a parsed config.json: all that a ModelConfig does not say.

    Token ids are kept as written; of another spelling of what it does say, only that it was there.
    """
    said = set(SAID) - {*TOKEN_IDS, *SPELLINGS}
    kept = {name: value for name, value in raw.items() if name not in said}
    kept.update(dict.fromkeys(name for name in SPELLINGS if name in raw))
    if isinstance(raw.get("rope_parameters"), dict):
        kept["rope_parameters"] = {**raw["rope_parameters"], "rope_theta": None}
    return kept


def to_hf(config: ModelConfig, dtype: str, original: dict[str, Any] | None) -> dict[str, Any]:
    """The `config.json` of a model stored in `dtype`.

    original: what was `remembered` of the config.json it was loaded from
    """
    kind = DENSE if config.moge is None else MOE
    raw: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_range,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": _eos_as_published(config.eos_token_ids),
        "torch_dtype": dtype,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        raw["head_dim"] = config.head_dim
    if config.moge is None:
        raw["bias"] = config.attention_bias
        raw["intermediate_size"] = config.intermediate_size
    else:
        if not config.attention_bias:
            raw["bias"] = False
        raw["num_experts"] = config.moge.num_experts
        raw["num_experts_per_tok"] = config.moge.num_groups
        raw["moe_intermediate_size"] = config.moge.expert_width
        raw["shared_expert_intermediate_size"] = config.moge.shared_width
        raw["output_router_logits"] = False
        raw["router_aux_loss_coef"] = 0.001
    if not original:
        return raw
    ours = {name: value for name, value in raw.items() if name in SAID and name not in TOKEN_IDS}
    return {**original, **ours, **_other_spellings(config, dtype, original)}


def _other_spellings(config: ModelConfig, dtype: str, original: dict[str, Any]) -> dict[str, Any]:
    """What the original config says under other names, brought up to date."""
    biases = config.attention_bias
    values = (dtype, config.head_dim, biases, biases)
    current: dict[str, Any] = {
        name: value for name, value in zip(SPELLINGS, values, strict=True) if name in original
    }
    if isinstance(original.get("rope_parameters"), dict):
        rope = {**original["rope_parameters"], "rope_theta": config.rope_theta}
        current["rope_parameters"] = rope
    return current


def _eos_as_published(ids: tuple[int, ...]) -> int | list[int] | None:
    if len(ids) <= 1:
        return ids[0] if ids else None
    return list(ids)
