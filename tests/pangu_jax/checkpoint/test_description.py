"""What folders say of their quantised matrices: understood, or refused in one clear line."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pangu_jax
from pangu_jax.checkpoint import description, hf, hf_config, names, streamed
from pangu_jax.checkpoint.folder import Folder
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.quant import scheme as schemes
from pangu_jax.quant.scheme import Recipe, Scheme
from tests import folders, quantised_reader
from tests.limits import no_longer_than
from tests.pangu_jax.checkpoint.test_load import check_message, few_parts, little_memory, refuse

__all__ = ["few_parts"]  # a fixture

Raw = dict[str, Any]
Change = Callable[[Raw], None]

WEIGHTS = "model.safetensors"
FILE = "quant_model_description.json"
FIELD = "quantization_config"
DENSE = folders.DENSE
MOGE = {**folders.MOGE, "moe_intermediate_size": 24}
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


class Sound:
    """A sound quantised folder, in one file of weights."""

    def __init__(self, home: Path, raw: Raw, recipe: str, how: Any = "compressed-tensors"):
        folders.write(home / "float", raw)
        config, _ = hf.read_config(home / "float")
        said = Description(schemes.named(recipe, config), how)
        streamed.quantise(home / "float", home / "made", said)
        self.tensors = quantised_reader.stored(home / "made")
        self.raw = json.loads((home / "made" / "config.json").read_text())
        file = home / "made" / FILE
        self.said = json.loads(file.read_text()) if file.exists() else None
        self.weights = home / WEIGHTS
        quantised_reader.write(self.weights, self.tensors)

    def edited(self, folder: Path, change: Change | None = None, **config: Any) -> Path:
        """A folder with a changed description, and other fields in its config.json."""
        folder.mkdir(exist_ok=True)
        if not (folder / WEIGHTS).exists():
            os.link(self.weights, folder / WEIGHTS)
        raw, said = copy.deepcopy({**self.raw, **config}), copy.deepcopy(self.said)
        if change is not None:
            change(raw[FIELD] if said is None else said)
        (folder / "config.json").write_text(json.dumps(raw))
        if said is not None:
            (folder / FILE).write_text(json.dumps(said))
        return folder


def made(name: str) -> Any:
    raw, recipe, *how = {
        "int8": (DENSE, "w8a8"),
        "weights": (DENSE, "w8a16"),
        "int4": (DENSE, "w4a16"),
        "fp8": (DENSE, "fp8"),
        "moge": (MOGE, "w8a8"),
        "ascend": (DENSE, "w8a8", "msmodelslim"),
        "ascend moge": (MOGE, "w8a8", "msmodelslim"),
    }[name]

    @pytest.fixture(scope="module", name=name.replace(" ", "_"))
    def fixture(tmp_path_factory: pytest.TempPathFactory) -> Sound:
        return Sound(tmp_path_factory.mktemp("sound"), raw, recipe, *how)

    return fixture


int8, weights, int4, fp8 = made("int8"), made("weights"), made("int4"), made("fp8")
moge, ascend, ascend_moge = made("moge"), made("ascend"), made("ascend moge")


class Anything:
    """A container of every name."""

    def __contains__(self, name: object) -> bool:
        return True


def at(*path: Any, value: Any) -> Change:
    """Sets a field deep in a description; `...` drops it."""

    def change(said: Raw) -> None:
        for key in path[:-1]:
            said = said[key]
        if value is ...:
            said.pop(path[-1])
        else:
            said[path[-1]] = value

    return change


def group(*path: Any, value: Any) -> Change:
    return at("config_groups", "group_0", *path, value=value)


def refuse_soon(folder: Path, seconds: float, *words: str) -> None:
    """`refuse` with another limit, which does not nest."""
    with no_longer_than(seconds), pytest.raises(CheckpointError) as caught:
        pangu_jax.load(folder)
    check_message(str(caught.value))
    for word in words:
        assert word in str(caught.value)


def recipe_of(folder: Path) -> Recipe:
    config, raw = hf.read_config(folder)
    said = hf.read_description(Folder(folder), raw, config)
    assert said is not None
    return said.recipe


# --- other methods, and what compressed-tensors can say beyond what is read ---------------------

METHODS = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "zero_point": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "ascend"},
    {"quant_method": "Compressed-Tensors"},
    {"quant_method": ["compressed-tensors"]},
    {"quant_method": None},
    {"bits": 8},
]


@pytest.mark.parametrize("value", METHODS, ids=lambda value: str(value.get("quant_method", "none")))
def test_another_method_is_named(int8: Sound, tmp_path: Path, value: Raw) -> None:
    method = value.get("quant_method")
    message = refuse(int8.edited(tmp_path, **{FIELD: value}), FIELD, "quant_method", str(tmp_path))
    assert json.dumps(method) in message
    refuse(int8.edited(tmp_path, **{FIELD: {**int8.raw[FIELD], "quant_method": method}}), FIELD)


@pytest.mark.parametrize("value", [[], "compressed-tensors", 5, True, False, {}, [{}], "x" * 10**5])
def test_a_description_that_is_no_object_is_refused(
    int8: Sound, tmp_path: Path, value: Any
) -> None:
    refuse(int8.edited(tmp_path, **{FIELD: value}), FIELD)


def test_without_a_description_the_numbers_are_refused(int8: Sound, tmp_path: Path) -> None:
    refuse(int8.edited(tmp_path, **{FIELD: None}), "I8", "description", "self_attn.q_proj.weight")


OF_WEIGHTS = [
    ("symmetric", False),
    ("symmetric", None),
    ("symmetric", 0),
    ("actorder", "group"),
    ("actorder", "static"),
    ("actorder", True),
    ("num_bits", 4),
    ("num_bits", 2),
    ("num_bits", "8"),
    ("num_bits", None),
    ("num_bits", 10**40),
    ("num_bits", [8]),
    ("type", "float"),
    ("type", "nf"),
    ("type", ["int"]),
    ("type", {"int": 8}),
    ("strategy", "tensor"),
    ("strategy", "block"),
    ("strategy", "group"),
    ("strategy", "tensor_group"),
    ("strategy", None),
    ("strategy", []),
]


@pytest.mark.parametrize(("field", "value"), OF_WEIGHTS)
def test_weights_of_another_kind_are_refused(
    weights: Sound, tmp_path: Path, field: str, value: Any
) -> None:
    """Float 8 by channel is known, but these numbers are integers."""
    known = (field, value) == ("type", "float")
    words = ("I8", "F8_E4M3") if known else (FIELD, "group_0.weights", "not supported")
    refuse(weights.edited(tmp_path, group("weights", field, value=value)), *words)


OF_INPUTS = [
    ("dynamic", False),
    ("dynamic", "local"),
    ("dynamic", None),
    ("strategy", "tensor"),
    ("strategy", "group"),
    ("strategy", ["token"]),
    ("num_bits", 4),
    ("num_bits", 16),
    ("type", "float"),
    ("type", None),
    ("symmetric", False),
]


@pytest.mark.parametrize(("field", "value"), OF_INPUTS)
def test_activations_of_another_kind_are_refused(
    int8: Sound, tmp_path: Path, field: str, value: Any
) -> None:
    change = group("input_activations", field, value=value)
    refuse(int8.edited(tmp_path, change), FIELD, "group_0.input_activations", "not supported")


@pytest.mark.parametrize("value", ["dynamic", [], 8, True, {"dynamic": True}])
def test_activations_that_are_no_object_are_refused(
    int8: Sound, tmp_path: Path, value: Any
) -> None:
    refuse(int8.edited(tmp_path, group("input_activations", value=value)), "input_activations")


@pytest.mark.parametrize("size", [0, 1, 3, -8, 5.5, 2**70, 10**400, True, "16", None, [16], 64])
def test_groups_of_a_strange_size_are_refused(int4: Sound, tmp_path: Path, size: Any) -> None:
    folder = int4.edited(tmp_path, group("weights", "group_size", value=size))
    with no_longer_than(5), pytest.raises((CheckpointError, ConfigError)) as caught:
        pangu_jax.load(folder)
    check_message(str(caught.value))
    assert any(word in str(caught.value) for word in ("group", "weight_scale"))


def test_integers_of_four_bits_have_float_activations(int4: Sound, tmp_path: Path) -> None:
    inputs = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    refuse(int4.edited(tmp_path, group("input_activations", value=inputs)), "int4", "activations")


OTHERS = [
    (at("kv_cache_scheme", value={"num_bits": 8, "type": "float"}), "kv_cache_scheme"),
    (at("sparsity_config", value={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (at("transform_config", value={"config_groups": {}}), "transform_config"),
    (at("quantization_status", value="frozen"), "quantization_status"),
    (at("quantization_status", value=["compressed"]), "quantization_status"),
    (at("config_groups", value=...), "config_groups"),
    (at("config_groups", value=None), "config_groups"),
    (at("config_groups", value={}), "config_groups"),
    (at("config_groups", value=[{}]), "config_groups"),
    (at("config_groups", value={"a\n\x1b[31m": 5}), "config_groups.a"),
    (at("config_groups", value={"g" * 10**5: 5}), "config_groups.ggg"),
    (group("output_activations", value={"num_bits": 8}), "output_activations"),
    (group("weights", value=None), "group_0.weights"),
    (group("weights", value=["int", 8]), "group_0.weights"),
    (group("weights", value={"deep": [[[[[[]]]]]]}), "group_0.weights"),
    (group("targets", value=None), "group_0"),
    (group("targets", value="Linear"), "group_0"),
    (group("targets", value=["Linear", 5]), "group_0"),
    (group("targets", value={"Linear": 1}), "group_0"),
    (group("targets", value=["re:("]), "group_0"),
    (group("targets", value=["re:[z-a]", "Linear"]), "group_0"),
    (group("targets", value=["re:" + "\n\x1b[31m(" * 10**4]), "group_0"),
    (at("ignore", value="lm_head"), "ignore"),
    (at("ignore", value=[["lm_head"]]), "ignore"),
    (at("ignore", value=["lm_head", "re:*"]), "ignore"),
]


@pytest.mark.parametrize(("change", "word"), OTHERS)
def test_what_is_not_understood_is_named(
    int8: Sound, tmp_path: Path, change: Change, word: str
) -> None:
    refuse(int8.edited(tmp_path, change), FIELD, word, str(tmp_path))


def test_unknown_fields_say_nothing(int8: Sound, tmp_path: Path) -> None:
    """Every version of compressed-tensors writes some more."""

    def change(said: Raw) -> None:
        said |= {"version": "0.12.2", "kv_cache_scheme": None, "sparsity_config": {}}
        said["config_groups"]["group_0"]["weights"] |= {"zp_dtype": None, "scale_dtype": None}

    found = recipe_of(int8.edited(tmp_path, change))
    assert found == schemes.named("w8a8", hf_config.from_hf(int8.raw))


# --- which modules ------------------------------------------------------------------------------


def test_a_quantised_head_is_named(int8: Sound, tmp_path: Path) -> None:
    refuse(int8.edited(tmp_path, at("ignore", value=[])), "head is quantised", "not supported")


def test_a_quantised_router_is_named(moge: Sound, tmp_path: Path) -> None:
    message = refuse(moge.edited(tmp_path, at("ignore", value=["lm_head"])), "is quantised")
    assert "router" in message or "mlp.gate" in message


def test_a_quantised_embedding_is_named(int8: Sound, tmp_path: Path) -> None:
    folder = int8.edited(tmp_path, group("targets", value=["Linear", "re:.*embed_tokens"]))
    name = "model.embed_tokens.weight"
    tensors = {**int8.tensors, name: int8.tensors[name].astype(np.int8)}
    quantised_reader.write(folder / WEIGHTS, tensors)
    refuse(folder, name, "I8")


@pytest.mark.parametrize(
    ("module", "other"),
    [("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
)
def test_parts_of_one_product_that_are_held_differently_are_named(
    int8: Sound, tmp_path: Path, module: str, other: str
) -> None:
    name = f"model.layers.1.{module}"
    folder = int8.edited(tmp_path, at("ignore", value=["lm_head", name]))
    refuse(folder, name, f"model.layers.1.{other}", "alike")


def test_an_expert_that_is_held_differently_is_named(moge: Sound, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj"
    ignore = [*moge.raw[FIELD]["ignore"], name]
    refuse(moge.edited(tmp_path, at("ignore", value=ignore)), "model.layers.1.mlp.experts", "alike")


def two_groups(first: list[str], second: list[str]) -> Change:
    """Weight-only for the first, int8 activations for the second; the numbers are the same."""

    def change(said: Raw) -> None:
        dynamic = said["config_groups"]["group_0"]
        plain = {**dynamic, "input_activations": None}
        groups = {"group_0": {**plain, "targets": first}, "group_1": {**dynamic, "targets": second}}
        said["config_groups"] = groups

    return change


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (["re:.*"], ["Linear"], "float"),
        (["Linear"], ["re:.*down_proj"], "dynamic"),
        (["Linear"], [DOWN], "dynamic"),
        ([DOWN], ["re:.*down_proj"], "float"),
    ],
)
def test_names_and_patterns_go_before_a_class(
    int8: Sound, tmp_path: Path, first: list[str], second: list[str], winner: Any
) -> None:
    """As in compressed-tensors (utils/match.py, match_targets) and vLLM, whatever the order of
    groups.
    """
    folder = int8.edited(tmp_path, two_groups(first, second))
    assert recipe_of(folder).scheme("blocks.0.mlp.down") == Scheme("int8", winner)
    said = json.loads((folder / "config.json").read_text())[FIELD]
    own = quantised_reader._group(said, DOWN)
    assert own is not None
    assert (own["input_activations"] is None) == (winner == "float")


@pytest.mark.parametrize(
    "ignore",
    [
        ["lm_head", "re:.*mlp.gate$"],
        ["re:.*lm_head", "re:.*mlp[.]gate$"],
        [r"re:^lm_head$", r"re:model\.layers\.[0-9]+\.mlp\.gate"],
        ["re:lm_.*", "re:.*gate$", "re:vision_tower.*", "embed_tokens"],
        ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(2))],
        ["re:.*head", "re:.*[.]gate$", "re:.*router.*"],
    ],
)
def test_patterns_of_real_folders_are_read(moge: Sound, tmp_path: Path, ignore: list[str]) -> None:
    """`re:.*mlp.gate` without an end would mean gate_proj too."""
    folder = moge.edited(tmp_path, at("ignore", value=ignore))
    assert recipe_of(folder) == schemes.named("w8a8", hf_config.from_hf(moge.raw))


def test_a_pattern_matches_from_the_beginning(int8: Sound, tmp_path: Path) -> None:
    folder = int8.edited(tmp_path, at("ignore", value=["lm_head", "re:self_attn", "re:mlp.*"]))
    assert recipe_of(folder) == schemes.named("w8a8", hf_config.from_hf(int8.raw))


def test_layers_may_be_float(int8: Sound, tmp_path: Path) -> None:
    ignore = ["lm_head", r"re:model\.layers\.1\..*"]
    folder = int8.edited(tmp_path, at("ignore", value=ignore))
    (first, schemes_of), (second, nothing) = recipe_of(folder).runs
    assert (first, second, nothing) == (1, 1, ())
    assert len(schemes_of) == 4
    refuse(folder, Q, "I8")


REFUSED = {
    "nested": "(a+)+$",
    "nested wild cards": "(.*)*Z",
    "nested and silent": "(?:.+)+Z",
    "nested with a count": "(.{0,9}){9,}Z",
    "counts of counts": "(((.{9}){9}){9}){9}",
    "thousands of wild cards": ".*" * 5000 + "Z",
    "longer than any name": "(" + "|".join(["a" * 50] * 10_000) + ")",
}
# With 2^28 ways or more of matching the beginning of a module's name, of which none goes on.
SLOW = {
    "four wild cards in counts": ".{0,30}" * 9 + "Z",
    "many that may be missing": ".?" * 31 + "Z",
    "many classes that may be missing": "[a-z._0-9]?" * 31 + "Z",
    "many equal choices": "(.|.)" * 28 + "Z",
    "many empty choices": "(.|)" * 30 + "Z",
    "choices of choices": "((.|..)|(..|.))" * 16 + "Z",
}


@pytest.mark.parametrize("where", ["ignore", "targets"])
@pytest.mark.parametrize("pattern", REFUSED.values(), ids=REFUSED)
def test_a_pattern_that_is_too_much_is_refused(
    int8: Sound, tmp_path: Path, pattern: str, where: str
) -> None:
    refuse_soon(with_pattern(int8, tmp_path, pattern, where), 3, FIELD, "pattern")


@pytest.mark.parametrize("where", ["ignore", "targets"])
@pytest.mark.parametrize("pattern", SLOW.values(), ids=SLOW)
def test_a_pattern_that_would_take_for_ever_is_no_harm(
    int8: Sound, tmp_path: Path, pattern: str, where: str
) -> None:
    """Refused, or matched in another way; then head or matrices are not as they are described."""
    refuse_soon(with_pattern(int8, tmp_path, pattern, where), 3)


def with_pattern(sound: Sound, folder: Path, pattern: str, where: str) -> Path:
    path = ("ignore",) if where == "ignore" else ("config_groups", "group_0", "targets")
    return sound.edited(folder, at(*path, value=[f"re:{pattern}"]))


CROWDS = {
    "many cheap ones": ["re:model"] * 50_000,
    "many slow ones": ["re:.*.*.*Z"] * 4000,
    "many long ones": ["re:" + "|".join(["abcdefghi"] * 1800) + str(i) for i in range(700)],
}


@pytest.mark.parametrize("layers", [2, 4096])
@pytest.mark.parametrize("patterns", CROWDS.values(), ids=CROWDS)
def test_a_crowd_of_patterns_is_refused_soon(
    int8: Sound, tmp_path: Path, patterns: list[str], layers: int
) -> None:
    change = at("ignore", value=patterns)
    folder = int8.edited(tmp_path, change, num_hidden_layers=layers)
    refuse_soon(folder, 5)


# --- sizes that only the config claims ----------------------------------------------------------


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("sound", ["moge", "ascend_moge"])
def test_millions_of_claimed_experts_are_never_listed(
    request: pytest.FixtureRequest, tmp_path: Path, sound: str
) -> None:
    folder = request.getfixturevalue(sound).edited(tmp_path, num_experts=2**24)
    with little_memory():
        refuse_soon(folder, 10, "mlp.experts.")


@pytest.mark.parametrize("sound", ["int8", "int4", "ascend"])
def test_thousands_of_claimed_layers_are_refused_soon(
    request: pytest.FixtureRequest, tmp_path: Path, sound: str
) -> None:
    folder = request.getfixturevalue(sound).edited(tmp_path, num_hidden_layers=4096)
    refuse_soon(folder, 5, str(tmp_path), "model.layers.2.")


# --- msModelSlim's file -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["W4A8_DYNAMIC", "W8A16", "W8A8_MIX", "w8a8", "", None, 8, [], {}, ["W8A8"]]
)
def test_another_kind_of_matrix_is_named(ascend: Sound, tmp_path: Path, kind: Any) -> None:
    folder = ascend.edited(tmp_path, at(f"{Q}.weight", value=kind))
    refuse(folder, str(folder / FILE), f"{Q}.weight", json.dumps(kind))


OF_FILES = [
    (at(f"{Q}.weight", value="FLOAT"), (Q, K, "alike")),
    (at(f"{Q}.weight", value=...), (Q, K, "alike")),
    (at(f"{Q}.weight", value="W8A8"), (Q, K, "alike")),
    (at("lm_head.weight", value="W8A8_DYNAMIC"), ("head is quantised",)),
    (at("model.embed_tokens.weight", value="W8A8_DYNAMIC"), ("embed", "is quantised")),
    (at("model.norm.weight", value="W8A8_DYNAMIC"), ("norm", "is quantised")),
    (
        at("model.layers.0.input_layernorm.weight", value="W8A8"),
        ("blocks.0.attention_norm", "is quantised"),
    ),
    (at("kv_quant_type", value="C4"), ("kv_quant_type", "C4")),
    (at("kv_quant_type", value=["C8"]), ("kv_quant_type",)),
    (at("kv_quant_type", value=8), ("kv_quant_type",)),
    (at("fa_quant_type", value="FAKQuant"), ("fa_quant_type",)),
    (at("fa_quant_type", value={}), ("fa_quant_type",)),
]


@pytest.mark.parametrize(("change", "words"), OF_FILES)
def test_a_file_that_says_something_else_is_refused(
    ascend: Sound, tmp_path: Path, change: Change, words: tuple[str, ...]
) -> None:
    folder = ascend.edited(tmp_path, change)
    refuse(folder, str(folder / FILE), *words)


def test_a_quantised_router_of_a_file_is_named(ascend_moge: Sound, tmp_path: Path) -> None:
    change = at("model.layers.0.mlp.gate.weight", value="W8A8_DYNAMIC")
    refuse(ascend_moge.edited(tmp_path, change), FILE, "is quantised")


def test_an_int8_cache_needs_its_scales(ascend: Sound, tmp_path: Path) -> None:
    folder = ascend.edited(tmp_path, at("kv_quant_type", value="C8"))
    refuse(folder, "missing", "model.layers.0.self_attn.k_proj.kv_cache_scale")


def test_an_empty_file_describes_a_float_model(ascend: Sound, tmp_path: Path) -> None:
    folder = ascend.edited(tmp_path)
    (folder / FILE).write_text("{}")
    refuse(folder, "self_attn.q_proj.weight", "I8")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 10**5, '{"a": ' * 10**5, "\ufeff{}"],
)
def test_a_file_that_is_no_strict_json_object_is_refused(
    ascend: Sound, tmp_path: Path, text: str
) -> None:
    folder = ascend.edited(tmp_path)
    (folder / FILE).write_text(text)
    refuse(folder, str(folder / FILE))


@pytest.mark.parametrize("kind", ["pipe", "folder", "hole", "bytes"])
def test_a_thing_that_is_no_file_is_refused_at_once(
    ascend: Sound, tmp_path: Path, kind: str
) -> None:
    folder = ascend.edited(tmp_path)
    file = folder / FILE
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"\xff\xfe{}")
        if kind == "hole":
            os.truncate(file, 10**11)
    refuse_soon(folder, 2, str(file))


# --- anything at all ----------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 130),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["Linear", "re:.*", "re:(", "lm_head", Q, "W8A8", "W8A8_DYNAMIC", "FLOAT"]),
        st.sampled_from(["int", "float", "channel", "group", "token", "tensor", "C8", DOWN]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["targets", "weights", "type", "a"]), inner, max_size=3),
    ),
    max_leaves=4,
)


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value."""
    if before:
        yield before
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from paths(inner, (*before, key))


