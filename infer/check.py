"""The `check` command: is this folder the model it says it is, whole and sane?"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import pangu_jax
from infer import generation, loading, progress
from infer.commands import Check
from infer.sampling import Sampling
from pangu_jax.checkpoint import hf, names, native
from pangu_jax.checkpoint.folder import Folder
from pangu_jax.config import ModelConfig
from pangu_jax.errors import PanguError
from pangu_jax.text.tokenizer import Tokenizer

GREEDY_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool
    what: str
    detail: str


def run(command: Check) -> int:
    """Prints the report; 1 when any finding is bad, which also ends it: later ones would rest on
    it.
    """
    findings = []
    for finding in inspect(Path(command.model), command.skip_run):
        findings.append(finding)
        if not command.json:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<13} {finding.detail}")
    good = all(finding.ok for finding in findings)
    if command.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"model": command.model, "ok": good, "findings": rows}))
    return 0 if good else 1


def inspect(folder: Path, skip_run: bool = False) -> Iterator[Finding]:
    """The findings in order of dependence, up to the first that is bad."""
    stage = "config"
    try:
        folder = native.published(folder)
        config, raw = hf.read_config(folder)
        yield Finding(True, stage, describe(config, raw.get("model_type", "?")))
        stage = "tokenizer"
        if (tokenizer := loading.tokenizer(folder, config)) is not None:
            yield Finding(True, stage, _describe_tokenizer(tokenizer, config))
        stage = "tensors"
        tensors = Folder(folder)
        said = hf.read_description(tensors, raw, config)
        parts = hf.check_tensors(config, tensors, said)
        yield Finding(True, stage, _count(tensors, parts))
        exact = f"{config.num_parameters:,}, {config.num_active_parameters:,} active per token"
        yield Finding(True, "parameters", exact)
        stage = "values"
        scales = np.zeros(0)
        with progress.reading("checking values") as advance:
            worst, scales = _check_values(tensors, parts, advance)
        yield worst
        if config.moge is not None and worst.ok:
            yield _check_router_scale(scales)
        if not worst.ok or skip_run:
            return
        stage = "generation"
        yield _run_greedy(folder, config)
    except PanguError as error:
        yield Finding(False, stage, str(error))


def describe(config: ModelConfig, model_type: str) -> str:
    """The network in one line."""
    if config.moge is not None:
        m = config.moge
        mlp = f"{m.num_experts} experts in {m.num_groups} groups, width {m.expert_width}"
    else:
        mlp = f"FFN {config.intermediate_size}"
    return (
        f"{model_type}: {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, {mlp}, "
        f"vocabulary {config.vocab_size}, {config.dtype}"
    )


def _describe_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> str:
    spell = lambda id: f"{tokenizer.token(id)} ({id})" if id is not None else "none"
    ends = ", ".join(spell(id) for id in config.eos_token_ids) or "none"
    template = "its own" if tokenizer.chat_template else "none of its own"
    return (
        f"{tokenizer.vocab_size} tokens, BOS {spell(tokenizer.bos_id)}, ends {ends}; "
        f"chat template: {template}"
    )


def _count(tensors: Folder, parts: dict[str, tuple[names.Part, ...]]) -> str:
    used = [part.name for leaf_parts in parts.values() for part in leaf_parts]
    files = {tensors.file_of(name) for name in tensors.names}
    dtypes = sorted({tensors.entry(name).dtype for name in used})
    ignored = len(tensors.names) - len(used)
    note = (
        f", {ignored} ignored (inv_freq, a tied head, or what says nothing new)" if ignored else ""
    )
    plural = "s" if len(files) > 1 else ""
    return f"{len(used)} as expected, {', '.join(dtypes)}, in {len(files)} file{plural}{note}"


def _check_values(
    tensors: Folder, parts: dict[str, tuple[names.Part, ...]], advance: progress.Advance
) -> tuple[Finding, np.ndarray]:
    """Whether all numbers are finite and no matrix is zero; also every router_scale."""
    kinds = ("float", "scale", "fp8")  # of integers nothing can be said
    every = [part for own in parts.values() for part in own if part.kind in kinds]
    total = sum(tensors.read(part.name).nbytes for part in every)
    done, largest, scales = 0, 0.0, []
    for part in every:
        values = tensors.read(part.name)
        biggest = 0.0
        for piece in _pieces(values):
            wide = piece.astype(np.float32)
            if not np.isfinite(wide).all():
                bad = int((~np.isfinite(wide)).sum())
                detail = f"{tensors.file_of(part.name)}: tensor {part.name} holds {bad} NaN or Inf"
                return Finding(False, "values", detail), np.zeros(0)
            if part.kind == "scale" and (wide < 0).any():
                detail = f"{tensors.file_of(part.name)}: tensor {part.name} has a negative scale"
                return Finding(False, "values", detail), np.zeros(0)
            biggest = max(biggest, float(np.abs(wide).max()))
        if biggest == 0.0 and part.kind == "float" and not part.name.endswith(".bias"):
            detail = f"{tensors.file_of(part.name)}: tensor {part.name} is all zeros"
            return Finding(False, "values", detail), np.zeros(0)
        if part.name.endswith("router_scale"):
            scales.append(values.astype(np.float32).reshape(-1))
        largest = max(largest, biggest)
        done += values.nbytes
        advance(done, total)
    finding = Finding(True, "values", f"all finite, the largest is {largest:.4g}")
    return finding, np.concatenate(scales) if scales else np.zeros(0)


def _pieces(values: np.ndarray, limit: int = 2**24) -> Iterator[np.ndarray]:
    """Views of at most `limit` numbers: checking an embedding must not take its size again."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, limit):
        yield flat[start : start + limit]


def _check_router_scale(scales: np.ndarray) -> Finding:
    low, mean, high = scales.min(), scales.mean(), scales.max()
    note = "; all ones, as in a model that was never trained" if low == high == 1 else ""
    return Finding(True, "router_scale", f"{low:.4g} to {high:.4g}, mean {mean:.4g}{note}")


def _run_greedy(folder: Path, config: ModelConfig) -> Finding:
    model = pangu_jax.load(folder)
    prompt = [config.bos_token_id if config.bos_token_id is not None else 0]
    (completion,) = generation.generate(model, [prompt], Sampling(GREEDY_TOKENS, ignore_eos=True))
    if not np.isfinite(completion.logprobs).all():
        return Finding(False, "generation", "the logits are not finite")
    return Finding(True, "generation", f"{prompt} -> {completion.token_ids} (greedy)")
