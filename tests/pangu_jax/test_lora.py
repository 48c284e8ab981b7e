"""Adapters: beside a float or quantised matrix they are W + scale * B A, which is computed here in
float64, a matrix at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from pangu_jax import adapted, build, lora, moge
from pangu_jax import model as pangu
from pangu_jax.adapted import Adapted, Adapters
from pangu_jax.cache import Meta
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError
from pangu_jax.linear import linear
from pangu_jax.mlp import swiglu
from pangu_jax.model import Pangu, tapped_forward
from pangu_jax.moge import Experts
from pangu_jax.parallel import boundary
from pangu_jax.parallel.on_mesh import on_mesh
from pangu_jax.quant import scheme, weight
from pangu_jax.quant.scheme import Recipe, Scheme
from tests import layouts

SLOW = pytest.mark.slow
SCALE = 0.7
TOKENS = layouts.random_tokens(2, 7)

# Of two layers, or "one"; "even" widths are those that groups of int4, and eight devices, divide.
EVEN = dataclasses.replace(layouts.DENSE, num_kv_heads=8, intermediate_size=48)
EVEN_MOGE = dataclasses.replace(
    layouts.MOGE,
    num_kv_heads=8,
    moge=dataclasses.replace(layouts.MOGE.moge, expert_width=16, shared_width=24),
)
CONFIGS = {
    name: dataclasses.replace(config, num_layers=2)
    for name, config in {**layouts.MODELS, "even": EVEN, "even moge": EVEN_MOGE}.items()
}
CONFIGS["mixed"] = dataclasses.replace(EVEN, num_layers=4)
CONFIGS |= {f"one {name}": dataclasses.replace(CONFIGS[name], num_layers=1) for name in CONFIGS}

CASES = [
    ("dense", None),
    ("moge", None),
    ("tied", None),
    ("moge", "w8a16"),
    ("one even moge", "w4a16"),
    ("mixed", "mixed"),
    pytest.param("dense", "w8a16", marks=SLOW),
    pytest.param("even", "w4a16", marks=SLOW),
    pytest.param("even moge", "w4a16", marks=SLOW),
    pytest.param("topk", None, marks=SLOW),
    pytest.param("pairs", "w8a16", marks=SLOW),
]


def recipe(name: str | None, config: ModelConfig) -> Recipe:
    """Of that name. "mixed" has three runs: two layers of int8, a float one, one with some int4;
    "int4" has groups that are small enough for eight devices.
    """
    if name is None:
        return scheme.FLOAT
    if name == "int4":
        small = tuple((leaf, Scheme("int4", group=4)) for leaf in scheme.matrices(config))
        return Recipe.of_layers([small] * config.num_layers)
    if name != "mixed":
        return scheme.named(name, config)
    layer = tuple((leaf, Scheme("int8")) for leaf in scheme.matrices(config))
    return Recipe.of_layers([layer, layer, (), (("mlp.down", Scheme("int4", group=16)),)])


@functools.cache
def base(name: str, numbers: str | None = None, where: Any = None) -> Pangu:
    """A lively stacked model, rounded where `numbers` names a recipe."""
    config = CONFIGS[name]
    like = layouts.abstract(config, where)
    own = layouts.lively(layouts.init(config))
    model = build.with_weights(like, jax.device_put(own, build.places(like)))
    found = recipe(numbers, config)
    return build.quantize(model, found) if found.runs else model


def lively(model: Pangu, rank: int = 3, targets: tuple[str, ...] = ()) -> dict[str, Array]:
    """Adapters with noise in all of them, large enough that none can be overlooked."""
    shapes = jax.eval_shape(lambda: lora.init(model, rank, targets, jax.random.key(0)))
    rng = np.random.default_rng(1)
    draw = lambda shape: jnp.asarray(0.4 * rng.standard_normal(shape, np.float32))
    return {name: draw(leaf.shape) for name, leaf in sorted(shapes.items())}


@functools.cache
def init(name: str, numbers: str | None = None, rank: int = 3) -> Any:
    """Fresh adapters as a function of the key."""
    model = base(name, numbers)
    return jax.jit(lambda key: lora.init(model, rank, (), key))


# --- what base and adapters are together, in float64


def by_layer(model: Pangu) -> dict[str, np.ndarray]:
    """All weights by the names of separate layers; quantised ones as the floats they stand for."""
    own = {name: np.asarray(leaf) for name, leaf in build.weights(model).items()}
    whole = {}
    for name, leaf in own.items():
        if name.endswith(".numbers"):
            scale = own[name.replace(".numbers", ".scale")].astype(np.float64)
            if leaf.dtype == np.uint8:  # two numbers in a byte, the first in the low half
                pairs = np.stack([leaf & 15, leaf >> 4], axis=-1).astype(np.float64) - 8
                leaf = pairs.reshape(*leaf.shape[:-1], -1)
                scale = np.repeat(scale, leaf.shape[-1] // scale.shape[-1], axis=-1)
            whole[name.removesuffix(".numbers")] = leaf * scale
        elif not name.endswith(".scale"):
            whole[name] = leaf
    found, first = {}, [0]
    for length in model.runs:
        first.append(first[-1] + length)
    for name, leaf in whole.items():
        kind, run, rest = (*name.split(".", 2), "", "")[:3]
        if kind != "blocks":
            found[name] = leaf
            continue
        for i, layer in enumerate(leaf):
            found[f"blocks.{first[int(run)] + i}.{rest}"] = layer
    return found


def together(model: Pangu, own: Mapping[str, Any], scale: float = SCALE) -> dict[str, np.ndarray]:
    """Of each layer, and each expert: W + scale * B A."""
    found, first = by_layer(model), np.cumsum([0, *model.runs])
    for name in own:
        if not name.endswith(".lora_a"):
            continue
        _, run, leaf = name.removesuffix(".lora_a").split(".", 2)
        a, b = (np.asarray(own[f"blocks.{run}.{leaf}.lora_{x}"], np.float64) for x in "ab")
        for layer in range(model.runs[int(run)]):
            target = f"blocks.{first[int(run)] + layer}.{leaf}"
            whole = found[target].astype(np.float64)
            for expert in np.ndindex(*a.shape[1:-2]):
                at = (layer, *expert)
                whole[expert] += scale * np.tensordot(b[at], a[at], axes=1)
            found[target] = whole
    return found


def float_model(config: ModelConfig, own: Mapping[str, np.ndarray]) -> Pangu:
    """A float32 model of separate layers."""
    like = layouts.abstract(config, form="separate")
    return build.with_weights(like, {n: jnp.asarray(x, jnp.float32) for n, x in own.items()})


def logits(model: Pangu, own: Mapping[str, Any], tokens: np.ndarray) -> Array:
    """Those of a full pass with adapters."""
    where, adapters, count = model.layout, lora.held(model, own, SCALE), len(tokens)
    tokens = np.resize(tokens, (where.round_rows(count), tokens.shape[1]))

    def local(model: Pangu, tokens: Array, adapters: Adapters) -> Array:
        meta = Meta.from_mask(jnp.ones(tokens.shape, bool))
        nothing = lambda x, routing: None
        flat = tokens.reshape(-1)
        hidden, _, _ = tapped_forward(model, flat, meta, None, nothing, adapters=adapters)
        rows = boundary.whole(hidden, tokens.size, where)
        return pangu.logits(model, rows).reshape(*tokens.shape, -1)

    specs = (where.rows, lora.specs(model, adapters))
    return on_mesh(model, local, specs, where.rows)(model, tokens, adapters)[:count]


run = jax.jit(lambda model, own: logits(model, own, TOKENS))


# --- the layers


shapes = st.sampled_from(
    [(1, 5, (4,), 2), (3, 6, (2, 4), 1), (5, 8, (2, 3, 4), 4), (20, 8, (6,), 9)]
)


def drawn(shape: tuple[int, int, tuple[int, ...], int], seed: int) -> tuple[Array, ...]:
    """x, W, A and B."""
    N, D, out, r = shape
    rng = np.random.default_rng(seed)
    sizes = ((N, D), (*out, D), (r, D), (*out, r))
    return tuple(jnp.asarray(rng.standard_normal(size, np.float32)) for size in sizes)


def wide(*arrays: Array) -> list[np.ndarray]:
    return [np.asarray(each, np.float64) for each in arrays]


product = jax.jit(linear)


@jax.jit
def of_fresh(x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """The product with an adapter, and that without."""
    return linear(x, Adapted(w, a, b, scale=SCALE)), linear(x, w)


@settings(max_examples=20)
@given(shapes, st.integers(0, 999))
def test_a_product_with_an_adapter_is_that_with_their_sum(shape: Any, seed: int) -> None:
    """With any number of output axes, in float64."""
    x, w, a, b = drawn(shape, seed)
    got = product(x, Adapted(w, a, b, scale=SCALE))
    x, w, a, b = wide(x, w, a, b)
    layouts.close(got, np.tensordot(x, w + SCALE * np.tensordot(b, a, axes=1), (1, -1)))


@settings(max_examples=20)
@given(shapes, st.integers(0, 999))
def test_a_fresh_adapter_changes_no_bit(shape: Any, seed: int) -> None:
    x, w, a, b = drawn(shape, seed)
    np.testing.assert_array_equal(*of_fresh(x, w, a, jnp.zeros_like(b)))


@pytest.mark.parametrize(
    "numbers", [Scheme("int8"), Scheme("int4", group=4), Scheme("fp8")], ids=str
)
@pytest.mark.parametrize("N", [1, 20])
def test_a_product_beside_a_quantised_matrix(N: int, numbers: Scheme) -> None:
    """The base's own product, whatever it does, plus the adapter's."""
    x, w, a, b = drawn((N, 8, (2, 6), 3), 0)
    held = weight.quantize(w, numbers)
    got = product(x, Adapted(held, a, b, scale=SCALE))
    added = SCALE * np.einsum("nd,rd,oer->noe", *wide(x, a, b))
    layouts.close(got, np.asarray(product(x, held), np.float64) + added)


def test_the_result_has_the_dtype_that_is_asked_for() -> None:
    x, w, a, b = (each.astype(jnp.bfloat16) for each in drawn((3, 8, (6,), 2), 0))
    leaf = Adapted(w, a, b, scale=SCALE)
    assert linear(x, leaf).dtype == jnp.bfloat16
    assert linear(x, leaf, jnp.float32).dtype == jnp.float32


def test_an_adapted_matrix_stands_where_a_matrix_stood() -> None:
    """It has a shape, axes and `[...]`, but no parts; and it is a pytree."""
    _, w, a, b = drawn((1, 8, (2, 6), 3), 0)
    leaf = Adapted(w, a, b, scale=SCALE)
    assert (leaf.shape, leaf.ndim, leaf[...] is leaf) == ((2, 6, 8), 3, True)
    with pytest.raises(TypeError, match=r"only take \[\.\.\.\]"):
        leaf[0]
    assert [x.shape for x in jax.tree.leaves(leaf)] == [(2, 6, 8), (3, 8), (2, 6, 3)]
    four = weight.quantize(w, Scheme("int4", group=4))
    assert Adapted(four, a, b, scale=1.0).shape == (2, 6, 8)


def test_swiglu_takes_adapters_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.standard_normal(size)
    x, gate_up, down = draw(5, 6), draw(2, 4, 6), draw(6, 4)
    pairs = (draw(2, 6), draw(2, 4, 2)), (draw(3, 4), draw(6, 3))
    narrow = lambda z: jnp.asarray(z, jnp.float32)
    leaves = [
        Adapted(*map(narrow, (w, *pair)), scale=SCALE)
        for w, pair in zip((gate_up, down), pairs, strict=True)
    ]
    first, last = (
        w + SCALE * np.tensordot(b, a, axes=1)
        for w, (a, b) in zip((gate_up, down), pairs, strict=True)
    )
    gate, up = x @ first[0].T, x @ first[1].T
    layouts.close(swiglu(narrow(x), *leaves), (gate / (1 + np.exp(-gate)) * up) @ last.T)


def test_a_product_has_gradients_for_x_and_the_adapter_alone() -> None:
    """Those of matrices in NumPy: with y = x W^T and G = dL/dy, W = base + scale B A."""
    x, w, a, b = drawn((5, 8, (6,), 3), 0)
    loss = lambda x, leaf: jnp.sum(jnp.sin(linear(x, leaf)))
    to_x, found = jax.jit(jax.grad(loss, (0, 1)))(x, Adapted(w, a, b, scale=SCALE))
    x, w, a, b = wide(x, w, a, b)
    whole = w + SCALE * b @ a
    g = np.cos(x @ whole.T)
    layouts.close(to_x, g @ whole)
    layouts.close(found.a, SCALE * b.T @ g.T @ x)
    layouts.close(found.b, SCALE * g.T @ x @ a.T)
    np.testing.assert_array_equal(found.base, 0)


# --- experts


def experts_case(numbers: Scheme | None) -> tuple[Any, ...]:
    """x, the chosen experts and their weights, both stacks of matrices and their adapters; the
    matrices also as floats.
    """
    rng = np.random.default_rng(2)
    N, E, k, D, F, r = 9, 6, 3, 8, 4, 2
    draw = lambda *size: jnp.asarray(0.5 * rng.standard_normal(size), jnp.float32)
    chosen = jnp.asarray(rng.integers(0, 2, (N, k)) + np.arange(k) * 2, jnp.int32)
    matrices = draw(E, 2, F, D), draw(E, D, F)
    pairs = (draw(E, r, D), draw(E, 2, F, r)), (draw(E, r, F), draw(E, D, r))
    held = matrices
    if numbers is not None:
        held = tuple(weight.quantize(each, numbers) for each in matrices)
        matrices = tuple(each.floats(jnp.float32) for each in held)
    return draw(N, D), chosen, jnp.abs(draw(N, k)), held, pairs, matrices


def mix(x: Array, chosen: Array, weights: Array, held: Any, pairs: Any) -> Array:
    stacks = [Adapted(w, *p, scale=SCALE) for w, p in zip(held, pairs, strict=True)]
    return moge.mix_experts(x, chosen, weights, Experts(*stacks))


def naive_mix(x: Array, chosen: Array, weights: Array, matrices: Any, pairs: Any) -> Array:
    """Every expert for every token, of merged matrices."""
    gate_up = matrices[0] + SCALE * jnp.einsum("epfr,erd->epfd", pairs[0][1], pairs[0][0])
    down = matrices[1] + SCALE * jnp.einsum("edr,erf->edf", pairs[1][1], pairs[1][0])
    y = jnp.einsum("nd,epfd->nepf", x, gate_up)
    combine = (jax.nn.one_hot(chosen, len(down)) * weights[:, :, None]).sum(1)
    return jnp.einsum("nef,edf,ne->nd", jax.nn.silu(y[:, :, 0]) * y[:, :, 1], down, combine)


@pytest.mark.parametrize("numbers", [None, Scheme("int8"), Scheme("int4", group=4)], ids=str)
def test_experts_with_an_adapter_each(numbers: Scheme | None) -> None:
    """Their outputs, and the gradients of tokens, weights and adapters, are those of a dense
    product of merged matrices.
    """
    x, chosen, weights, held, pairs, matrices = experts_case(numbers)

    def with_gradients(mixed: Any, held: Any) -> Any:
        def loss(x: Array, weights: Array, pairs: Any) -> tuple[Array, Array]:
            y = mixed(x, chosen, weights, held, pairs)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, weights, pairs)

    got, wanted = with_gradients(mix, held), with_gradients(naive_mix, matrices)
    jax.tree.map(layouts.close, got, wanted)
    unused = sorted(set(range(6)) - set(np.asarray(chosen).ravel().tolist()))
    for grad in jax.tree.leaves(got[1][2]):
        assert not np.asarray(grad)[unused].any()
        assert np.asarray(grad).any()


def test_float_experts_have_no_gradient_beside_their_adapters() -> None:
    x, chosen, weights, held, pairs, _ = experts_case(None)
    loss = lambda held: jnp.sum(mix(x, chosen, weights, held, pairs))
    grads = jax.jit(jax.grad(loss))(held)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_experts_of_which_one_matrix_is_adapted() -> None:
    """The other keeps its own gradient."""
    x, chosen, weights, held, (first, _), _ = experts_case(None)
    none = jnp.zeros((6, 1, 4)), jnp.zeros((6, 8, 1))

    def loss(down: Array, pair: Any) -> Array:
        stacks = Adapted(held[0], *pair, scale=SCALE), down
        return jnp.sum(jnp.sin(moge.mix_experts(x, chosen, weights, Experts(*stacks))))

    def naive(down: Array, pair: Any) -> Array:
        return jnp.sum(jnp.sin(naive_mix(x, chosen, weights, (held[0], down), (pair, none))))

    got, wanted = (jax.jit(jax.grad(of, (0, 1)))(held[1], first) for of in (loss, naive))
    jax.tree.map(layouts.close, got, wanted)


# --- fresh adapters


@functools.cache
def structure(name: str) -> Pangu:
    """A model's shapes; "mixed" has three runs of layers."""
    config = CONFIGS[name]
    numbers = recipe("mixed" if name == "mixed" else None, config)
    return build.abstract(config, form="stacked", recipe=numbers)