def load_or_refuse(folder: Path) -> None:
    try:
        with no_longer_than(10):
            pangu_jax.load(folder)
    except (CheckpointError, ConfigError) as error:
        check_message(str(error))


@settings(max_examples=40)
@given(data=st.data())
def test_random_damage_of_a_config_is_refused_or_harmless(
    int8: Sound, int4: Sound, data: st.DataObject
) -> None:
    sound = data.draw(st.sampled_from([int8, int4]))
    path = data.draw(st.sampled_from(sorted(paths(sound.raw[FIELD]), key=repr)))
    change = at(*path, value=data.draw(st.one_of(VALUES, st.just(...))))
    load_or_refuse(sound.edited(sound.weights.parent / "damaged", change))


@settings(max_examples=40)
@given(data=st.data())
def test_random_damage_of_a_file_is_refused_or_harmless(ascend: Sound, data: st.DataObject) -> None:
    assert ascend.said is not None
    more = ["kv_quant_type", "fa_quant_type", "model_quant_type", "a"]
    keys = data.draw(st.lists(st.sampled_from([*ascend.said, *more]), min_size=1, max_size=4))
    values = [data.draw(VALUES) for _ in keys]

    def change(said: Raw) -> None:
        said |= dict(zip(keys, values, strict=True))

    load_or_refuse(ascend.edited(ascend.weights.parent / "damaged", change))


