"""Quantised folders: loaded, run, spread over devices and written back, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pangu_jax
from pangu_jax import build
from pangu_jax.checkpoint import hf_config
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.model import Pangu
from pangu_jax.parallel import layout
from pangu_jax.parallel.layout import Layout, MeshShape
from pangu_jax.quant import product
from pangu_jax.quant import scheme as schemes
from pangu_jax.quant.scheme import Recipe, Scheme
from tests import folders, layouts, quantised_reader, reference
from tests.limits import no_longer_than
from tests.pangu_jax.checkpoint.test_load import check_message, refuse, same

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]

ORACLE = Path(__file__).parent.parent.parent / "oracle"
WEIGHTS = "model.safetensors"
TOKENS = [5, 1, 93, 17, 17, 40, 2, 71, 0]

DENSE = {**folders.DENSE, "num_hidden_layers": 4}
MOGE = {**folders.MOGE, "num_hidden_layers": 4, "moe_intermediate_size": 24, "num_experts": 8}
BASES = {"dense": DENSE, "moge": MOGE}

INT4 = Scheme("int4", group=8)
FP8, FP8_WEIGHTS = Scheme("fp8", "dynamic"), Scheme("fp8")
W8A8, W8A16 = Scheme("int8", "dynamic"), Scheme("int8")

# Four layers with nothing in common: all kinds at once, two equal ones, and one that stays float.
MIXED = (
    {"attention.qkv": W8A8, "attention.out": INT4, "mlp.gate_up": FP8, "mlp.down": W8A16},
    {"attention.out": FP8_WEIGHTS, "mlp.down": W8A8},
    {"attention.out": FP8_WEIGHTS, "mlp.down": W8A8},
    {},
)


def recipe_of(name: str, raw: Raw) -> Recipe:
    """By its name here; `mixed` differs from layer to layer."""
    config = hf_config.from_hf(raw)
    if name == "mixed":
        layers = [tuple(layer.items()) for layer in MIXED]
        if config.moge is not None:
            layers[2] = (*layers[2], ("mlp.shared.down", INT4))
        return Recipe.of_layers(layers[: config.num_layers])
    if name == "fours":
        every = schemes.matrices(config)
        return Recipe.of_layers(
            [tuple((leaf, Scheme("int4", group=4)) for leaf in every)] * config.num_layers
        )
    return schemes.named(name, config)


def equal(got: Tensors, wanted: Tensors) -> None:
    """To the bit, under the same names."""
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


def logits(model: Pangu, tokens: Any = TOKENS) -> np.ndarray:
    return np.asarray(model(np.array([tokens])))[0]


# --- there and back -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float folders."""
    found = {name: tmp_path_factory.mktemp(name) for name in BASES}
    for name, path in found.items():
        folders.write(path, BASES[name])
    return found


CASES = [
    ("dense", "w8a8", "separate", "bfloat16"),
    ("dense", "w4a16", "separate", "float16"),
    ("dense", "mixed", "stacked", "float32"),
    ("moge", "fp8", "separate", "float32"),
    ("moge", "mixed", "separate", "bfloat16"),
]
SLOW_CASES = [
    ("moge", "w8a16", "stacked", "float32"),
    ("dense", "w8a16", "stacked", "float16"),
    ("moge", "w4a16", "stacked", "bfloat16"),
    ("moge", "mixed", "stacked", "float32"),
]


def both(fast: list[Any], slow: list[Any]) -> list[Any]:
    """All cases, those of the second list marked as slow."""
    marked = [(case, ()) for case in fast] + [(case, pytest.mark.slow) for case in slow]
    return [pytest.param(case, marks=marks, id="-".join(case)) for case, marks in marked]


