"""An independent forward pass in float64 NumPy, written from the published mathematics.

Shares no code with pangu_jax.

It reads published tensor names in their [out, in] layout and a parsed config.json. Slow and plain
on purpose.
"""

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """x: [T, heads, H], positions 0..T-1."""
    T, _, H = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for j in range(H // 2):
            angle = t * theta ** (-2 * j / H)
            c, s = np.cos(angle), np.sin(angle)
            a, b = x[t, :, j], x[t, :, j + H // 2]
            out[t, :, j], out[t, :, j + H // 2] = a * c - b * s, b * c + a * s
    return out


def _linear(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _attention(w: Tensors, name: str, x: np.ndarray, raw: dict[str, Any]) -> np.ndarray:
    Q, K = raw["num_attention_heads"], raw["num_key_value_heads"]
    H = raw.get("head_dim") or raw["hidden_size"] // Q
    T = len(x)
    q = _rotate(_linear(w, f"{name}.q_proj", x).reshape(T, Q, H), raw["rope_theta"])
    k = _rotate(_linear(w, f"{name}.k_proj", x).reshape(T, K, H), raw["rope_theta"])
    v = _linear(w, f"{name}.v_proj", x).reshape(T, K, H)
    out = np.zeros((T, Q, H))
    for h in range(Q):
        kv = h // (Q // K)
        scores = q[:, h] @ k[:, kv].T / np.sqrt(H)
        scores[np.triu_indices(T, 1)] = -np.inf
        out[:, h] = _softmax(scores) @ v[:, kv]
    return _linear(w, f"{name}.o_proj", out.reshape(T, Q * H))


def _swiglu(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    gate, up = _linear(w, f"{name}.gate_proj", x), _linear(w, f"{name}.up_proj", x)
    return _linear(w, f"{name}.down_proj", _silu(gate) * up)


def _moge(
    w: Tensors, name: str, x: np.ndarray, raw: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    E, G = raw["num_experts"], raw["num_experts_per_tok"]
    size = E // G
    logits = x @ w[f"{name}.gate.weight"].T
    p = _softmax(logits)
    scale = w[f"{name}.router_scale"][0]
    y = _swiglu(w, f"{name}.shared_expert", x)
    ids = np.zeros((len(x), G), int)
    weights = np.zeros((len(x), G))
    for t in range(len(x)):
        for g in range(G):
            e = g * size + int(np.argmax(p[t, g * size : (g + 1) * size]))
            ids[t, g], weights[t, g] = e, p[t, e]
            y[t] += _swiglu(w, f"{name}.experts.{e}", x[t : t + 1])[0] * p[t, e] * scale[e]
    return y, logits, ids, weights


def forward(w: Tensors, raw: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """Logits [T, V], hidden [L+1, T, D], final_norm [T, D] and, for MoGE, each layer's routing, in
    float64.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in w.items()}
    eps = raw["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    hidden, routing = [x], []
    for i in range(raw["num_hidden_layers"]):
        p = f"model.layers.{i}"
        a = _rms(x, w[f"{p}.input_layernorm.weight"], eps)
        x = x + _attention(w, f"{p}.self_attn", a, raw)
        m = _rms(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        if "num_experts" in raw:
            y, *routed = _moge(w, f"{p}.mlp", m, raw)
            routing.append(routed)
            x = x + y
        else:
            x = x + _swiglu(w, f"{p}.mlp", m)
        hidden.append(x)
    final = _rms(x, w["model.norm.weight"], eps)
    head = w["model.embed_tokens.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    return {
        "logits": final @ head.T,
        "hidden": np.stack(hidden),
        "final_norm": final,
        "routing": routing,
    }