# --- what is written is what is read ------------------------------------------------------------

SCHEMES = (
    None,
    Scheme("int8"),
    Scheme("int8", "dynamic"),
    Scheme("int4", group=8),
    Scheme("int4", group=4),
    Scheme("fp8"),
    Scheme("fp8", "dynamic"),
)


def random_recipe(data: st.DataObject, config: Any, known: Any) -> Recipe:
    """Any scheme for any leaf of any layer."""
    layers = [
        tuple((leaf, own) for leaf in schemes.matrices(config) if (own := data.draw(known)))
        for _ in range(config.num_layers)
    ]
    return Recipe.of_layers(layers)


@settings(max_examples=25)
@given(data=st.data(), base=st.sampled_from([DENSE, MOGE]), tied=st.booleans())
def test_any_recipe_comes_back_from_a_config(data: st.DataObject, base: Raw, tied: bool) -> None:
    raw = {**base, "num_hidden_layers": 12, "tie_word_embeddings": tied, "num_experts": 4}
    config = hf_config.from_hf(raw if base is MOGE else {**raw, "num_experts": None})
    recipe = random_recipe(data, config, st.sampled_from(SCHEMES))
    if not recipe.runs:
        return
    said = json.loads(json.dumps(description.compressed(recipe, config)))
    assert description.read(Path("nowhere"), {FIELD: said}, config, Anything()) == Description(
        recipe, "compressed-tensors"
    )
    for leaf, parts in names.leaves(config):
        scheme = recipe.scheme(leaf)
        for part in parts:
            if part.name.endswith(".weight") and len(part.shape) == 2 and leaf != "embed":
                group = quantised_reader._group(said, part.name.removesuffix(".weight"))
                assert (group is None) == (scheme is None)
                if group is not None and scheme is not None:
                    assert group["weights"]["group_size"] == scheme.group
                    floats = group["input_activations"] is None
                    assert floats == (scheme.activations == "float")