@pytest.mark.parametrize("case", both(CASES, SLOW_CASES))
def test_there_and_back_is_bit_equal(
    homes: dict[str, Path], tmp_path: Path, case: tuple[str, str, Any, str]
) -> None:
    family, recipe, form, dtype = case
    floats = pangu_jax.load(homes[family], dtype, form=form)
    model = build.quantize(floats, recipe_of(recipe, BASES[family]))
    pangu_jax.save_hf(model, tmp_path / "a", shard_bytes=20_000)
    found = pangu_jax.load(tmp_path / "a", form=form)
    assert (found.recipe, found.dtype.name) == (model.recipe, dtype)
    same(found, model)
    if form == "stacked":
        separate = pangu_jax.load(tmp_path / "a", form="separate")
        same(separate, build.convert(model, "separate"))
    pangu_jax.save_hf(found, tmp_path / "b", shard_bytes=20_000)
    again = lambda name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
    assert again("a") == again("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("family", BASES)
def test_a_mixed_folder_is_the_rounded_source(
    homes: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """By the independent reader."""
    recipe = recipe_of("mixed", BASES[family])
    pangu_jax.save_hf(build.quantize(pangu_jax.load(homes[family]), recipe), tmp_path / "a")
    source, found = quantised_reader.stored(homes[family]), quantised_reader.read(tmp_path / "a")
    kinds = {W8A8: ("int8", "int8"), W8A16: ("int8", "float"), INT4: ("int4", "float")}
    kinds |= {FP8: ("fp8", "fp8"), FP8_WEIGHTS: ("fp8", "float")}
    seen = set()
    for module, matrix in found.matrices.items():
        scheme = recipe.scheme(leaf_of(module))
        assert scheme is not None, module
        seen.add(scheme)
        kind, inputs = kinds[scheme]
        numbers, scale = quantised_reader.rounded(source[f"{module}.weight"], kind, scheme.group)
        assert matrix.inputs == inputs
        np.testing.assert_array_equal(matrix.numbers, numbers.astype(np.float64), err_msg=module)
        np.testing.assert_array_equal(matrix.scale, scale, err_msg=module)
    assert seen == set(kinds)
    quantised = {f"{module}.weight" for module in found.matrices}
    equal(
        {n: t for n, t in found.tensors.items() if n in source and n not in quantised},
        {n: t for n, t in source.items() if n not in quantised},
    )


def leaf_of(module: str) -> str:
    """The leaf that a published module is a part of."""
    _, _, layer, *rest = module.split(".")
    ours = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out"}
    ours |= {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
    places = {"self_attn": "attention", "shared_expert": "mlp.shared"}
    where = places.get(rest[-2], "mlp")
    return f"blocks.{layer}.{where}.{ours[rest[-1]]}"


@pytest.mark.parametrize(("family", "form"), [("dense", "separate"), ("moge", "separate")])
def test_the_words_of_msmodelslim(
    homes: dict[str, Path], tmp_path: Path, family: str, form: Any
) -> None:
    recipe = recipe_of("w8a8", BASES[family])
    model = build.quantize(pangu_jax.load(homes[family], form=form), recipe)
    pangu_jax.save_hf(model, tmp_path / "a", quantised_as="msmodelslim")
    pangu_jax.save_hf(model, tmp_path / "b")
    found = pangu_jax.load(tmp_path / "a", form=form)
    same(found, model)
    ours, theirs = (quantised_reader.read(tmp_path / name) for name in ("a", "b"))
    assert "quantization_config" not in ours.raw
    equal(ours.floats(), theirs.floats())
    said = json.loads((tmp_path / "a" / "quant_model_description.json").read_text())
    assert set(said) - {"model_quant_type"} == set(ours.tensors)
    assert said["model_quant_type"] == "W8A8_DYNAMIC"
    pangu_jax.save_hf(found, tmp_path / "c")  # a folder's words are not remembered
    equal(quantised_reader.stored(tmp_path / "c"), theirs.tensors)
    assert not (tmp_path / "c" / "quant_model_description.json").exists()


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "fp8"])
def test_what_a_format_cannot_say_leaves_nothing_behind(
    homes: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    model = build.quantize(pangu_jax.load(homes["dense"]), recipe)
    with pytest.raises(CheckpointError, match="msModelSlim has no word") as caught:
        pangu_jax.save_hf(model, tmp_path / "a", quantised_as="msmodelslim")
    check_message(str(caught.value))
    assert not any(tmp_path.iterdir())


def test_tied_embeddings_and_no_biases(tmp_path: Path) -> None:
    raw = {**DENSE, "tie_word_embeddings": True, "bias": False}
    folders.write(tmp_path / "a", raw)
    model = build.quantize(pangu_jax.load(tmp_path / "a"), recipe_of("mixed", raw))
    pangu_jax.save_hf(model, tmp_path / "b")
    same(pangu_jax.load(tmp_path / "b"), model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [("dense", "separate"), ("moge", "separate"), ("moge", "stacked")])
def test_random_weights_are_rounded_as_they_are_drawn(case: tuple[str, Any]) -> None:
    config, form = layouts.MODELS[case[0]], case[1]
    wanted = build.quantize(layouts.init(config, form=form), "w8a8")
    same(pangu_jax.init(config, jax.random.key(0), form=form, recipe="w8a8"), wanted)


@pytest.mark.parametrize("width", [44, 36])
@pytest.mark.parametrize("group", [2, 4])
def test_widths_that_do_not_fill_an_int32(tmp_path: Path, width: int, group: int) -> None:
    """Refused in one line, or written as others pad them and read back."""
    raw = {**folders.DENSE, "num_hidden_layers": 1, "intermediate_size": width}
    folders.write(tmp_path / "a", raw)
    recipe = Recipe.of_layers([(("mlp.down", Scheme("int4", group=group)),)])
    try:
        model = build.quantize(pangu_jax.load(tmp_path / "a"), recipe)
        pangu_jax.save_hf(model, tmp_path / "b")
    except (CheckpointError, ConfigError) as error:
        check_message(str(error))
        return
    same(pangu_jax.load(tmp_path / "b"), model)
    packed = quantised_reader.stored(tmp_path / "b")["model.layers.0.mlp.down_proj.weight_packed"]
    assert packed.shape == (raw["hidden_size"], -(-width // 8))


def test_a_described_group_that_does_not_fill_an_int32(tmp_path: Path) -> None:
    raw = {**folders.DENSE, "num_hidden_layers": 1}
    folders.write(tmp_path / "a", raw)
    recipe = Recipe.of_layers([(("mlp.down", INT4),)])
    pangu_jax.save_hf(build.quantize(pangu_jax.load(tmp_path / "a"), recipe), tmp_path / "b")
    tensors, module = quantised_reader.stored(tmp_path / "b"), "model.layers.0.mlp.down_proj"
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    said["intermediate_size"] = 44
    said["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 4
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] = np.ones((44, 32), np.float32)
    tensors[f"{module}.weight_shape"] = np.array([32, 44])
    tensors[f"{module}.weight_scale"] = np.ones((32, 11), np.float32)
    for words in (5, 6):
        tensors[f"{module}.weight_packed"] = np.zeros((32, words), np.int32)
        quantised_reader.write(tmp_path / "b" / WEIGHTS, tensors)
        (tmp_path / "b" / "config.json").write_text(json.dumps(said))
        try:
            pangu_jax.load(tmp_path / "b")
        except (CheckpointError, ConfigError) as error:
            check_message(str(error))


# --- layouts ------------------------------------------------------------------------------------

MORE = {"num_attention_heads": 8, "vocab_size": 97, "num_hidden_layers": 1}
WIDE = {
    "dense": {**folders.DENSE, **MORE, "intermediate_size": 44},
    "even": {**folders.DENSE, **MORE, "intermediate_size": 64},
    "moge": {
        **folders.MOGE,
        **MORE,
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 11,
    },
}
# Widths that int4 can be packed and split in.
WIDE["even moge"] = {
    **WIDE["moge"],
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}

SPREAD = [
    ("dense", "tp8", "separate", "w8a8"),
    ("even", "tp8", "separate", "fours"),
    ("moge", "h2p-8", "separate", "w8a16"),
]
SLOW_SPREAD = [
    ("dense", "tp8", "stacked", "w8a16"),
    ("dense", "fsdp", "stacked", "w8a16"),
    ("dense", "fsdp", "separate", "w8a8"),
    ("even", "fsdp", "separate", "fours"),
    ("even", "tp8", "stacked", "fours"),
    ("moge", "h2p-8", "stacked", "w8a8"),
    ("moge", "ep8", "stacked", "w8a8"),
    ("moge", "tp8", "separate", "fp8"),
    ("even moge", "ep8", "separate", "mixed"),
    ("even moge", "h2p-8", "stacked", "fours"),
    ("even moge", "tp8", "stacked", "fours"),
    ("even moge", "fsdp-h2p-4x2", "stacked", "fours"),
    ("moge", "fsdp-h2p-4x2", "stacked", "fp8"),
]
# Of the largest logit. Ranks that share the inputs of a product round them each with a scale of
# their own; what is not rounded is the same but for the order of sums.
ROUNDING = {"w8a8": 0.05, "fp8": 0.3, "mixed": 0.1}


class Spread:
    """A float folder, the same quantised by one device, and that under a layout."""

    def __init__(self, home: Path, case: tuple[str, str, str, str]):
        family, where, self.form, self.recipe = case
        folders.write(home / "float", WIDE[family])
        self.home, self.where = home, layouts.named(where)
        floats = pangu_jax.load(home / "float", form=self.form)
        self.one = build.quantize(floats, recipe_of(self.recipe, WIDE[family]))
        pangu_jax.save_hf(self.one, home / "made")
        self.model = pangu_jax.load(home / "made", layout=self.where, form=self.form)


@pytest.fixture(scope="module", params=both(SPREAD, SLOW_SPREAD))
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    return Spread(tmp_path_factory.mktemp("spread"), request.param)


def test_a_layout_has_the_logits_of_one_device(placed: Spread) -> None:
    """Of a NumPy one."""
    wanted = quantised_reader.read(placed.home / "made").logits(TOKENS)
    layouts.close(logits(placed.model), wanted, ROUNDING.get(placed.recipe, 1e-5))


@pytest.mark.slow
def test_a_layout_has_the_logits_of_one_device_of_jax(placed: Spread) -> None:
    tokens = layouts.random_tokens(3, 5)
    got, wanted = placed.model(tokens), placed.one(tokens)
    layouts.close(got, wanted, ROUNDING.get(placed.recipe, 1e-5))


def test_a_layout_is_saved_as_by_one_device(placed: Spread, tmp_path: Path) -> None:
    pangu_jax.save_hf(placed.model, tmp_path / "a")
    equal(quantised_reader.stored(tmp_path / "a"), quantised_reader.stored(placed.home / "made"))


def test_quantising_under_a_layout_is_the_same(placed: Spread, tmp_path: Path) -> None:
    floats = pangu_jax.load(placed.home / "float", layout=placed.where, form=placed.form)
    pangu_jax.save_hf(build.quantize(floats, placed.one.recipe), tmp_path / "a")
    equal(quantised_reader.stored(tmp_path / "a"), quantised_reader.stored(placed.home / "made"))


def test_groups_that_a_layout_would_split_are_refused(
    homes: dict[str, Path], tmp_path: Path
) -> None:
    model = build.quantize(pangu_jax.load(homes["dense"]), "w4a16")
    pangu_jax.save_hf(model, tmp_path / "a")
    two = Layout(MeshShape(1, 1, 4), *tensor_parallel())
    with pytest.raises(ConfigError, match="groups of 16 cannot be split over 4 devices") as caught:
        pangu_jax.load(tmp_path / "a", layout=two)
    check_message(str(caught.value))


def tensor_parallel() -> tuple[Any, ...]:
    tp8 = layout.load("tp8")
    return tp8.attention, tp8.experts, tp8.shared, tp8.vocab


# --- msModelSlim's fixed activations, and its int8 cache ----------------------------------------


class Static:
    """A calibrated folder W8A8 with C8, and what the independent reader makes of it."""

    def __init__(self, home: Path, raw: Raw, floats: Tensors, tokens: list[int]):
        self.home, self.raw, self.tokens = home, raw, tokens
        self.stored = quantised_reader.write_static(home, raw, floats, tokens)
        self.read = quantised_reader.read(home)
        self.floats = floats

    def kept(self) -> Tensors:
        """What `save_hf` writes of it."""
        spare = ("weight_scale", "kv_cache_offset")
        biases = [f"{module}.bias" for module in self.read.matrices]
        return {n: t for n, t in self.stored.items() if not n.endswith(spare) and n not in biases}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Static:
    source, expected = ORACLE / "dense-tiny", np.load(ORACLE / "dense-tiny" / "expected.npz")
    raw = json.loads((source / "config.json").read_text())
    tokens = expected["prompt_1_input_ids"].tolist()
    home = tmp_path_factory.mktemp("static")
    return Static(home, raw, quantised_reader.stored(source), tokens)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Static:
    """Eight heads."""
    raw = WIDE["dense"]
    return Static(tmp_path_factory.mktemp("heads"), raw, folders.random_tensors(raw), TOKENS)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Static:
    """Every expert with scales of its own."""
    raw = WIDE["moge"]
    many = np.random.default_rng(1).integers(0, 97, 60).tolist()
    return Static(tmp_path_factory.mktemp("experts"), raw, folders.random_tensors(raw), many)


@pytest.fixture(scope="module")
def loaded(dense: Static) -> Pangu:
    return pangu_jax.load(dense.home)


def test_the_static_folder_is_near_its_source(dense: Static, experts: Static) -> None:
    """The tests' own folder stands for the float model: the reader and the writer agree."""
    for made in (dense, experts):
        wanted = reference.forward(made.floats, made.raw, made.tokens)["logits"]
        got = made.read.logits(made.tokens)
        rounding = 0.1 if made is dense else 0.4  # some tokens go to other experts
        assert np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()) < rounding
        offsets = [matrix.fixed[1] for matrix in made.read.matrices.values()]
        assert 0 not in offsets
        biases = [np.abs(matrix.fixed[3]).max() for matrix in made.read.matrices.values()]
        assert min(biases) > 100


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Rounding may fall the other way where a float64 activation nearly ties, and then the logits
    of a few tokens differ a little.
    """
    error = np.abs(got - wanted).max(-1) / np.abs(wanted).max()
    assert np.median(error) < 1e-5
    assert error.max() < 0.05


def test_a_static_forward_pass(dense: Static, loaded: Pangu) -> None:
    close(logits(loaded, dense.tokens), dense.read.logits(dense.tokens))


@pytest.mark.parametrize("module", ["mlp.gate_proj", "mlp.down_proj", "self_attn.v_proj"])
def test_a_static_product_is_exact(dense: Static, loaded: Pangu, module: str) -> None:
    """y = (clip(round(x / input_scale) + offset) @ W^T + quant_bias) * deq_scale, also where x is
    cut.
    """
    matrix = dense.read.matrices[f"model.layers.1.{module}"]
    scale, offset = matrix.fixed[:2]
    rng = np.random.default_rng(0)
    wide = rng.integers(-300, 300, (7, matrix.numbers.shape[1]))
    x = ((wide - offset + rng.uniform(-0.4, 0.4, wide.shape)) * scale).astype(np.float32)
    block = loaded.blocks[1]
    leaf = {"gate": block.mlp.gate_up, "down": block.mlp.down, "v": block.attention.qkv}
    kind = module.split(".")[1].split("_")[0]
    y = np.asarray(jax.jit(product.linear)(x, leaf[kind].get_value()))
    part = {"gate": lambda y: y[:, 0], "down": lambda y: y, "v": lambda y: y[:, :, -1]}[kind](y)
    wanted = matrix.product(x)
    np.testing.assert_allclose(part.reshape(wanted.shape), wanted, rtol=1e-6)


def test_a_static_folder_there_and_back(dense: Static, loaded: Pangu, tmp_path: Path) -> None:
    pangu_jax.save_hf(loaded, tmp_path / "a")
    kept = dense.kept()
    equal(quantised_reader.stored(tmp_path / "a"), kept)
    said = json.loads((tmp_path / "a" / "quant_model_description.json").read_text())
    wanted = json.loads((dense.home / "quant_model_description.json").read_text())
    assert {name: said.get(name) for name in kept if "kv_cache" not in name} == {
        name: wanted[name] for name in kept if "kv_cache" not in name
    }
    assert (said["model_quant_type"], said["kv_quant_type"]) == ("W8A8", "C8")
    same(pangu_jax.load(tmp_path / "a"), loaded)


def test_every_part_of_a_static_leaf_has_a_name_and_a_place(loaded: Pangu) -> None:
    assert set(build.weights(loaded)) == {name for name, _ in build.named_leaves(loaded)}


@pytest.mark.slow
@pytest.mark.parametrize("made", ["heads", "experts"])
def test_a_static_folder_as_stacked_layers(
    request: pytest.FixtureRequest, made: str, tmp_path: Path
) -> None:
    static: Static = request.getfixturevalue(made)
    model = pangu_jax.load(static.home, form="stacked")
    pangu_jax.save_hf(model, tmp_path / "a", quantised_as="msmodelslim")
    equal(quantised_reader.stored(tmp_path / "a"), static.kept())
    assert set(build.weights(model)) == {name for name, _ in build.named_leaves(model)}
    same(build.convert(model, "separate"), pangu_jax.load(static.home))


def test_a_static_folder_is_msmodelslim_only(loaded: Pangu, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="msmodelslim") as caught:
        pangu_jax.save_hf(loaded, tmp_path / "a", quantised_as="compressed-tensors")
    check_message(str(caught.value))
    assert not any(tmp_path.iterdir())


STATIC_SPREAD = [("heads", "tp8", "separate"), ("experts", "h2p-8", "separate")]
SLOW_STATIC_SPREAD = [
    ("heads", "fsdp", "stacked"),
    ("heads", "tp8", "stacked"),
    ("experts", "h2p-8", "stacked"),
    ("experts", "tp8", "separate"),
    ("experts", "ep8", "separate"),
    ("experts", "fsdp-h2p-4x2", "stacked"),
]


@pytest.mark.parametrize("case", both(STATIC_SPREAD, SLOW_STATIC_SPREAD))
def test_static_layouts(
    request: pytest.FixtureRequest, tmp_path: Path, case: tuple[str, str, Any]
) -> None:
    """The integer bias, with the offset's part in it, is counted once; and so it is saved."""
    made: Static = request.getfixturevalue(case[0])
    model = pangu_jax.load(made.home, layout=layouts.named(case[1]), form=case[2])
    close(logits(model, made.tokens), made.read.logits(made.tokens))
    pangu_jax.save_hf(model, tmp_path / "a")
    equal(quantised_reader.stored(tmp_path / "a"), made.kept())


@pytest.mark.slow
def test_two_devices(dense: Static) -> None:
    """The published network's heads, two to a device."""
    two = Layout(MeshShape(1, 1, 2), *tensor_parallel())
    model = pangu_jax.load(dense.home, layout=two)
    close(logits(model, dense.tokens), dense.read.logits(dense.tokens))


def test_calibrated_scales_of_a_cache_are_never_dropped(
    dense: Static, loaded: Pangu, tmp_path: Path
) -> None:
    """Neither by name nor on the way of a float model with such a cache to a quantised one."""
    with pytest.raises(ConfigError, match="int8 cache"):
        build.with_cache(loaded, None)
    same(build.with_cache(loaded, "int8"), loaded)
    scales = {n: t for n, t in dense.stored.items() if n.endswith("kv_cache_scale")}
    folders.write(tmp_path / "a", dense.raw, {**dense.floats, **scales})
    (tmp_path / "a" / "quant_model_description.json").write_text('{"kv_quant_type": "C8"}')
    floats = pangu_jax.load(tmp_path / "a")
    assert floats.recipe == Recipe((), "int8", cache_scales=True)
    pangu_jax.save_hf(floats, tmp_path / "b")
    equal(quantised_reader.stored(tmp_path / "b"), quantised_reader.stored(tmp_path / "a"))
    try:
        found = build.quantize(floats, "w8a8")
    except ConfigError:
        return
    assert found.recipe.cache_scales


# --- static folders that are refused, and what is ignored ---------------------------------------


def changed(made: Static, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """The static folder with other tensors."""
    folder.mkdir(exist_ok=True)
    tensors = dict(made.stored)
    change(tensors)
    quantised_reader.write(folder / WEIGHTS, tensors)
    for name in ("config.json", "quant_model_description.json"):
        shutil.copyfile(made.home / name, folder / name)
    return folder


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    """Sets a tensor, or a part of it; `...` drops it."""

    def change(tensors: Tensors) -> None:
        if value is ...:
            del tensors[name]
        elif isinstance(value, np.ndarray):
            tensors[name] = value
        else:
            tensors[name] = tensors[name].copy()
            tensors[name].reshape(-1)[-1] = value

    return change


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("self_attn.k_proj.input_scale", 0.5),
        ("self_attn.v_proj.input_scale", 0.5),
        ("self_attn.v_proj.input_offset", 99),
        ("mlp.up_proj.input_scale", 0.5),
        ("mlp.up_proj.input_offset", -99),
    ],
)
def test_inputs_of_one_product_with_two_scales_are_refused(
    dense: Static, tmp_path: Path, name: str, value: Any
) -> None:
    folder = changed(dense, tmp_path, put(f"{LAYER}.{name}", value))
    refuse(folder, str(folder / WEIGHTS), f"{LAYER}.{name}", "same")


OFFSET = np.zeros((64, 1), np.float32)
O_PROJ = f"{LAYER}.self_attn.o_proj"


@pytest.mark.parametrize("value", [1.0, -1e-30, np.nan, np.inf])
def test_a_weight_offset_is_refused(dense: Static, tmp_path: Path, value: float) -> None:
    folder = changed(dense, tmp_path, put(f"{O_PROJ}.weight_offset", value))
    refuse(folder, str(folder / WEIGHTS), f"{O_PROJ}.weight_offset", "all zeros")


BAD = [
    ("weight_offset", np.zeros((1, 64), np.float32)),
    ("weight_offset", np.zeros((64, 2), np.float32)),
    ("deq_scale", np.ones(64, np.int64)),
    ("deq_scale", np.ones((64, 1), np.float32)),
    ("deq_scale", np.ones(63, np.float32)),
    ("deq_scale", np.nan),
    ("deq_scale", np.inf),
    ("deq_scale", -1e-9),
    ("deq_scale", ...),
    ("quant_bias", np.zeros(64, np.float32)),
    ("quant_bias", np.zeros(64, np.int64)),
    ("quant_bias", np.zeros((1, 64), np.int32)),
    ("quant_bias", ...),
    ("input_scale", np.nan),
    ("input_scale", -np.inf),
    ("input_scale", -1.0),
    ("input_scale", 0.0),
    ("input_scale", np.ones(2, np.float32)),
    ("input_scale", np.ones(64, np.float32)),
    ("input_scale", np.ones((1, 1), np.float32)),
    ("input_scale", np.zeros(0, np.float32)),
    ("input_scale", np.ones(1, np.int8)),
    ("input_scale", ...),
    ("input_offset", np.ones(1, np.float32)),
    ("input_offset", np.ones(1, np.int32)),
    ("input_offset", np.ones(2, np.int8)),
    ("input_offset", ...),
    ("weight", np.zeros((64, 64), np.float32)),
    ("weight", np.zeros((64, 63), np.int8)),
]


@pytest.mark.parametrize(("part", "value"), BAD)
def test_a_damaged_static_product_is_refused(
    dense: Static, tmp_path: Path, part: str, value: Any
) -> None:
    folder = changed(dense, tmp_path, put(f"{O_PROJ}.{part}", value))
    where = folder if value is ... else folder / WEIGHTS
    refuse(folder, str(where), f"{O_PROJ}.{part}")


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf, np.ones(31, np.float32)])
def test_a_damaged_scale_of_the_cache_is_refused(dense: Static, tmp_path: Path, value: Any) -> None:
    name = f"{LAYER}.self_attn.v_proj.kv_cache_scale"
    refuse(changed(dense, tmp_path, put(name, value)), name)