MATCHES: dict[str, Callable[[str], bool]] = {
    "attention.*": lambda kind: kind.startswith("attention"),
    "*.down": lambda kind: kind.endswith("down"),
    "mlp.gate_up": lambda kind: kind == "mlp.gate_up",
    "mlp.[!d]*": lambda kind: kind.startswith("mlp.") and kind != "mlp.down",
}


@settings(max_examples=12)
@given(
    st.sampled_from(["dense", "moge", "mixed"]),
    st.integers(1, 5),
    st.lists(st.sampled_from(sorted(MATCHES)), max_size=2),
)
def test_which_matrices_have_adapters(name: str, rank: int, targets: list[str]) -> None:
    """Those that any pattern matches, in every run of layers; [.., rank, in] and [.., out, rank]
    with the axes of layers and experts in front.
    """
    like, config = structure(name), CONFIGS[name]
    found = jax.eval_shape(lambda: lora.init(like, rank, targets, jax.random.key(0)))
    moge, K, F = config.moge is not None, config.num_kv_heads, config.intermediate_size or 11
    kinds = {
        "attention.qkv": ((), (K, 8 // K + 2, 4), 32),
        "attention.out": ((), (32,), 32),
        "mlp.gate_up": ((16,) if moge else (), (2, F), 32),
        "mlp.down": ((16,) if moge else (), (32,), F),
    }
    if moge:
        kinds |= {"mlp.shared.gate_up": ((), (2, 20), 32), "mlp.shared.down": ((), (32,), 20)}
    wanted = {}
    for run, length in enumerate((2, 1, 1) if name == "mixed" else (2,)):
        for kind, (each, out, inner) in kinds.items():
            if not targets or any(MATCHES[target](kind) for target in targets):
                leaf = f"blocks.{run}.{kind}"
                wanted[f"{leaf}.lora_a"] = (length, *each, rank, inner)
                wanted[f"{leaf}.lora_b"] = (length, *each, *out, rank)
    assert {leaf: x.shape for leaf, x in found.items()} == wanted
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_a_fresh_b_is_zero_and_a_is_uniform() -> None:
    """Within 1 / sqrt(inputs), another one for every matrix and key, the same for the same key."""
    one, two, other = (init("moge")(jax.random.key(seed)) for seed in (0, 0, 1))
    seen = set()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name])
        if name.endswith("lora_b"):
            assert not np.asarray(leaf).any()
            continue
        bound = leaf.shape[-1] ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.15)
        seen |= {float(leaf.ravel()[0]) / bound, float(other[name].ravel()[0]) / bound}
    assert len(seen) == 2 * len(lora.MATRICES)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("dense", None),
        ("moge", "w8a16"),
        pytest.param("moge", None, marks=SLOW),
        pytest.param("mixed", "mixed", marks=SLOW),
    ],
)
def test_fresh_adapters_change_nothing(name: str, numbers: str | None) -> None:
    """Not a bit, whatever A is."""
    model = base(name, numbers)
    one, two = (init(name, numbers)(jax.random.key(seed)) for seed in (0, 1))
    got = run(model, one)
    np.testing.assert_array_equal(got, run(model, two))
    layouts.close(got, model(TOKENS), 1e-6)


