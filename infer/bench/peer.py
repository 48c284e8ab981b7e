"""The same weights in PyTorch, to compare ours with.

Dense models are Transformers' Llama with biases, which is what openPangu-Embedded is. Its blocks
hold a MoGE of ours in plain PyTorch for Pro MoE, the experts one after the other as its published
code has them. This is the only module of infer that needs torch and Transformers, which nothing
installs.
"""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from infer.bench import bounds, published
from infer.bench.measure import Program
from pangu_jax.config import ModelConfig, MoGEConfig
from pangu_jax.model import Pangu


def programs(model: Pangu) -> dict[str, Program]:
    """Greedy generation by the peers, by their names; on a GPU with a static cache and compiled."""
    title = f"Transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}"
    if model.config.moge is None:
        return {title: _program(_llama(model))}
    every, chosen = _llama(model), _llama(model)
    for module in chosen.modules():
        if isinstance(module, MoGE):
            module.skip_empty = True
    return {
        f"{title}, all experts": _program(every),
        f"{title}, chosen experts": _program(chosen),
    }


def _program(peer: nn.Module) -> Program:
    torch.set_num_threads(bounds.cores())
    on_gpu = torch.cuda.is_available()
    peer = peer.to("cuda") if on_gpu else peer

    def run(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        given = torch.tensor(prompts, device="cuda" if on_gpu else "cpu")
        options = {"cache_implementation": "static"} if on_gpu else {}

        def told(held: Tensor, *_: object, **__: object) -> Tensor:  # after every token
            if held.shape[1] == prompts.shape[1] + 1:
                if on_gpu:
                    torch.cuda.synchronize()
                first()
            return torch.zeros(len(held), dtype=torch.bool, device=held.device)

        with torch.no_grad():
            found = peer.generate(
                given,
                attention_mask=torch.ones_like(given),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([told]),
                **options,
            )
        return found[:, prompts.shape[1] :].cpu().numpy()

    return run


def _llama(model: Pangu) -> nn.Module:
    c = model.config
    transformers.logging.set_verbosity_error()
    shape = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size or 1,
        attention_bias=c.attention_bias,
        tie_word_embeddings=c.tie_embeddings,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=0,
        eos_token_id=None,
        dtype=str(model.dtype),
    )
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(shape).eval()
        if c.moge is not None:
            for layer in peer.model.layers:
                layer.mlp = MoGE(c)
    weights = _tensors(model)
    if c.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, assign=True)
    # Not a weight, so it was left without numbers.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(shape)
    peer.generation_config.eos_token_id = None
    return peer.requires_grad_(False)


def _tensors(model: Pangu) -> dict[str, Tensor]:
    found = {}
    for name, array in published.weights(model).items():
        half = array.dtype.itemsize == 2
        tensor = torch.tensor(array.view(np.int16) if half else array)
        found[name] = tensor.view(torch.bfloat16) if half else tensor
    return found


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoGE(nn.Module):
    """One expert of every group, and the shared ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moge: MoGEConfig | None = config.moge
        assert moge is not None
        self.groups, self.skip_empty = moge.num_groups, False
        self.gate = nn.Linear(config.hidden_size, moge.num_experts, bias=False)
        self.router_scale = nn.Parameter(torch.empty(1, moge.num_experts))
        own = lambda: MLP(config.hidden_size, moge.expert_width)
        self.experts = nn.ModuleList([own() for _ in range(moge.num_experts)])
        self.shared_expert = MLP(config.hidden_size, moge.shared_width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        shares = self.gate(rows).softmax(-1, dtype=torch.float32)
        best, place = shares.view(len(rows), self.groups, -1).max(-1)
        size = len(self.experts) // self.groups
        chosen = place + torch.arange(self.groups, device=x.device) * size
        weights = best.to(x.dtype) * self.router_scale[0][chosen]
        mixed = torch.zeros_like(rows)
        wanted = set(chosen.unique().tolist()) if self.skip_empty else range(len(self.experts))
        for index in wanted:
            token, group = torch.where(chosen == index)
            y = self.experts[index](rows[token]) * weights[token, group, None]
            mixed.index_add_(0, token, y.to(x.dtype))
        return mixed.view_as(x) + self.shared_expert(x)