def test_what_says_nothing_is_ignored(dense: Static, loaded: Pangu, tmp_path: Path) -> None:
    """The float biases (7 everywhere), offsets of the cache, and scales that deq_scale holds."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith(("weight_offset", "kv_cache_offset")):
                del tensors[name]
            elif name.endswith(("_proj.bias", "weight_scale")):
                tensors[name] = np.full_like(tensors[name], np.nan)
            elif name.endswith(("input_scale", "input_offset")):
                tensors[name] = tensors[name].reshape(())

    same(pangu_jax.load(changed(dense, tmp_path, change)), loaded)


def test_static_products_without_biases(tmp_path: Path) -> None:
    """Only the offset's part is left in the integer one."""
    raw = {**folders.DENSE, "bias": False, "num_hidden_layers": 1}
    made = Static(tmp_path / "a", raw, folders.random_tensors(raw), TOKENS)
    model = pangu_jax.load(made.home)
    close(logits(model), made.read.logits(TOKENS))
    pangu_jax.save_hf(model, tmp_path / "b")
    same(pangu_jax.load(tmp_path / "b"), model)


# --- damaged scales, and tensors that should not be there ---------------------------------------


@pytest.fixture(scope="module")
def kinds(
    homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensors]]:
    """Quantised folders of one file, by recipe, and their tensors."""
    found = {}
    for recipe in ("w8a8", "w4a16", "fp8"):
        home = tmp_path_factory.mktemp(recipe) / "made"
        pangu_jax.save_hf(build.quantize(pangu_jax.load(homes["dense"]), recipe), home)
        found[recipe] = home, quantised_reader.stored(home)
    return found


