"""What a step needs of one device, by formula: bytes, products, and what crosses devices.

A step is one decoded token of every sequence, a prefill, or a training step. Formulas are exact for
weights, cache, FLOPs of the products, and collectives; the working memory is an estimate. What they
leave out (norms, softmaxes, activations that travel through memory) makes the bounds optimistic, as
bounds should be.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pangu_jax import lora
from pangu_jax.config import ModelConfig
from pangu_jax.kernels.attention.full import QUERY_BLOCK
from pangu_jax.model import Form, Pangu, Remat, default_remat
from pangu_jax.parallel import fit
from pangu_jax.parallel.layout import Axes, Layout
from pangu_jax.plan.hlo import Traffic, received
from pangu_jax.plan.target import Chip
from pangu_jax.quant.scheme import FLOAT, Recipe

Phase = Literal["decode", "prefill", "train"]

# AdamW keeps the gradient and two moments of every weight, all of them float32.
TRAINED = 4.0

# Rows of logits that the loss holds at once (train/objectives.py).
LOSS_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is trained beside a model that stays as it is (lora.py).

    base: dtype in which the model's own float weights lie
    """

    rank: int
    targets: tuple[str, ...]
    base: str


@dataclasses.dataclass(frozen=True)
class Work:
    """A step: so many sequences in all, each of `context` tokens, the last `length` of them new.

    copies: in training, float32 numbers that are kept for every weight, itself among them; with
        adapters, for every number of theirs
    remat: None is the layout's own (model.default_remat)
    parts: of a batch, one after the other
    """

    phase: Phase
    batch: int
    context: int
    copies: float = TRAINED
    adapters: Adapters | None = None
    remat: Remat | None = None
    parts: int = 1

    @property
    def length(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.phase == "decode" else self.context

    @property
    def tokens(self) -> int:
        """Tokens that a step makes or reads, in all."""
        return self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device and one step: bytes held, FLOPs, bytes read, bytes received.

    weights: with gradients and optimizer state in training
    working: an estimate
    traffic: by kind of collective; in training of the forward pass and the loss alone
    """

    weights: int
    cache: int
    working: int
    flops: float
    read: float
    traffic: dict[str, Traffic]

    @property
    def held(self) -> int:
        """Bytes that must fit."""
        return self.weights + self.cache + self.working

    def seconds(self, chip: Chip, itemsize: int) -> dict[str, float]:
        """The least time that each of a chip's units needs."""
        moved = sum(traffic.bytes for traffic in self.traffic.values())
        return {
            "compute": self.flops / (chip.tflops(itemsize) * 1e12),
            "memory": self.read / (chip.memory_gb_per_s * 1e9),
            "network": moved / (chip.link_gb_per_s * 1e9),
        }


def of(
    config: ModelConfig, where: Layout, dtype: DTypeLike, work: Work, recipe: Recipe = FLOAT
) -> Cost:
    """The cost of a step. Raises ConfigError where the model does not fit the layout."""
    size, shape = jnp.dtype(dtype).itemsize, Share(config, where, work, recipe)
    working, traffic = shape.working(size), shape.traffic(size)
    if work.phase != "train":
        held, cache = weight_bytes(config, where, dtype, recipe=recipe), shape.cache_bytes(size)
        read = shape.weights_read(size) + cache
        return Cost(held, cache, working, shape.flops(), read, traffic)
    part = dataclasses.replace(work, batch=-(-work.batch // work.parts), parts=1)
    working = Share(config, where, part, recipe).working(size)
    base, trained, lower = _of_training(config, where, dtype, work, recipe)
    # Forward, backward to activations, and to weights; and what is computed again.
    passes = 2 + (work.adapters is None) + (shape.remat == "full")
    held, read = base + int(trained * work.copies) + lower, 2 * base + (work.copies + 2) * trained
    held += trained if work.parts > 1 else 0  # the gradient of a part beside the sum of all
    return Cost(held, 0, working, shape.flops() * passes, float(read), traffic)


def _of_training(
    config: ModelConfig, where: Layout, dtype: DTypeLike, work: Work, recipe: Recipe
) -> tuple[int, int, int]:
    """Bytes of what is not trained, as it lies and as it is multiplied; of what is, in float32; and
    of its copy for products of fewer bits, with a gradient of that.
    """
    kind = jnp.dtype(dtype)
    as_multiplied = weight_bytes(config, where, kind, recipe=recipe)
    if work.adapters is None:
        lower = 2 * as_multiplied if kind.itemsize < 4 else 0
        return 0, weight_bytes(config, where, "float32"), lower
    base = weight_bytes(config, where, work.adapters.base, recipe=recipe)
    base += as_multiplied if work.adapters.base != kind.name else 0
    trained = adapter_bytes(config, where, work.adapters, recipe)
    return base, trained, 2 * trained * kind.itemsize // 4 if kind.itemsize < 4 else 0


def weight_bytes(
    config: ModelConfig,
    where: Layout,
    dtype: DTypeLike,
    form: Form = "stacked",
    recipe: Recipe = FLOAT,
) -> int:
    """Bytes of weights that each device holds."""
    model = Pangu(config, form, dtype, where, where.abstract_mesh(), recipe=recipe)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(model)
    )


def adapter_bytes(
    config: ModelConfig, where: Layout, adapters: Adapters, recipe: Recipe = FLOAT
) -> int:
    """Bytes of float32 adapters that each device holds. Raises ConfigError."""
    mesh = where.abstract_mesh()
    model = Pangu(config, "stacked", adapters.base, where, mesh, recipe=recipe)
    leaves = jax.eval_shape(
        lambda: lora.init(model, adapters.rank, adapters.targets, jax.random.key(0))
    )
    places = lora.places(model, leaves)
    return sum(4 * math.prod(places[n].shard_shape(leaf.shape)) for n, leaf in leaves.items())


def number_bytes(recipe: Recipe, leaf: str, layers: int, size: int) -> float:
    """Bytes of one number of a layer's leaf, its share of scales apart, on average over layers.

    size: of a float one
    """
    own = (dict(schemes).get(leaf) for schemes in recipe.layers(layers))
    widths = [size if s is None else 0.5 if s.numbers == "int4" else 1.0 for s in own]
    return sum(widths) / layers


def head_bytes(recipe: Recipe, head_dim: int, size: int) -> int:
    """Bytes of one token's key, or value, of one head in the cache."""
    if recipe.cache is None:
        return head_dim * size
    return head_dim if recipe.cache_scales else head_dim + 4


class Share:
    """What one device has of a step: sizes in the letters of `pangu_jax`, and sums of them."""

    def __init__(
        self, config: ModelConfig, where: Layout, work: Work, recipe: Recipe = FLOAT
    ) -> None:
        held, self.recipe = fit.held(config, where), recipe
        self.config, self.held, self.where, self.work = config, held, where, work
        self.L, self.D, self.H = config.num_layers, config.hidden_size, config.head_dim
        heads = where.size(where.of("heads"))
        self.Q, self.K = config.num_heads // heads, held.num_kv_heads // heads
        self.V = held.vocab_size // where.size(where.of("vocab"))
        self.remat = work.remat or default_remat(where)
        self.rows = where.round_rows(work.batch) // where.size(where.of("batch"))
        self.N = self.rows * work.length
        self.shards = 1 if where.boundary.kind == "all_reduce" else heads
        self.padded = -(-self.N // self.shards) * self.shards
        self.mlp_axes = where.of("ffn") if config.moge is None else where.routed
        self.M = self.entered(self.mlp_axes)

    def entered(self, axes: Axes) -> int:
        """Tokens behind `boundary.enter(..., axes)`."""
        shared = [axis for axis in self.where.stream if axis in axes]
        return self.padded // self.shards * self.where.size(shared)

    def attention_params(self) -> int:
        """Weights of the projections of one layer."""
        return self.D * self.H * (2 * self.Q + 2 * self.K)

    def expert_params(self) -> int:
        """Weights of one routed expert."""
        assert self.held.moge is not None
        width = self.held.moge.expert_width // self.where.size(self.where.of("expert_ffn"))
        return 3 * self.D * width

    def mlp_params(self) -> int:
        """Weights of the dense MLP, or of the shared experts."""
        moge = self.held.moge
        width = self.held.intermediate_size if moge is None else moge.shared_width
        return 3 * self.D * (width or 0) // self.where.size(self.where.of("ffn"))

    def held_mlp_params(self) -> int:
        """Weights of all of a layer's experts, or of the dense MLP."""
        moge = self.config.moge
        if moge is None:
            return self.mlp_params()
        experts = moge.num_experts // self.where.size(self.where.of("expert"))
        return self.mlp_params() + experts * self.expert_params()

    def pairs(self) -> float:
        """(token, expert) pairs of a layer, of this device."""
        moge = self.config.moge
        if moge is None:
            return 0.0
        return self.M * moge.experts_per_token / self.where.size(self.where.of("expert"))

    def flops(self) -> float:
        """Multiplications and additions of the products of a forward pass."""
        seen = self.work.context if self.work.length == 1 else self.work.context / 2
        layer = 2.0 * self.N * self.attention_params() + 4.0 * self.N * self.Q * self.H * seen
        if self.config.moge is None:
            layer += 2.0 * self.M * self.mlp_params()
        else:
            every = self.M if self.where.of("ffn") else self.padded // self.shards
            layer += 2.0 * every * self.mlp_params() + 2.0 * self.pairs() * self.expert_params()
            layer += 2.0 * self.M * self.D * self.config.moge.num_experts
        return self.L * layer + 2.0 * self.head_rows() * self.D * self.V

    def head_rows(self) -> int:
        """Rows of logits that a device makes: of every token in training, else of the last ones."""
        axes = self.where.of("vocab")
        if self.work.phase == "train":
            return self.entered(axes)
        replicas = [axis for axis in axes if axis in self.where.of("batch")]
        return self.rows * self.where.size(replicas)

    def weights_read(self, size: int) -> float:
        """Bytes of weights that a step must read once; experts as far as tokens pick them."""
        wide = lambda leaf: number_bytes(self.recipe, leaf, self.L, size)
        fused, out = self.D * self.H * (self.Q + 2 * self.K), self.D * self.H * self.Q
        layer = fused * wide("attention.qkv") + out * wide("attention.out")
        moge, mlp = self.config.moge, "mlp." if self.config.moge is None else "mlp.shared."
        swiglu = lambda name: (2 * wide(f"{name}gate_up") + wide(f"{name}down")) / 3
        layer += self.mlp_params() * swiglu(mlp)
        if moge is not None:
            of_group = moge.num_experts // moge.num_groups
            missed = (1 - moge.per_group / of_group) ** self.M
            held = moge.num_experts / self.where.size(self.where.of("expert"))
            layer += held * (1 - missed) * self.expert_params() * swiglu("mlp.")
            layer += self.D * moge.num_experts * size
        return self.L * layer + self.D * self.V * size

    def cache_bytes(self, size: int) -> int:
        """Bytes of keys and values of all layers."""
        return (
            2
            * self.L
            * self.rows
            * self.K
            * self.work.context
            * head_bytes(self.recipe, self.H, size)
        )

    def working(self, size: int) -> int:
        """An estimate of what a step needs beside weights and cache, at its widest place."""
        pairs = self.pairs()
        mlp = self.M * self.D * (3 * size + 4) + pairs * self.D * 3 * size
        block = min(self.work.length, QUERY_BLOCK)
        attention = 2 * 4 * self.rows * self.Q * block * self.work.context
        logits = 4 * 4 * self.rows * self.config.vocab_size
        if self.work.phase != "train":
            return int(max(mlp, attention, logits))
        rows = min(LOSS_ROWS, self.head_rows())
        layer = max(3 * self._products() * size, mlp, attention)  # one is differentiated at a time
        return int(self._kept(size) + max(layer, 2 * 4 * rows * self.V))

    def _kept(self, size: int) -> float:
        """What training keeps until the backward pass; with FSDP also what it has in one piece: a
        layer and its gradient, the head and its own, which in several chunks is a sum of two.
        """
        stream = self.L * self.padded // self.shards * self.D * size
        kept = stream + (self.L * self._products() * size if self.remat == "dots" else 0)
        if not self.where.of("fsdp"):
            return float(kept)
        heads = 3 if self.head_rows() > LOSS_ROWS else 2
        layer = self.attention_params() + self.held_mlp_params()
        return float(kept + size * (heads * self.D * self.V + 2 * layer))

    def _products(self) -> float:
        """Numbers that the products of a layer make, attention's scores apart: q, k and v, what
        heads see, what attention adds, gate and up, router logits, outputs of chosen experts.
        """
        made = self.N * (self.H * 2 * (self.Q + self.K) + self.D)
        made += self.M * 2 * self.mlp_params() // (3 * self.D)
        if (moge := self.config.moge) is not None:
            made += self.M * moge.num_experts + self.pairs() * self.D
        return float(made)

    def layer_traffic(self, size: int) -> dict[str, Traffic]:
        """What a device receives in the forward pass of one layer, without FSDP's weights:

            all_reduce    an all-reduce behind attention and one behind the MLP; where the MLP's
                          tokens come from several replicas of attention, an all-gather before it
            flashcomm1    an all-gather before each and a reduce-scatter behind it

        With int8, an all-gather moves a byte per number and four per token for its scale, and the
        router's logits go with the tokens of a MoGE.
        """
        found, where, moge = _Tally(), self.where, self.config.moge
        for module, axes in (("attention", where.of("heads")), ("mlp", self.mlp_axes)):
            tokens, ranks = self.entered(axes), where.size([a for a in where.stream if a in axes])
            if where.boundary.gather == "int8":
                found.gather(tokens, self.D, ranks)
                found.gather(tokens, 4, ranks)
                if module == "mlp" and moge is not None:
                    found.gather(tokens, moge.num_experts * size, ranks)
            else:
                found.gather(tokens, self.D * size, ranks)
            self._leave(found, axes, size)
        return found.kinds

    def traffic(self, size: int) -> dict[str, Traffic]:
        """What a device receives in a forward pass, by kind of collective."""
        found = _Tally()
        for _ in range(self.L):
            found.add(self.layer_traffic(size))
        self._gather_weights(found, size)
        axes, where = self.where.of("vocab"), self.where
        replicas = tuple(axis for axis in axes if axis in where.of("batch"))
        found.gather(self.entered(axes), 4, where.size(replicas))  # token ids
        if parts := where.size(where.of("fsdp")):
            tokens = self.entered(axes)
            found.gather(tokens * parts, 4, parts)
            found.one("all-to-all", tokens * self.D * size, parts)
        self._leave(found, axes, size)
        if self.work.phase == "train":
            self._loss(found, size)
            return found.kinds
        if where.boundary.kind == "flashcomm1":
            found.gather(self.padded, self.D * size, where.size(where.of("heads")))
        rows, heads = self.rows * where.size(replicas), where.size(axes) // where.size(replicas)
        found.gather(rows, self.D * size, where.size(replicas))
        found.one("all-to-all", rows * self.V * 4, where.size(replicas))
        found.gather(self.rows, self.V * where.size(axes) * 4, heads)
        if self.work.phase == "decode":
            found.one("all-reduce", 4, where.size(where.of("batch")))  # whether any goes on
        return found.kinds

    def _loss(self, found: "_Tally", size: int) -> None:
        """The final states of all who share the vocabulary, and its sums over parts of it."""
        where, axes = self.where, self.where.of("vocab")
        tokens, stream = self.entered(axes), where.stream
        replicas = where.size([a for a in axes if a in where.of("batch")])
        found.gather(tokens, self.D * size, where.size([a for a in stream if a in axes]))
        for _ in ("targets", "weights"):
            found.gather(tokens, 4, replicas)
        chunks = -(-tokens // LOSS_ROWS)
        for _ in range(3 * chunks):  # the largest logit, the sum, the target's own
            found.one("all-reduce", -(-tokens // chunks) * 4, where.size(axes))
        # Nats, and squares for the z-loss.
        found.one("all-reduce", 2 * 4, where.size([a for a in stream if a not in axes]))
        if (moge := self.config.moge) is not None:  # what the routers did
            columns = 2 * moge.num_experts + 1
            found.one("all-reduce", self.L * columns * 4, where.size(stream))

    def _gather_weights(self, found: "_Tally", size: int) -> None:
        """FSDP: every matrix, when its layer needs it; not the embedding."""
        ranks = self.where.size(self.where.of("fsdp"))
        matrices = [self.D * self.H * (self.Q + 2 * self.K), self.D * self.H * self.Q]
        matrices += [self.mlp_params() * 2 // 3, self.mlp_params() // 3]
        if (moge := self.config.moge) is not None:
            all_held = moge.num_experts // self.where.size(self.where.of("expert"))
            whole = all_held * self.expert_params()
            matrices += [whole * 2 // 3, whole // 3, self.D * moge.num_experts]
        for matrix in [*matrices * self.L, self.D * self.V]:  # the head is the last
            found.gather(1, matrix * size, ranks)

    def _leave(self, found: "_Tally", axes: Axes, size: int) -> None:
        tokens, ranks = self.entered(axes), self.where.size(axes)
        if self.where.boundary.kind == "flashcomm1":
            found.one("reduce-scatter", tokens // ranks * self.D * size, ranks)
        else:
            found.one("all-reduce", tokens * self.D * size, ranks)


class _Tally:
    """Sums of traffic; groups of one device have none."""

    def __init__(self) -> None:
        self.kinds: dict[str, Traffic] = {}

    def one(self, kind: str, size: int, ranks: int) -> None:
        """A collective whose result has `size` bytes."""
        if ranks > 1:
            self.add({kind: Traffic(1, received(kind, size, ranks))})

    def gather(self, tokens: int, of_token: int, ranks: int) -> None:
        """An all-gather of so many tokens in the end."""
        self.one("all-gather", tokens * of_token, ranks)

    def add(self, more: dict[str, Traffic]) -> None:
        """Everything of another tally."""
        for kind, traffic in more.items():
            own = self.kinds.setdefault(kind, Traffic())
            own.count, own.bytes = own.count + traffic.count, own.bytes + traffic.bytes
