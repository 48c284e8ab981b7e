"""Which published tensor goes where: one table, read by loading, saving and checking.

Weights keep the published [out, in] order, so a tensor is a slice of one of our leaves and nothing
is transposed: `leaf[part.index]` holds the tensor `part.name`, reshaped to `part.shape`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from pangu_jax.config import ModelConfig

Kind = Literal["float", "scale", "int8", "fp8", "int32", "packed", "int64"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One published tensor, and where it lies in the leaf of one layer.

    kind: of its numbers; "scale" are floats that must be finite and not negative, "packed" int32
        whose bytes are the leaf's
    shared: every part of the leaf says the same single number, if the files are right
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    kind: Kind = "float"
    shared: bool = False


Leaf = tuple[str, Iterator[Part]]


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """Every leaf by its name in separate form, with its parts, in the order files list them.

    Lazy: a hostile config may claim billions of tensors, and the first missing one ends the
    reading.
    """
    vocab = (config.vocab_size, config.hidden_size)
    yield "embed", iter([Part("model.embed_tokens.weight", vocab)])
    for i in range(config.num_layers):
        for name, parts in _layer(config, f"model.layers.{i}."):
            yield f"blocks.{i}.{name}", parts
    yield "norm.weight", iter([Part("model.norm.weight", (config.hidden_size,))])
    if not config.tie_embeddings:
        yield "head", iter([Part("lm_head.weight", vocab)])


def _layer(config: ModelConfig, prefix: str) -> Iterator[Leaf]:
    width = (config.hidden_size,)
    yield "attention_norm.weight", iter([Part(f"{prefix}input_layernorm.weight", width)])
    yield from _attention(config, f"{prefix}self_attn.")
    yield "mlp_norm.weight", iter([Part(f"{prefix}post_attention_layernorm.weight", width)])
    if config.moge is None:
        assert config.intermediate_size is not None
        yield from _mlp(config, f"{prefix}mlp.", config.intermediate_size, "mlp.")
    else:
        yield from _moge(config, f"{prefix}mlp.")


def _attention(config: ModelConfig, prefix: str) -> Iterator[Leaf]:
    D, H, K = config.hidden_size, config.head_dim, config.num_kv_heads
    group = config.num_heads // K  # query heads of a kv head
    fused = (
        ("q_proj", config.num_heads * H, slice(0, group)),
        ("k_proj", K * H, group),
        ("v_proj", K * H, group + 1),
    )
    everything = slice(None)
    yield (
        "attention.qkv",
        (Part(f"{prefix}{n}.weight", (out, D), (everything, at)) for n, out, at in fused),
    )
    if config.attention_bias:
        yield (
            "attention.qkv_bias",
            (Part(f"{prefix}{n}.bias", (out,), (everything, at)) for n, out, at in fused),
        )
    yield "attention.out", iter([Part(f"{prefix}o_proj.weight", (D, config.num_heads * H))])
    if config.attention_bias:
        yield "attention.out_bias", iter([Part(f"{prefix}o_proj.bias", (D,))])


def _mlp(config: ModelConfig, prefix: str, width: int, ours: str) -> Iterator[Leaf]:
    D = config.hidden_size
    fused = enumerate(("gate_proj", "up_proj"))
    yield f"{ours}gate_up", (Part(f"{prefix}{n}.weight", (width, D), (i,)) for i, n in fused)
    yield f"{ours}down", iter([Part(f"{prefix}down_proj.weight", (D, width))])


def _moge(config: ModelConfig, prefix: str) -> Iterator[Leaf]:
    assert config.moge is not None
    D, E, F = config.hidden_size, config.moge.num_experts, config.moge.expert_width
    yield "mlp.router", iter([Part(f"{prefix}gate.weight", (E, D))])
    yield "mlp.router_scale", iter([Part(f"{prefix}router_scale", (1, E))])
    expert = f"{prefix}experts."
    yield (
        "mlp.gate_up",
        (
            Part(f"{expert}{e}.{n}.weight", (F, D), (e, i))
            for e in range(E)
            for i, n in enumerate(("gate_proj", "up_proj"))
        ),
    )
    yield "mlp.down", (Part(f"{expert}{e}.down_proj.weight", (D, F), (e,)) for e in range(E))
    yield from _mlp(config, f"{prefix}shared_expert.", config.moge.shared_width, "mlp.shared.")
