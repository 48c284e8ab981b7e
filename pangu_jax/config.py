"""ModelConfig: what a Pangu network is. Architecture facts only; run choices live with the run."""

import dataclasses
from pathlib import Path
from typing import Literal

from pangu_jax import strict
from pangu_jax.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
Router = Literal["grouped", "topk"]

# No field of a model is near this; a larger one is damage, caught before anything is allocated.
MAX_DIMENSION = 2**24
MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class MoGEConfig:
    """Mixture of Grouped Experts (arXiv 2505.21411, section 2): as many experts of every group for
    each token.

    Published models are "grouped" with one expert per group. "topk" is the conventional router that
    the paper compares with (its eq. 1 and 2): one group of all experts, and a softmax over the
    chosen ones.
    """

    num_experts: int
    num_groups: int
    expert_width: int
    """FFN width of one routed expert."""
    shared_width: int
    """FFN width of the shared experts, fused into one MLP."""
    per_group: int = 1
    """Experts of every group that a token passes through."""
    router: Router = "grouped"
    voted_experts: int | None = None
    """LOSSY, never part of a checkpoint: only so many experts of each group, those that most tokens
    of the call want, are used for all of its tokens (MERRouter of Huawei's vllm-ascend, with 5 of 8
    on 300I Duo). What a token gets then depends on the others. None is exact routing.
    """

    def __post_init__(self) -> None:
        strict.coerce_fields(self)
        sizes = ("num_experts", "num_groups", "expert_width", "shared_width", "per_group")
        _check_dimensions(self, sizes)
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_experts ({self.num_experts}) must be a multiple of the number of groups "
                f"({self.num_groups})"
            )
        if self.router == "topk" and self.num_groups != 1:
            raise ConfigError("router 'topk' knows one group: num_groups must be 1")
        most = self.num_experts // self.num_groups
        if self.per_group > most:
            raise ConfigError(f"per_group ({self.per_group}) is more than a group's {most} experts")
        if self.voted_experts is None:
            return
        if self.router != "grouped" or not self.per_group <= self.voted_experts <= most:
            raise ConfigError(
                f"voted_experts must be from per_group ({self.per_group}) to a group's {most} "
                "experts, with router 'grouped'"
            )

    @property
    def experts_per_token(self) -> int:
        """Routed experts that each token passes through."""
        return self.num_groups * self.per_group


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The facts of one network, dense (Embedded) or MoGE (Pro MoE).

    Raises ConfigError when inconsistent.

    The two families differ only in the MLP: exactly one of `intermediate_size` and `moge` is given.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    max_positions: int
    intermediate_size: int | None = None
    moge: MoGEConfig | None = None
    attention_bias: bool = True
    """Whether the q, k, v and output projections all have biases (they do in every published
    model).
    """
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    init_range: float = 0.02
    bos_token_id: int | None = 1
    pad_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = ()
    dtype: DType = "bfloat16"
    """How the checkpoint stores its weights (`torch_dtype`)."""

    def __post_init__(self) -> None:
        strict.coerce_fields(self)
        sizes = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
        _check_dimensions(self, (*sizes, "max_positions"))
        _check_dimensions(self, ("num_layers",), limit=MAX_LAYERS)
        if (self.intermediate_size is None) == (self.moge is None):
            raise ConfigError("give either intermediate_size (dense) or a moge table, not both")
        if self.intermediate_size is not None:
            _check_dimensions(self, ("intermediate_size",))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        for name, low in (("norm_eps", 0.0), ("rope_theta", 0.0), ("init_range", 0.0)):
            if not low < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive finite number")
        for name in ("bos_token_id", "pad_token_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token("eos_token_ids", token)

    def _check_token(self, name: str, token: int | None) -> None:
        if token is not None and not 0 <= token < self.vocab_size:
            raise ConfigError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied head is counted once."""
        matrices = 1 if self.tie_embeddings else 2
        return (
            matrices * self.vocab_size * self.hidden_size
            + self.num_layers * self._layer_parameters(active=False)
            + self.hidden_size
        )

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes through, embedding and head counted (arXiv 2505.21411,
        table 1).
        """
        idle = self._layer_parameters(active=False) - self._layer_parameters(active=True)
        return self.num_parameters - self.num_layers * idle

    def _layer_parameters(self, active: bool) -> int:
        D, H = self.hidden_size, self.head_dim
        qkv, out = (self.num_heads + 2 * self.num_kv_heads) * H, self.num_heads * H
        count = 2 * D + (qkv + out) * D
        if self.attention_bias:
            count += qkv + D
        if self.moge is None:
            return count + 3 * D * (self.intermediate_size or 0)
        m = self.moge
        experts = m.experts_per_token if active else m.num_experts
        router = m.num_experts * D + m.num_experts
        return count + router + 3 * D * (experts * m.expert_width + m.shared_width)

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of KV cache that one token takes in all layers, `itemsize` bytes per number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def _check_dimensions(config: object, names: tuple[str, ...], limit: int = MAX_DIMENSION) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise ConfigError(
                f"{name} must be an integer from 1 to {limit}, not {strict.describe(value)}"
            )


def configs_folder() -> Path:
    """Where the data of `configs/` lies: inside an installed package, or beside it in a source
    tree.
    """
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def named_file(kind: str, name: str | Path) -> Path:
    """The TOML file that `name` means: a path to one, or the name of one in configs/`kind`."""
    path, folder = Path(name), configs_folder() / kind
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    if not (folder / f"{name}.toml").is_file():
        known = sorted(file.stem for file in folder.glob("*.toml"))
        raise ConfigError(
            f"no {kind} configuration named {strict.shorten(str(name))}; known: {', '.join(known)}"
        )
    return folder / f"{name}.toml"


def preset(name: str | Path) -> ModelConfig:
    """The ModelConfig of a preset (nano, nano-moge, mini, embedded-1b, embedded-7b, pro-moe-72b)
    or a TOML file.
    """
    path = named_file("models", name)
    return strict.build(ModelConfig, strict.read_toml(path), str(path))
