"""Model FLOPs of a training step, and the most that a chip can do."""

from pangu_jax.config import ModelConfig
from pangu_jax.plan import target as targets

# JAX's name of a device, and its description in configs/targets.
CHIPS = {
    "NVIDIA H200": "h200",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def peak(device_kind: str, itemsize: int) -> float | None:
    """The vendor's FLOP/s of dense products of numbers of so many bytes; None for other devices."""
    if device_kind not in CHIPS:
        return None
    return targets.load(CHIPS[device_kind]).chip.tflops(itemsize) * 1e12


def step_flops(config: ModelConfig, length: int, batch: int) -> float:
    """Model FLOPs of one step, 3 x forward: the backward pass multiplies twice for every product of
    the forward pass.

        forward = B (2 W T + 2 L Q H T^2)

    W are the weights of the products that a token passes through: projections, MLP (of MoGE the
    router, one expert of every group and the shared ones) and the head, tied or not; neither the
    embedding, which is looked up, nor norms and biases. Attention is scores and mixing over half of
    the square, as if a row were one causal sequence, and as `infer.bench.bounds.prefill_flops`
    counts it.

    What a step multiplies beyond that is not counted: the hidden half of the square, what fills
    blocks of experts, and what the backward pass computes again (the logits; the scores of rows
    longer than `kernels.attention.full.QUERY_BLOCK`).
    """
    D, H, Q, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    layer = D * H * (Q + 2 * K) + Q * H * D
    if config.moge is None:
        layer += 3 * D * (config.intermediate_size or 0)
    else:
        m = config.moge
        layer += D * m.num_experts + 3 * D * (m.experts_per_token * m.expert_width + m.shared_width)
    weights = config.num_layers * layer + D * config.vocab_size
    square = 2 * config.num_layers * Q * H * length**2
    return 3.0 * batch * (2 * weights * length + square)