def refused(model: Pangu, *targets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        lora.init(model, 2, targets, jax.random.key(0))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_what_is_refused() -> None:
    stacked = layouts.abstract(CONFIGS["dense"])
    matrices = "(matrices: attention.qkv, attention.out, mlp.gate_up, mlp.down)"
    wanted = f"lora.targets: no matrix matches 'mlp.dwn'; did you mean mlp.down? {matrices}"
    assert refused(stacked, "attention.*", "mlp.dwn") == wanted
    assert refused(stacked, "mlp.shared.*").endswith(matrices)
    assert "'\\x0a" in refused(stacked, "\n" * 1000)
    assert "mlp.shared.down" in refused(layouts.abstract(CONFIGS["moge"]), "embed")
    separate = layouts.abstract(CONFIGS["dense"], form="separate")
    assert refused(separate) == "adapters are trained in stacked form"


# --- a whole model


def test_adapters_are_not_for_a_cache() -> None:
    model = base("dense")
    held = lora.held(model, lively(model), SCALE)
    cache, tap = model.empty_cache(1, 8), lambda x, routing: None
    meta = Meta.from_mask(jnp.ones((1, 3), bool))
    with pytest.raises(AssertionError):
        tapped_forward(model, jnp.arange(3), meta, cache, tap, adapters=held)


def test_attaching_leaves_the_layers_as_they_are() -> None:
    model = base("moge")
    before = jax.tree.leaves(model)
    held = lora.held(model, lively(model), SCALE)
    block = adapted.attach(model.blocks[0], held, 0)
    assert isinstance(block.mlp.shared.down[...], Adapted)
    assert block.mlp.shared.down[...].base is model.blocks[0].mlp.shared.down[...]
    assert all(a is b for a, b in zip(jax.tree.leaves(model), before, strict=True))


@pytest.mark.parametrize(("name", "numbers"), CASES)
def test_adapters_beside_a_model_are_the_merged_model(name: str, numbers: str | None) -> None:
    """Its logits, to 1e-5 of the largest: those of W + scale * B A of every matrix."""
    model = base(name, numbers)
    own = lively(model)
    got = run(model, own)
    layouts.close(got, float_model(CONFIGS[name], together(model, own))(TOKENS))
    before = float_model(CONFIGS[name], by_layer(model))(TOKENS)
    assert jnp.std(got - before) > 0.1 * jnp.std(before)


@pytest.mark.parametrize("target", lora.MATRICES)
def test_an_adapter_of_one_matrix(target: str) -> None:
    """Each alone shows in the logits, and in no other place than its own."""
    model = base("moge")
    own = lively(model, targets=(target,))
    assert len(own) == 2
    got = run(model, own)
    layouts.close(got, float_model(CONFIGS["moge"], together(model, own))(TOKENS))
    before = model(TOKENS)
    assert jnp.std(got - before) > 0.01 * jnp.std(before)


@pytest.mark.parametrize(("name", "numbers"), CASES)
def test_merge_is_the_sum_of_each_matrix(name: str, numbers: str | None) -> None:
    """In float64, a layer and an expert at a time; what has no adapter stays, bit for bit."""
    model = base(name, numbers)
    own = lively(model, targets=("attention.qkv", "mlp.*"))
    merged = lora.merge(model, own, SCALE)
    assert (merged.form, merged.dtype, merged.config) == ("separate", model.dtype, model.config)
    assert not merged.recipe.runs
    got, wanted = build.weights(merged), together(model, own)
    layouts.close_leaves(got, wanted, 1e-6)
    for leaf, x in by_layer(model).items():
        kind = leaf.split(".", 2)[-1]
        touched = kind.endswith(("qkv", "up", "down"))
        changed = np.abs(np.asarray(got[leaf], np.float64) - x).max() > 0.01
        assert changed == touched, leaf
        if numbers is None and not touched:
            np.testing.assert_array_equal(got[leaf], x)


def test_a_merged_bf16_model_is_rounded_once() -> None:
    """Each number is within half a unit in the last of 8 bits of the sum."""
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base("one moge"))
    own = lively(model)
    merged = lora.merge(model, own, SCALE)
    assert merged.dtype == jnp.bfloat16
    wanted = together(model, own)
    for leaf, x in build.weights(merged).items():
        assert x.dtype == jnp.bfloat16
        got, exact = np.asarray(x, np.float64), wanted[leaf].astype(np.float64)
        assert (np.abs(got - exact) <= 2**-8 * np.abs(exact) + 1e-6).all(), leaf