@settings(max_examples=20)
@given(data=st.data(), base=st.sampled_from([DENSE, MOGE]), cached=st.booleans())
def test_any_recipe_comes_back_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, base: Raw, cached: bool
) -> None:
    config = hf_config.from_hf({**base, "num_hidden_layers": 5})
    known = [None, Scheme("int8", "dynamic"), Scheme("int8", "static")]
    recipe = random_recipe(data, config, st.sampled_from(known))
    if cached:
        recipe = Recipe(recipe.runs, "int8", cache_scales=True)
    folder = tmp_path_factory.getbasetemp()
    (folder / FILE).write_text(json.dumps(description.msmodelslim(recipe, config)))
    assert description.read(folder, {}, config, Anything()) == Description(recipe, "msmodelslim")


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_the_description_of_the_72b_is_short_and_soon_read(name: str) -> None:
    config = pangu_jax.preset("pro-moe-72b")
    recipe = schemes.named(name, config)
    with no_longer_than(10):
        said = description.compressed(recipe, config)
        assert len(json.dumps(said)) < 4000
        found = description.read(Path("nowhere"), {FIELD: said}, config, Anything())
    assert found is not None
    assert found.recipe == recipe


@pytest.mark.parametrize("name", ["w8a16", "w4a16", "fp8"])
def test_what_msmodelslim_cannot_say_is_named(name: str) -> None:
    config = hf_config.from_hf(DENSE)
    with pytest.raises(ConfigError, match="msModelSlim has no word"):
        description.msmodelslim(schemes.named(name, config), config)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(((2, (("mlp.down", Scheme("int8", "static")),)),)),
        Recipe((), "int8", cache_scales=True),
    ],
    ids=["static", "cache"],
)
def test_what_compressed_tensors_cannot_say_is_named(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="msmodelslim"):
        description.compressed(recipe, hf_config.from_hf(DENSE))
