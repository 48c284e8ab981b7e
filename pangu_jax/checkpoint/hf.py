"""Hugging Face folders in: `load` streams one in, checked before anything is allocated."""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from pangu_jax import build, strict
from pangu_jax.checkpoint import description, hf_config, names, native, quantised
from pangu_jax.checkpoint.folder import Folder
from pangu_jax.checkpoint.quantised import Description
from pangu_jax.config import ModelConfig
from pangu_jax.errors import CheckpointError, ConfigError
from pangu_jax.model import Form, Pangu
from pangu_jax.origin import Origin
from pangu_jax.parallel import fit
from pangu_jax.parallel.layout import Layout
from pangu_jax.quant.scheme import FLOAT

log = logging.getLogger(__name__)

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

GENERATION = "generation_config.json"

# Files that belong to a model beside its weights: remembered by `load`, copied by `save_hf`. Never
# code.
COMPANIONS = (
    GENERATION,
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

# A tokenizer has 2 to 20 MB.
MAX_COMPANION_BYTES = 128 * 2**20

# Tensors only R-72B-2512 (PanguProMoE V2) has.
V2_TENSORS = ("qkv_proj", "k_layernorm", "param_sink_key", "e_score_correction_bias")

Progress = Callable[[int, int], None]


def load(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    layout: Layout | str | None = None,
    form: Form | None = None,
    *,
    progress: Progress | None = None,
) -> Pangu:
    """The model in a Hugging Face folder.

    dtype: float32, bfloat16 or float16; None is the config's `torch_dtype`
    layout: None (one device), a layout's name, a path or a Layout
    form: "separate" (default on CPU and GPU) or "stacked" (default on TPU, and for training)
    progress: called with (bytes read, bytes in all) after each leaf

    A folder of `pangu-train` is a model, too: that of its newest checkpoint until it is finished.

    A folder that describes itself as quantised (compressed-tensors or msModelSlim) gives a model
    whose matrices are held as they are stored.

    Tensors stream from the mapped files to their device; names, shapes, dtypes and byte ranges are
    all checked before anything is allocated. Raises CheckpointError, one line naming file and
    tensor.
    """
    folder = native.home(Path(path))
    config, raw = read_config(folder)
    build.check_choices(form, dtype)  # before the folder's files are opened
    remembered = json.dumps(hf_config.remembered(raw), sort_keys=True)
    origin = Origin(remembered, companions(folder), folder.absolute())
    if native.is_run(folder):
        of = functools.partial(build.abstract, config, dtype=dtype, where=layout, origin=origin)
        base = functools.partial(load, dtype=dtype, layout=layout, form="stacked")
        loaded = native.load(folder, lambda: of(form="stacked"), base)
        return build.convert(loaded, of(form=form).form)
    tensors = Folder(folder)
    said = read_description(tensors, raw, config)
    parts = check_tensors(config, tensors, said)
    recipe = FLOAT if said is None else said.recipe
    model = build.abstract(
        config, dtype=dtype, where=layout, form=form, origin=origin, recipe=recipe
    )
    return _fill(model, tensors, parts, progress)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """A folder's ModelConfig and its raw config.json.

    EOS ids come from generation_config.json when it has any.

    Raises CheckpointError.
    """
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        name = strict.shorten(str(folder), quote=False, limit=300)
        raise CheckpointError(f"{name}: {what}; expected a Hugging Face model folder")
    if native.is_run(folder):
        return native.read_config(folder)
    file = folder / "config.json"
    try:
        raw = strict.read_json_object(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    try:
        config = hf_config.from_hf(raw)
        file = folder / GENERATION
        eos = hf_config.eos_token_ids(generation_defaults(folder))
        if eos:
            config = hf_config.with_eos(config, eos)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config, raw


def read_description(
    tensors: Folder, raw: dict[str, Any], config: ModelConfig
) -> Description | None:
    """How the folder's matrices are quantised, None if they are not. Raises CheckpointError."""
    folder = tensors.path
    try:
        return description.read(folder, raw, config, tensors.names)
    except ConfigError as error:
        text = str(error)
        raise CheckpointError(
            text if str(folder) in text else f"{folder / 'config.json'}: {text}"
        ) from None


def generation_defaults(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json, {} when there is none. Raises CheckpointError."""
    file = folder / GENERATION
    if not file.exists():
        return {}
    try:
        return strict.read_json_object(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def companions(folder: Path) -> tuple[tuple[str, str], ...]:
    """Name and digest of the folder's companion files.

    A link that leads out of the folder and of the Hugging Face cache it lies in is not followed: a
    cloned folder must not make `save_hf` copy a private file into one that is meant to be shared.
    """
    home = folder.resolve()
    found = []
    for name in COMPANIONS:
        file = (folder / name).resolve()
        if not file.is_file():
            continue
        here = file.parent == home or file.parent.name == "blobs"
        if not here or file.stat().st_size > MAX_COMPANION_BYTES:
            log.warning("%s: too large, or a link out of the folder; ignored", folder / name)
            continue
        found.append((name, hashlib.sha256(file.read_bytes()).hexdigest()))
    return tuple(found)


def check_tensors(
    config: ModelConfig, tensors: Folder, said: Description | None
) -> dict[str, tuple[names.Part, ...]]:
    """The parts of every leaf, once the folder is known to hold each of them and nothing else.

    Ignored: rotary `inv_freq` (recomputed from rope_theta) and a stored head beside tied
    embeddings.
    said: how they are quantised, if they are
    Raises CheckpointError: missing, extra or mis-shaped tensors, or of another dtype.
    """
    spare = {name for name in tensors.names if "rotary_emb.inv_freq" in name}
    if config.tie_embeddings and "lm_head.weight" in tensors.names:
        log.info("%s: the embeddings are tied; the stored lm_head.weight is ignored", tensors.path)
        spare.add("lm_head.weight")
    parts: dict[str, tuple[names.Part, ...]] = {}
    expected: set[str] = set()
    if said is not None:
        spare |= set(_check_constants(config, tensors, said))
    for leaf, leaf_parts in quantised.leaves(config, said):
        checked = []
        for part in leaf_parts:
            if part.name not in tensors.names:
                raise CheckpointError(_missing(config, tensors, said, expected))
            expected.add(part.name)
            _check_part(part, tensors)
            checked.append(part)
        parts[leaf] = tuple(checked)
    extra = sorted(set(tensors.names) - expected - spare)
    if extra:
        raise CheckpointError(_extra(extra, tensors))
    return parts


def _check_constants(config: ModelConfig, tensors: Folder, said: Description) -> Iterator[str]:
    """The names of tensors that say nothing new. Raises CheckpointError where one does."""
    for leaf, parts in names.leaves(config):
        scheme = said.recipe.scheme(leaf)
        if quantised.static_bias(leaf, said.recipe):
            yield from (part.name for part in parts)
        if scheme is None:
            continue
        for part in parts:
            for constant in quantised.constants(part, scheme, said.format):
                if constant.name not in tensors.names:
                    continue
                yield constant.name
                wanted, entry = constant.expected, tensors.entry(constant.name)
                if wanted is None:
                    continue
                same = entry.shape == wanted.shape or entry.shape == wanted.reshape(-1).shape
                if (
                    not same
                    or (tensors.read(constant.name).reshape(-1) != wanted.reshape(-1)).any()
                ):
                    raise CheckpointError(
                        f"{tensors.file_of(constant.name)}: tensor {constant.name} must be "
                        f"{_in_words(wanted)}: anything else is not supported"
                    )
    if said.recipe.cache is not None:
        yield from (name for name in tensors.names if name.endswith("kv_cache_offset"))


def _in_words(numbers: np.ndarray) -> str:
    return "all zeros" if not numbers.any() else str(numbers.tolist())


def _missing(
    config: ModelConfig, tensors: Folder, said: Description | None, found: set[str]
) -> str:
    every = (part.name for _, parts in quantised.leaves(config, said) for part in parts)
    absent = list(itertools.islice((name for name in every if name not in tensors.names), 4))
    hint = ""
    if absent[0] == "lm_head.weight":
        hint = " (the config does not tie the embeddings: tie_word_embeddings is false)"
    elif len(found) <= 1:
        hint = " (is this a complete Pangu checkpoint?)"
    return f"{tensors.path}: missing {_listed(absent)}{hint}"


def _extra(extra: list[str], tensors: Folder) -> str:
    hint = ""
    if any(marker in name for marker in V2_TENSORS for name in extra):
        hint = f" (they belong to openPangu-R-72B-2512, PanguProMoE V2; {hf_config.SUPPORTED})"
    return f"{tensors.file_of(extra[0])}: unexpected {_listed(extra)}{hint}"


def _listed(tensor_names: list[str]) -> str:
    shown = ", ".join(strict.shorten(name, quote=False) for name in tensor_names[:3])
    more = f" and {len(tensor_names) - 3} more" if len(tensor_names) > 3 else ""
    return f"tensor{'s' if len(tensor_names) > 1 else ''} {shown}{more}"


def _check_part(part: names.Part, tensors: Folder) -> None:
    entry, where = tensors.entry(part.name), f"{tensors.file_of(part.name)}: tensor {part.name}"
    known = quantised.DTYPES[part.kind]
    if entry.dtype not in known:
        hint = ""
        if part.kind == "float":
            hint = " (quantised weights without a known description are not read)"
        raise CheckpointError(f"{where} is {entry.dtype}; it must be {' or '.join(known)}{hint}")
    if entry.shape != part.shape and not (part.shared and entry.shape == ()):
        raise CheckpointError(
            f"{where} has shape {list(entry.shape)}; config.json says {list(part.shape)}"
        )


def _fill(
    model: Pangu,
    tensors: Folder,
    parts: dict[str, tuple[names.Part, ...]],
    progress: Progress | None,
) -> Pangu:
    """The abstract model with its leaves read, one layer's leaf at a time in host memory."""
    shapes = build.own_shapes(model)
    total = sum(
        tensors.read(part.name).nbytes for leaf_parts in parts.values() for part in leaf_parts
    )
    done = 0

    def read(name: str, own: tuple[int, ...], like: Any) -> Array:
        """own, like: the shape in the files, and the leaf as devices hold it"""
        nonlocal done
        buffer = _aligned(own, like.dtype)
        if not parts[name]:  # a bias that is part of another leaf
            buffer[...] = 0
        written = set()
        for part in parts[name]:
            source = tensors.read(part.name)
            _copy(part, source, buffer[part.index], tensors, part.shared and part.index in written)
            if part.shared:
                written.add(part.index)
            done += source.nbytes
        if progress:
            progress(done, total)
        return jax.device_put(fit.hold(name, buffer, like.shape), like.format)

    def leaf(name: str, like: Any) -> Array:
        layers = build.layer_names(model, name)
        if layers is None:
            return read(name, shapes[name], like)
        blank = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.format)
        put = jax.jit(_put_layer, donate_argnums=0, out_shardings=like.format)
        inner = NamedSharding(model.mesh, PartitionSpec(*like.sharding.spec[1:]))
        one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=inner)
        stack = blank()
        for i, layer in enumerate(layers):
            stack = put(stack, read(layer, shapes[name][1:], one), np.int32(i))
            # One at a time: queued transfers would hold every layer's host buffer at once.
            stack.block_until_ready()
        return stack

    return build.fill(model, leaf)


def _copy(
    part: names.Part, source: np.ndarray, target: np.ndarray, tensors: Folder, again: bool
) -> None:
    """A tensor into its part of a leaf, where (again) another one may have said the same.

    Raises CheckpointError for numbers that cannot be right.
    """
    where = f"{tensors.file_of(part.name)}: tensor {part.name}"
    if part.kind == "packed":
        source = np.ascontiguousarray(source).view(np.uint8)
    source = source.reshape(target.shape)
    if again and (source.astype(target.dtype) != target).any():
        raise CheckpointError(f"{where} must be the same for all parts of one product")
    with np.errstate(over="ignore"):  # what does not fit is found below
        target[...] = source
    if target.dtype == np.float16 and not np.isfinite(target).all():
        raise CheckpointError(f"{where} does not fit float16")
    if part.kind == "scale" and not ((target >= 0) & np.isfinite(target)).all():
        raise CheckpointError(f"{where} has a scale that is negative, infinite or NaN")
    if part.kind == "scale" and part.shared and not target.all():
        raise CheckpointError(f"{where} is 0: nothing could be divided by it")


def _put_layer(stack: Array, layer: Array, index: Array) -> Array:
    return lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which `device_put` can take on a CPU without a
    copy.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
