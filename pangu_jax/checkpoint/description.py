"""What a folder says of its quantised matrices, read and written in either format's words.

Descriptions are hostile until checked: whatever is not understood is refused by name.
"""

import itertools
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from pangu_jax import strict
from pangu_jax.checkpoint import names, quantised
from pangu_jax.checkpoint.quantised import Description, Format
from pangu_jax.config import ModelConfig
from pangu_jax.errors import ConfigError
from pangu_jax.quant import scheme as schemes
from pangu_jax.quant.scheme import Numbers, Recipe, Scheme, Schemes

FILE = "quant_model_description.json"
FIELD = "quantization_config"
CACHE_TYPE = "C8"

MAX_PATTERNS = 64
MAX_PATTERN = 50_000  # characters of all together
# Of wild cards in one pattern: matching takes time to that power.
MAX_WILD = 4
_LITERAL = r"(?:[\w-]|\\\.|\[\.\])"
SIMPLE = re.compile(
    rf"\^?(?:{_LITERAL}|\.[*+]?|(?:\\d|\[0-9\])\+?|\((?:\?:)?{_LITERAL}+(?:\|{_LITERAL}+)*\))*\$?"
)

PACKINGS = {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}
TYPES = {"W8A8": Scheme("int8", "static"), "W8A8_DYNAMIC": Scheme("int8", "dynamic")}


def read(
    folder: Path, raw: dict[str, Any], config: ModelConfig, there: Container[str]
) -> Description | None:
    """The folder's description, None for a float model. Raises ConfigError.

    there: the names of its tensors; a config may claim billions, and the first that is missing ends
        the reading
    """
    said, file = raw.get(FIELD), folder / FILE
    if said is not None:
        if not isinstance(said, dict) or said.get("quant_method") != "compressed-tensors":
            method = said.get("quant_method") if isinstance(said, dict) else said
            raise ConfigError(
                f"{FIELD}: quant_method {strict.describe(method)} is not supported; known: "
                f"compressed-tensors, and msModelSlim's {FILE}"
            )
        return Description(_read_compressed(said, config, there), "compressed-tensors")
    if file.exists():
        return Description(_read_msmodelslim(file, config, there), "msmodelslim")
    return None


def _recipe(config: ModelConfig, scheme_of: Any, there: Container[str]) -> Recipe:
    """The recipe in which each matrix has `scheme_of(its tensors' names)`; parts of one leaf must
    agree.
    """
    layers: list[Schemes] = []
    found: dict[str, Scheme | None] = {}
    for leaf, parts in names.leaves(config):
        every = []
        for part in parts:
            if part.name.endswith(".weight"):
                packed = _is_packed(part, scheme_of(part.name))
                name = f"{part.name}_packed" if packed else part.name
                if name not in there:
                    raise ConfigError(f"missing tensor {name}")
                every.append(part.name)
        own = {scheme_of(name) for name in every}
        if len(own) > 1:
            raise ConfigError(
                f"{_spelled(every)} must all be held alike: they are one product here"
            )
        found[leaf] = own.pop() if own else None
    for i in range(config.num_layers):
        prefix = f"blocks.{i}."
        own = ((leaf, found.pop(prefix + leaf)) for leaf in schemes.matrices(config))
        layers.append(tuple((leaf, scheme) for leaf, scheme in own if scheme is not None))
    wrong = next((leaf for leaf, scheme in found.items() if scheme is not None), None)
    if wrong is not None:
        raise ConfigError(f"{wrong} is quantised, which is not supported: only matrices of layers")
    return Recipe.of_layers(layers)


def _is_packed(part: names.Part, scheme: Scheme | None) -> bool:
    """Whether a matrix is int4. Raises ConfigError for one that no words of 8 numbers hold."""
    if scheme is None or scheme.numbers != "int4":
        return False
    if part.shape[-1] % 8:
        raise ConfigError(f"{part.name}: {part.shape[-1]} int4 inputs do not fill words of 8")
    return True


def _spelled(every: list[str]) -> str:
    shown = ", ".join(name.removesuffix(".weight") for name in every[:3])
    return shown + (" and others" if len(every) > 3 else "")


