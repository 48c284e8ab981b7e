"""The training step of either model in PyTorch, to compare ours with: speed, loss and gradients.

Plain eager PyTorch as its documentation would have it, written from the architecture and sharing
nothing with the JAX code but the names and shapes of leaves. This is the only module that needs
torch, which nothing installs.
"""

import math
from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from infer.bench import bounds
from pangu_jax import build
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.model import Pangu
from train.config import OptimizerSection
from train.objectives import Batch

Tensors = dict[str, Tensor]


def program() -> str:
    """What it is, for a table."""
    return f"PyTorch {torch.__version__}, eager"


def steps(
    model: Pangu, batch: Batch, section: OptimizerSection, scheduled: int
) -> Callable[[int], tuple[float, float]]:
    """What takes so many steps from a copy of the model's weights, on as many threads as JAX has,
    and tells the last one's loss and gradient norm.

    scheduled: steps of the run that the learning rate's schedule is made for
    """
    torch.set_num_threads(bounds.cores())
    separate = build.convert(model, "separate")
    weights = {name: torch.tensor(np.asarray(leaf)) for name, leaf in build.named_leaves(separate)}
    for leaf in weights.values():
        leaf.requires_grad_()
    layers = [_layer(weights, f"blocks.{i}.") for i in range(model.config.num_layers)]
    data = {name: torch.tensor(np.asarray(part)) for name, part in vars(batch).items()}
    optimizer = _adamw(weights, section)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(section, scheduled))

    def take(count: int) -> tuple[float, float]:
        value = norm = torch.tensor(math.nan)
        for _ in range(count):
            optimizer.zero_grad()
            value = loss(weights, layers, model.config, data)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), section.clip_norm)
            optimizer.step()
            schedule.step()
        return value.item(), norm.item()

    return take


def loss(w: Tensors, layers: list[Tensors], config: ModelConfig, batch: Tensors) -> Tensor:
    """Cross-entropy, averaged over the weights of the batch."""
    norm = lambda x, weight: _norm(x, weight, config.norm_eps)
    x = F.embedding(batch["tokens"], w["embed"])
    angles = _angles(batch["positions"], config)
    visible = _visible(batch["segments"])
    for layer in layers:
        h = norm(x, layer["attention_norm.weight"])
        x = x + _attention(layer, config, h, angles, visible)
        h = norm(x, layer["mlp_norm.weight"])
        x = x + (_mlp(layer, h) if config.moge is None else _moge(layer, config.moge, h))
    logits = F.linear(norm(x, w["norm.weight"]), w.get("head", w["embed"]))
    targets = batch["targets"].flatten().long()
    each = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    weights = batch["weights"].flatten()
    return (each * weights).sum() / weights.sum()


def _layer(weights: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): leaf for n, leaf in weights.items() if n.startswith(prefix)}


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _attention(
    w: Tensors, config: ModelConfig, x: Tensor, angles: tuple[Tensor, Tensor], visible: Tensor
) -> Tensor:
    """w["attention.qkv"] holds, for every kv head, its query heads, its key and its value."""
    B, T, _ = x.shape
    bias = w.get("attention.qkv_bias")
    y = F.linear(x, w["attention.qkv"].flatten(0, 2), None if bias is None else bias.flatten())
    y = y.view(B, T, config.num_kv_heads, -1, config.head_dim)
    heads = lambda part: part.flatten(2, -2).transpose(1, 2)  # [B, heads, T, H]
    queries, keys, values = heads(y[..., :-2, :]), heads(y[..., -2:-1, :]), heads(y[..., -1:, :])
    queries, keys = _rotate(queries, angles), _rotate(keys, angles)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible, enable_gqa=True
    )
    mixed = mixed.transpose(1, 2).flatten(2)
    return F.linear(mixed, w["attention.out"], w.get("attention.out_bias"))


def _mlp(w: Tensors, x: Tensor, name: str = "mlp") -> Tensor:
    return _swiglu(x, w[f"{name}.gate_up"], w[f"{name}.down"])


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up.flatten(0, 1)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _moge(w: Tensors, config: MoGEConfig, x: Tensor) -> Tensor:
    """The experts one after the other, each with the tokens that chose it."""
    rows = x.flatten(0, 1)
    shares = F.linear(rows, w["mlp.router"]).float().softmax(-1)
    groups = shares.view(len(rows), config.num_groups, -1)
    best, place = groups.max(-1)  # of equal ones the first
    chosen = place + torch.arange(config.num_groups) * groups.shape[-1]
    weights = best * w["mlp.router_scale"][chosen]
    routed = torch.zeros_like(rows)
    for expert in range(config.num_experts):
        token, group = torch.where(chosen == expert)
        y = _swiglu(rows[token], w["mlp.gate_up"][expert], w["mlp.down"][expert])
        routed = routed.index_add(0, token, y * weights[token, group, None])
    return routed.view_as(x) + _mlp(w, x, "mlp.shared")


def _visible(segments: Tensor) -> Tensor:
    """[B, 1, T, T]: whether a query may see a key: the same segment, and not the future."""
    T = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


def _angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [B, 1, T, H]."""
    H = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, H, 2, dtype=torch.float32) / H)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * angles[0] + torch.cat([-high, low], dim=-1) * angles[1]


def _adamw(weights: Tensors, section: OptimizerSection) -> torch.optim.AdamW:
    """Matrices decay; norms, biases and the router's scale do not. Fused where this PyTorch has
    that on a CPU.
    """
    bare = lambda name: name.endswith(("bias", "norm.weight", "router_scale"))
    groups = [
        {
            "params": [leaf for name, leaf in weights.items() if not bare(name)],
            "weight_decay": section.weight_decay,
        },
        {
            "params": [leaf for name, leaf in weights.items() if bare(name)],
            "weight_decay": 0.0,
        },
    ]
    lr, betas = section.learning_rate, (section.beta1, section.beta2)
    try:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=True)


def _schedule(section: OptimizerSection, steps: int) -> Callable[[int], float]:
    """The learning rate of a step as a part of the highest: a line up to the last step of the
    warm-up, then half a cosine down to the last of all.
    """
    warm, last = section.warmup_steps, section.final_fraction

    def part(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min((step + 1 - warm) / max(steps - warm, 1), 1.0)
        return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    return part