def damaged(
    kinds: dict[str, tuple[Path, Tensors]], recipe: str, folder: Path, name: str, value: Any
) -> Path:
    home, tensors = kinds[recipe]
    shutil.copyfile(home / "config.json", folder / "config.json")
    tensors = dict(tensors)
    put(name, value)(tensors)
    quantised_reader.write(folder / WEIGHTS, tensors)
    return folder


K_SCALE = f"{LAYER}.self_attn.k_proj.weight_scale"
DOWN = f"{LAYER}.mlp.down_proj"
WRONG = [
    np.nan,
    np.inf,
    -np.inf,
    -1e-3,
    "one axis",
    "turned",
    "short",
    "long",
    np.int8,
    np.int32,
    ...,
]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "fp8"])
@pytest.mark.parametrize("value", WRONG)
def test_a_damaged_scale_is_refused(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path, recipe: str, value: Any
) -> None:
    scale = kinds[recipe][1][K_SCALE]
    shapes: dict[Any, Any] = {
        "one axis": scale.reshape(-1),
        "turned": scale.reshape(scale.T.shape),
        "short": scale[:-1],
        "long": np.concatenate([scale, scale], axis=1),
        np.int8: scale.astype(np.int8),
        np.int32: scale.astype(np.int32),
    }
    made = shapes[value] if isinstance(value, str | type) else value
    folder = damaged(kinds, recipe, tmp_path, K_SCALE, made)
    refuse(folder, str(folder if value is ... else folder / WEIGHTS), K_SCALE)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "fp8"])