# --- layouts

NAMES = (*layouts.NAMES, *layouts.ODD)


def of_one_device(model: Pangu, like: Any) -> tuple[int, ...]:
    """What a device has of a matrix when it has gathered it over fsdp's axes."""
    fsdp = model.layout.of("fsdp")
    spec = (None if part in (fsdp, *fsdp) else part for part in like.sharding.spec)
    return NamedSharding(model.mesh, PartitionSpec(*spec)).shard_shape(like.shape)


@functools.cache
def whole(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """A model's leaves as one device holds them, and adapters of a rank that any axis of a mesh
    could split by mistake.
    """
    model = layouts.abstract(CONFIGS[name])
    return dict(build.named_leaves(model)), lively(model, rank=8)


@pytest.mark.parametrize("where", NAMES)
@pytest.mark.parametrize("name", ["dense", "even", "even moge"])
def test_adapters_lie_beside_their_matrices(name: str, where: str) -> None:
    """A device has the columns of A and the rows of B that its part of the matrix has; over fsdp's
    axes they are whole. In a state they are whole everywhere where the layout pads the matrix.
    """
    model, (alone, own) = layouts.abstract(CONFIGS[name], layouts.named(where)), whole(name)
    held = jax.eval_shape(lambda: lora.held(model, own, SCALE))
    specs, places, found = lora.specs(model, held), lora.places(model, own), []
    part = lambda x, spec: NamedSharding(model.mesh, spec).shard_shape(x.shape)
    for leaf, like in build.named_leaves(model):
        kind = leaf.removeprefix("blocks.0.")
        if kind not in lora.MATRICES:
            continue
        *out, D = like.shape
        each = 2 if name.endswith("moge") and kind in ("mlp.gate_up", "mlp.down") else 1
        pair, here = held.blocks[0][kind], of_one_device(model, like)
        assert [x.shape for x in pair] == [(*out[:each], 8, D), (*out, 8)]
        wanted = [(*here[:each], 8, here[-1]), (*here[:-1], 8)]
        assert [part(*both) for both in zip(pair, specs.blocks[0][kind], strict=True)] == wanted
        for letter, shape in zip("ab", wanted, strict=True):
            all_of_it = own[f"{leaf}.lora_{letter}"].shape
            padded = like.shape != alone[leaf].shape
            place = places[f"{leaf}.lora_{letter}"]
            assert place.shard_shape(all_of_it) == (all_of_it if padded else shape)
            found.append((padded, shape != all_of_it))
    assert len(found) == 2 * (6 if name.endswith("moge") else 4)
    if name == "even" and where == "tp8":
        assert found.count((False, True)) == 4  # B of qkv and gate_up, A of out and down
    if name == "dense" and where == "tp8":
        assert found.count((True, True)) == 3  # the same, without out
    if name == "even moge" and where == "h2p-8":
        assert found.count((False, True)) == 8  # of the experts A and B


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("one moge", "h2p-8"),
        pytest.param("dense", "tp8", marks=SLOW),
        pytest.param("moge", "fsdp-h2p-4x2", marks=SLOW),
    ],
)
def test_what_a_layout_pads_is_nothing(name: str, where: str) -> None:
    """Of a layout's matrices and adapters, W + scale * B A is the layout's merged matrix: where it
    has zeros to pad or heads to repeat, so have they. The merged model lies where any model lies.
    """
    model = base(name, where=layouts.named(where))
    own = lively(model)
    held = lora.held(model, own, SCALE)
    merged = lora.merge(model, jax.device_put(own, lora.places(model, own)), SCALE)
    leaves = dict(build.named_leaves(merged))
    for kind, pair in held.blocks[0].items():
        w, a, b = wide(dict(build.named_leaves(model))[f"blocks.0.{kind}"], *pair)
        for at in np.ndindex(*a.shape[:-2]):
            w[at] += SCALE * np.tensordot(b[at], a[at], axes=1)
        for layer in range(len(w)):
            layouts.close(leaves[f"blocks.{layer}.{kind}"], w[layer], 1e-6, kind)
    layouts.close_leaves(build.weights(merged), together(base(name), own), 1e-6)
    like = layouts.abstract(CONFIGS[name], layouts.named(where), "separate")
    for leaf, x in build.named_leaves(like):
        assert leaves[leaf].sharding.is_equivalent_to(x.sharding, x.ndim), leaf


@pytest.mark.parametrize(
    ("name", "numbers", "where", "kind"),
    [
        ("one moge", "w8a16", "h2p-8", "flashcomm1"),
        pytest.param("dense", None, "tp8", "all_reduce", marks=SLOW),
        pytest.param("even", "int4", "two axes of heads", "flashcomm1", marks=SLOW),
        pytest.param("topk", None, "ep8", "flashcomm1", marks=SLOW),
        pytest.param("moge", None, "fsdp", "flashcomm1", marks=SLOW),
    ],
)
def test_adapters_under_a_layout(name: str, numbers: str | None, where: str, kind: str) -> None:
    """The logits of one device's merged model."""
    many = base(name, numbers, layouts.named(where, kind))
    one = base(name, numbers)
    own = lively(one)
    got = run(many, jax.device_put(own, lora.places(many, own)))
    layouts.close(got, float_model(CONFIGS[name], together(one, own))(TOKENS))