def _read_compressed(said: dict[str, Any], config: ModelConfig, there: Container[str]) -> Recipe:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{FIELD}: needs config_groups")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if said.get(name):
            raise ConfigError(f"{FIELD}.{name} is not supported")
    if said.get("quantization_status") not in (None, "compressed"):
        raise ConfigError(f"{FIELD}.quantization_status must be compressed")
    ignored = _Patterns(said.get("ignore") or [], f"{FIELD}.ignore")
    held = [
        (_Patterns(group.get("targets"), where), _scheme(group, where))
        for where, group in _objects(groups, f"{FIELD}.config_groups")
    ]

    def scheme_of(tensor: str) -> Scheme | None:
        module = tensor.removesuffix(".weight")
        linear = not module.endswith(("norm", "layernorm", "embed_tokens"))
        if not linear or module in ignored:
            return None
        for rank in ("exact", "patterns", "all"):  # names before patterns before classes
            for patterns, scheme in held:
                if patterns.have(module, rank):
                    return scheme
        return None

    return _recipe(config, scheme_of, there)


def _objects(table: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in table.items():
        own = f"{where}.{strict.shorten(name, quote=False)}"
        if not isinstance(value, dict):
            raise ConfigError(f"{own} must be an object, not {strict.describe(value)}")
        yield own, value


class _Patterns:
    """Names of modules: exact ones, "re:" patterns (at the beginning, as compressed-tensors does),
    and "Linear" for all of them.
    """

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
            raise ConfigError(f"{where}: must be a list of names, not {strict.describe(given)}")
        self.all = "Linear" in given
        self.exact = {item for item in given if not item.startswith("re:")}
        patterns = [item.removeprefix("re:") for item in given if item.startswith("re:")]
        if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_PATTERN:
            raise ConfigError(f"{where}: {len(patterns)} patterns are too many or too long")
        self.patterns = [_compile(pattern, where) for pattern in patterns]

    def __contains__(self, module: str) -> bool:
        return any(self.have(module, rank) for rank in ("exact", "patterns", "all"))

    def have(self, module: str, rank: str) -> bool:
        """Whether a module is named: exactly, by a pattern, or as one of all."""
        if rank == "patterns":
            return any(pattern.match(module) for pattern in self.patterns)
        return self.all if rank == "all" else module in self.exact


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern by a stranger. Refused is what could take for ever: anything but literals, numbers,
    alternatives of literals, and a few wild cards.
    """
    if not SIMPLE.fullmatch(pattern) or len(re.findall(r"[*+]", pattern)) > MAX_WILD:
        raise ConfigError(f"{where}: the pattern {strict.shorten(pattern)} is too complicated")
    try:
        return re.compile(pattern)
    except re.error:
        raise ConfigError(f"{where}: {strict.shorten(pattern)} is not a pattern") from None


def _scheme(group: dict[str, Any], where: str) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        raise ConfigError(f"{where}.output_activations is not supported")
    if not isinstance(weights, dict):
        raise ConfigError(f"{where}.weights must be an object, not {strict.describe(weights)}")
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    known: dict[Any, Numbers] = {
        ("int", 8, "channel"): "int8",
        ("float", 8, "channel"): "fp8",
        ("int", 4, "group"): "int4",
    }
    plain = all(isinstance(part, str | int) for part in kind) and kind in known
    if not plain or weights.get("symmetric", True) is not True or weights.get("actorder"):
        raise ConfigError(
            f"{where}.weights = {strict.describe(weights)} is not supported; known: symmetric "
            "int 8 and float 8 by channel, int 4 by group"
        )
    numbers, group_size = known[kind], None
    if numbers == "int4":
        group_size = strict.coerce(int, weights.get("group_size"), f"{where}.weights.group_size")
    if inputs is None:
        return Scheme(numbers, group=group_size)
    wanted = {"type": kind[0], "num_bits": 8, "strategy": "token", "dynamic": True}
    same = isinstance(inputs, dict) and inputs.get("symmetric", True) is True
    if not same or any(inputs.get(key) != value for key, value in wanted.items()):
        raise ConfigError(
            f"{where}.input_activations = {strict.describe(inputs)} is not supported; known: the "
            "weights' type in 8 bits, dynamic, by token"
        )
    return Scheme(numbers, "dynamic", group_size)


def _read_msmodelslim(file: Path, config: ModelConfig, there: Container[str]) -> Recipe:
    said = strict.read_json_object(file)

    def scheme_of(tensor: str) -> Scheme | None:
        kind = said.get(tensor, "FLOAT")
        if not isinstance(kind, str) or kind not in (*TYPES, "FLOAT"):
            raise ConfigError(
                f"{file}: {tensor} is {strict.describe(kind)}; known: {', '.join(TYPES)}, FLOAT"
            )
        return TYPES.get(kind)

    try:
        recipe = _recipe(config, scheme_of, there)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if str(file) in message else f"{file}: {message}") from None
    cached = said.get("kv_quant_type")
    if cached not in (None, CACHE_TYPE, "FLOAT"):
        raise ConfigError(f"{file}: kv_quant_type {strict.describe(cached)} is not {CACHE_TYPE}")
    if said.get("fa_quant_type") not in (None, "FLOAT"):
        raise ConfigError(f"{file}: fa_quant_type is not supported")
    if cached == CACHE_TYPE:
        return Recipe(recipe.runs, "int8", cache_scales=True)
    return recipe


def compressed(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    """`quantization_config` of a recipe. Raises ConfigError for what the format cannot say."""
    if recipe.cache_scales:
        raise ConfigError(
            "compressed-tensors cannot say the scales of the KV cache; msmodelslim can"
        )
    modules: dict[Scheme, list[str]] = {}
    floats: list[str] = []
    for leaf, parts in names.leaves(config):
        scheme = recipe.scheme(leaf)
        every = [part for part in parts if _is_matrix(part)]
        if leaf == "embed":
            continue
        for part in every:
            _is_packed(part, scheme)
        own = floats if scheme is None else modules.setdefault(scheme, [])
        own.extend(part.name.removesuffix(".weight") for part in every)
    groups: dict[str, Any] = {}
    for i, (scheme, every) in enumerate(modules.items()):
        if scheme.activations == "static":
            raise ConfigError("static activations are written as msmodelslim only")
        targets = ["Linear"] if len(modules) == 1 else _as_patterns(every)
        groups[f"group_{i}"] = _group(scheme, targets)
    packings = sorted({PACKINGS[scheme.numbers] for scheme in modules})
    return {
        "quant_method": "compressed-tensors",
        "format": packings[0] if len(packings) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _as_patterns(floats),
    }


def _is_matrix(part: names.Part) -> bool:
    return part.name.endswith(".weight") and len(part.shape) == 2


def _as_patterns(modules: Iterable[str]) -> list[str]:
    """The names, those of several layers or experts as one pattern."""
    shape = lambda name: re.sub(r"[.]\d+[.]", ".#.", name)
    found = []
    for pattern, group in itertools.groupby(sorted(modules, key=shape), key=shape):
        every = list(group)
        if len(every) == 1:
            found.append(every[0])
            continue
        layers = sorted({re.findall(r"[.](\d+)[.]", name)[0] for name in every}, key=int)
        first, *more = pattern.split("#")
        text = first + f"({'|'.join(layers)})" + r"\d+".join(more)
        found.append("re:" + text.replace(".", r"\.") + "$")
    return found


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    common = {"type": "float" if scheme.numbers == "fp8" else "int", "symmetric": True}
    common |= {"actorder": None, "block_structure": None, "observer_kwargs": {}}
    bits = 4 if scheme.numbers == "int4" else 8
    strategy = "channel" if scheme.group is None else "group"
    weights = common | {"num_bits": bits, "strategy": strategy, "group_size": scheme.group}
    inputs = None
    if scheme.activations == "dynamic":
        inputs = common | {"num_bits": 8, "strategy": "token", "group_size": None}
        inputs |= {"dynamic": True, "observer": None}
    return {
        "targets": targets,
        "weights": weights | {"dynamic": False, "observer": "minmax"},
        "input_activations": inputs,
        "output_activations": None,
        "format": PACKINGS[scheme.numbers],
    }


def msmodelslim(recipe: Recipe, config: ModelConfig) -> dict[str, str]:
    """quant_model_description.json of a recipe. Raises ConfigError for what the format cannot
    say.
    """
    kinds = {scheme: name for name, scheme in TYPES.items()}
    said: dict[str, str] = {}
    for leaf, parts in names.leaves(config):
        scheme = recipe.scheme(leaf)
        if scheme is not None and scheme not in kinds:
            raise ConfigError(
                f"msModelSlim has no word for {scheme.numbers} weights with "
                f"{scheme.activations} activations"
            )
        for part in parts:
            if scheme is None:
                if not quantised.static_bias(leaf, recipe):
                    said[part.name] = "FLOAT"
                continue
            every = quantised.tensors(part, scheme).values()
            spare = quantised.constants(part, scheme, "msmodelslim")
            said |= {name.name: kinds[scheme] for name in (*every, *spare)}
    used = sorted({kinds[scheme] for _, layer in recipe.runs for _, scheme in layer})
    said["model_quant_type"] = used[-1] if used else "FLOAT"
    if recipe.cache_scales:
        said["kv_quant_type"] = CACHE_TYPE
    return said


def words(recipe: Recipe, how: Format | None) -> Format:
    """The format to write: the one asked for, else compressed-tensors where it can say it all."""
    static = any(s.activations == "static" for _, layer in recipe.runs for _, s in layer)
    return how or ("msmodelslim" if static or recipe.cache_scales else "compressed-tensors")