def test_a_truncated_file_is_refused(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path, recipe: str
) -> None:
    home, _ = kinds[recipe]
    shutil.copytree(home, tmp_path / "a")
    whole = (tmp_path / "a" / WEIGHTS).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 7, 0):
        (tmp_path / "a" / WEIGHTS).write_bytes(whole[:size])
        refuse(tmp_path / "a", str(tmp_path / "a" / WEIGHTS))


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        ("w8a8", f"{DOWN}.weight_zero_point", np.zeros((32, 1), np.int8)),
        ("w8a8", f"{DOWN}.weight_offset", np.zeros((32, 1), np.float32)),
        ("w8a8", f"{DOWN}.input_scale", np.ones(1, np.float32)),
        ("w8a8", f"{DOWN}.input_zero_point", np.zeros(1, np.int8)),
        ("w4a16", f"{DOWN}.weight_zero_point", np.zeros((4, 3), np.int32)),
        ("w4a16", f"{DOWN}.weight_g_idx", np.zeros(48, np.int32)),
        ("w4a16", f"{DOWN}.weight", np.zeros((32, 48), np.float32)),
        ("w4a16", "lm_head.weight_packed", np.zeros((96, 4), np.int32)),
        ("fp8", f"{LAYER}.self_attn.k_proj.k_scale", np.ones(1, np.float32)),
        ("fp8", f"{LAYER}.self_attn.k_proj.kv_cache_offset", np.ones(1, np.float32)),
    ],
)
def test_a_tensor_that_says_more_is_refused(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path, recipe: str, name: str, value: Any
) -> None:
    folder = damaged(kinds, recipe, tmp_path, name, value)
    refuse(folder, str(folder / WEIGHTS), "unexpected", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_packed", np.zeros((32, 6), np.int64)),
        ("weight_packed", np.zeros((32, 48), np.int8)),
        ("weight_packed", np.zeros((32, 12), np.int32)),
        ("weight_packed", np.zeros((6, 32), np.int32)),
        ("weight_packed", ...),
        ("weight_shape", np.array([48, 32])),
        ("weight_shape", np.array([32, 47])),
        ("weight_shape", np.array([32])),
        ("weight_shape", np.array([-32, 48])),
        ("weight_shape", np.array([np.nan, 48], np.float32)),
        ("weight_shape", np.zeros(2, quantised_reader.DTYPES["F8_E4M3"])),
        ("weight_shape", np.zeros(2, quantised_reader.DTYPES["BF16"])),
    ],
)
def test_damaged_numbers_of_four_bits_are_refused(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path, name: str, value: Any
) -> None:
    folder = damaged(kinds, "w4a16", tmp_path, f"{DOWN}.{name}", value)
    message = refuse(folder, str(folder if value is ... else folder / WEIGHTS), f"{DOWN}.{name}")
    if name == "weight_shape":
        assert "[32, 48]" in message


