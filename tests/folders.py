"""Random Hugging Face folders for tests, written with the safetensors library and not with ours."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

DENSE = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "bias": True,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
MOGE = {
    **{name: value for name, value in DENSE.items() if name not in ("bias", "intermediate_size")},
    "architectures": ["PanguProMoEForCausalLM"],
    "model_type": "PanguProMoE",
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 40,
}

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def random_tensors(raw: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors by published name, lively enough that mistakes show in the logits."""
    rng = np.random.default_rng(seed)
    D, V, Q = raw["hidden_size"], raw["vocab_size"], raw["num_attention_heads"]
    K, H = raw["num_key_value_heads"], raw.get("head_dim") or D // Q
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        tensors[f"{name}.weight"] = values.astype(np.float32)

    def vector(name: str, size: int, centre: float) -> None:
        tensors[name] = (centre + 0.2 * rng.standard_normal(size)).astype(np.float32)

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, D, 1.5)
        matrix(f"{name}.up_proj", width, D)
        matrix(f"{name}.down_proj", D, width)

    matrix("model.embed_tokens", V, D, np.sqrt(D))
    for i in range(raw["num_hidden_layers"]):
        p = f"model.layers.{i}"
        vector(f"{p}.input_layernorm.weight", D, 1.0)
        vector(f"{p}.post_attention_layernorm.weight", D, 1.0)
        for name, out, inner in (
            ("q", Q * H, D),
            ("k", K * H, D),
            ("v", K * H, D),
            ("o", D, Q * H),
        ):
            matrix(f"{p}.self_attn.{name}_proj", out, inner, 1.5)
            if raw.get("bias", True):
                vector(f"{p}.self_attn.{name}_proj.bias", out, 0.0)
        if "num_experts" in raw:
            matrix(f"{p}.mlp.gate", raw["num_experts"], D, 2.0)
            vector(f"{p}.mlp.router_scale", raw["num_experts"], 1.5)
            tensors[f"{p}.mlp.router_scale"] = tensors[f"{p}.mlp.router_scale"][None]
            for e in range(raw["num_experts"]):
                mlp(f"{p}.mlp.experts.{e}", raw["moe_intermediate_size"])
            mlp(f"{p}.mlp.shared_expert", raw["shared_expert_intermediate_size"])
        else:
            mlp(f"{p}.mlp", raw["intermediate_size"])
    vector("model.norm.weight", D, 1.0)
    if not raw["tie_word_embeddings"]:
        matrix("lm_head", V, D, 3.0)
    return tensors


def write(
    folder: Path,
    raw: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
    dtype: str | None = None,
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """A folder with config.json and weights in one file or several with an index; returns what was
    stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or raw["torch_dtype"]
    tensors = random_tensors(raw) if tensors is None else tensors
    stored = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": dtype}))
    if shards == 1:
        safetensors.numpy.save_file(stored, folder / "model.safetensors")
        return stored
    names = sorted(stored)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file)
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return stored