def test_a_shape_is_said_in_its_own_order(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    name = f"{LAYER}.mlp.gate_proj.weight_shape"
    refuse(damaged(kinds, "w4a16", tmp_path, name, np.array([48, 48])), name, "[48, 32]")


def test_a_weight_offset_of_another_kind_is_refused(dense: Static, tmp_path: Path) -> None:
    """No dtype crashes the comparison."""
    for dtype in quantised_reader.DTYPES.values():
        ones = np.ones((64, 1)).astype(dtype)
        folder = changed(dense, tmp_path, put(f"{O_PROJ}.weight_offset", ones))
        refuse(folder, f"{O_PROJ}.weight_offset")


@pytest.mark.parametrize("kind", ["I8", "I32", "F32", "F8_E4M3"])
def test_numbers_of_another_kind_are_refused(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path, kind: str
) -> None:
    """FP8 where int8 is described, and the reverse, whose bytes would fit."""
    name, zeros = f"{DOWN}.weight", np.zeros((32, 48), quantised_reader.DTYPES[kind])
    for recipe, wanted in {"w8a8": "I8", "fp8": "F8_E4M3"}.items():
        if kind != wanted:
            folder = damaged(kinds, recipe, tmp_path, name, zeros)
            refuse(folder, str(folder / WEIGHTS), name, kind, wanted)


def test_scales_of_few_bits_are_read(
    kinds: dict[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    """Others store scales in the model's bfloat16."""
    home, tensors = kinds["w8a8"]
    narrow = quantised_reader.DTYPES["BF16"]
    scales = {n: t.astype(narrow) for n, t in tensors.items() if n.endswith("weight_scale")}
    shutil.copyfile(home / "config.json", tmp_path / "config.json")
    quantised_reader.write(tmp_path / WEIGHTS, {**tensors, **scales})
    with no_longer_than(20):
        found = dict(build.named_leaves(pangu_jax.load(tmp_path)))
    scale = found["blocks.1.mlp.down.scale"]
    assert scale.dtype == np.float32
    wanted = scales[f"{DOWN}.weight_scale"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(scale), wanted)
