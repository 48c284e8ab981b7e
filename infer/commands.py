"""The commands of `pangu-infer`.

No JAX here: this is read before the command line is understood.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from infer.cli import flag
from pangu_jax.config import DType
from pangu_jax.quant.scheme import CacheNumbers, RecipeName

FormatName = Literal["compressed-tensors", "msmodelslim"]
FormName = Literal["separate", "stacked"]
Think = Literal["fast", "slow", "auto"]


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it is held."""

    model: str = flag("Hugging Face model folder", metavar="DIR")
    dtype: DType | None = flag("dtype of weights and activations (else the folder's)", None)
    layout: str | None = flag("a layout's name or TOML file", None, metavar="NAME")
    form: FormName | None = flag("layer form (else by platform)", None)
    cache: CacheNumbers | None = flag("int8 halves the KV cache (else the dtype's numbers)", None)
    voted_experts: int | None = flag(
        "LOSSY: use only so many experts of each group, the most wanted of all tokens of a call",
        None,
    )


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen, and where answers end: the fields of `infer.Sampling`.

    None is "not given": the folder's generation_config.json decides, then the field's default.
    """

    max_new_tokens: int | None = flag("the most tokens to generate", None)
    temperature: float | None = flag("0 is greedy", None)
    top_k: int | None = flag("sample among the k likeliest tokens; 0 is off", None)
    top_p: float | None = flag("sample among the likeliest tokens reaching this probability", None)
    min_p: float | None = flag("sample among tokens this fraction as likely as the likeliest", None)
    repetition_penalty: float | None = flag("above 1: fewer tokens that were there before", None)
    presence_penalty: float | None = flag("above 0: fewer tokens of the answer so far", None)
    frequency_penalty: float | None = flag("the same, for every time they are there", None)
    logit_bias: Mapping[int, float] | None = flag("added to logits, such as 15:-100,7:2.5", None)
    seed: int | None = flag("makes sampling repeatable", None)
    stop_token_ids: tuple[int, ...] | None = flag("also stop at these ids", None)
    stop: tuple[str, ...] | None = flag("also stop at this text; may be given again", None)
    ignore_eos: bool = flag("do not stop at the model's end tokens", False)
    thinking_budget: int | None = flag("the most tokens of thinking before it is closed", None)


@dataclasses.dataclass(frozen=True)
class Generate(SamplingFlags, ModelFlags):
    """Generate from a checkpoint folder: one prompt, or a file of them.

    Give --prompt, --prompt-ids or --input. A line of --input is a JSON object with "prompt",
    "prompt_ids" or "messages" (then also "tools" and "think"), and maybe "sampling"; its line of
    --output has the same fields and "completions". The same command again goes on where it stopped.
    Settings that are not given come from the folder's generation_config.json.
    """

    prompt: str | None = flag("the prompt as text", None)
    prompt_ids: tuple[int, ...] | None = flag("the prompt as token ids, such as 1,5,9", None)
    input: str | None = flag("JSON lines with prompts", None, metavar="FILE")
    output: str | None = flag("JSON lines with their completions", None, metavar="FILE")
    batch: int = flag("prompts of --input at a time", 64)
    chat: bool = flag("--prompt is a user's message: use the chat template", False)
    system: str | None = flag("system message of a chat", None)
    think: Think | None = flag("how a chat's message is to be answered", None)
    n: int | None = flag("completions of every prompt", None)
    top_logprobs: int | None = flag("report so many likeliest tokens of every position", None)
    json: bool = flag("print one JSON object on stdout", False)


@dataclasses.dataclass(frozen=True)
class Chat(SamplingFlags, ModelFlags):
    """Talk to a model in the terminal.

    Ctrl-C stops an answer, a second one leaves. When piped, every line of stdin is a message and
    only answers go to stdout. Settings that are not given come from the folder's
    generation_config.json; an answer may be as long as the model's positions allow.
    """

    system: str | None = flag("system message", None)
    think: Think | None = flag("fast, slow, or what the model thinks best; see /think", None)


@dataclasses.dataclass(frozen=True)
class Check:
    """Check a checkpoint folder: names, shapes, counts, values, a few greedy tokens.

    Prints a report to paste. Exit code 0 when all is well, 1 when something is wrong.
    """

    model: str = flag("Hugging Face model folder", metavar="DIR")
    skip_run: bool = flag("do not load the model and generate", False)
    json: bool = flag("print one JSON object on stdout", False)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure prefill and decode speed against the bounds of this machine.

    Bandwidth and FLOP bounds are measured in the same run. A preset's weights are random. --peer
    and --ablate measure several programs in turn, which choose the same tokens (those of quantised
    models apart).
    """

    model: str = flag("model folder, or the name or TOML file of a preset", metavar="DIR|NAME")
    dtype: DType | None = flag("dtype of weights and activations (else the model's)", None)
    form: FormName | None = flag("layer form (else by platform)", None)
    recipe: RecipeName | None = flag("round the matrices first", None)
    cache: CacheNumbers | None = flag("int8 halves the KV cache", None)
    prompt: int = flag("tokens of each prompt", 512)
    tokens: int = flag("tokens to decode", 32)
    batch: int = flag("prompts at a time", 1)
    repeats: int = flag("timed repetitions", 3)
    engine: bool = flag("measure the engine: --batch requests at a time against one", False)
    peer: bool = flag("the same weights in Transformers and llama.cpp too, if installed", False)
    ablate: bool = flag("our optimisations one by one, from a naive program on", False)
    json: bool = flag("print one JSON object on stdout", False)


@dataclasses.dataclass(frozen=True)
class Warmup(ModelFlags):
    """Compile all programs of the engine, so that the next start finds them on disk.

    They are kept for this model's shapes, these settings, this machine and this version of JAX.
    """

    slots: int = flag("requests at a time, of each replica of attention", 64)
    context: int | None = flag("tokens of a request at most (else what fits)", None)


@dataclasses.dataclass(frozen=True)
class Eval(ModelFlags):
    """Measure accuracy on problems with one exact answer, by task, difficulty and thinking mode.

    A line of --tasks is a JSON object with "messages" and "answer", and maybe "task" and
    "difficulty" (0 to 99). Decoding is greedy. An answer is right when it equals the expected one,
    white space apart, and is not cut off by --max-new-tokens.
    """

    tasks: str = flag("JSON lines with problems", metavar="FILE")
    think: str = flag("modes to compare: of fast, slow and auto", "fast,slow", metavar="MODE,...")
    batch: int = flag("prompts at a time", 64)
    max_new_tokens: int = flag("the most tokens to generate", 512)
    json: bool = flag("print one JSON object on stdout", False)
    output: str | None = flag("write the JSON object to a file", None, metavar="FILE")
    answers: str | None = flag("write every answer as a JSON line", None, metavar="FILE")
    plot: str | None = flag("draw accuracy by difficulty: .png or .svg", None, metavar="FILE")


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Round the matrices of a float checkpoint to nearest, layer by layer, in little memory.

    w8a8: int8 weights and activations; w8a16: int8 weights; w4a16: int4 weights in groups; fp8:
    weights and activations. Router, norms, embedding and head stay as they are. The same command
    again goes on where it stopped; the output folder appears when it is complete.
    """

    model: str = flag("float Hugging Face model folder", metavar="DIR")
    output: str = flag("the folder to write", metavar="DIR")
    recipe: RecipeName = flag("what the matrices become", "w8a8")
    format: FormatName = flag("whose words describe it", "compressed-tensors")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan generation on a machine you do not have: memory, collectives, the most tokens/s.

    By formula, and by the target's own compiler where it is installed (pangu-jax[tpu], [gpu]).
    Nothing runs: everything is planned, not measured. With several layouts, dtypes, batches or
    contexts: one row each, by formula.
    """

    model: str = flag("model folder, or the name or TOML file of a preset", metavar="DIR|NAME")
    target: str = flag("such as v5p:2x2x2, v5e:4x4, h200:8, h200:2x8, or FILE.toml:8")
    layout: tuple[str, ...] = flag("a layout's name or TOML file; may be given again", ())
    dtype: tuple[str, ...] = flag("of weights and activations; may be given again", ())
    recipe: tuple[str, ...] = flag("quantised matrices; may be given again", ())
    cache: CacheNumbers | None = flag("int8 halves the KV cache", None)
    batch: tuple[int, ...] = flag("sequences decoded at a time, such as 64,128,256", (1,))
    context: tuple[int, ...] = flag("tokens of each sequence, such as 2048,8192", (2048,))
    prompts: int | None = flag("prompts read at a time (else one per replica of attention)", None)
    phase: Literal["decode", "prefill"] | None = flag("only one of the two programs", None)
    form: FormName | None = flag("layer form (else by platform)", None)
    formulas: bool = flag("compile nothing", False)
    json: bool = flag("print one JSON object on stdout", False)
    plot: str | None = flag("draw memory and times: .png or .svg", None, metavar="FILE")


COMMANDS = {
    "chat": Chat,
    "generate": Generate,
    "check": Check,
    "eval": Eval,
    "bench": Bench,
    "plan": Plan,
    "quantize": Quantize,
    "warmup": Warmup,
}
HANDLERS = {
    "Bench": "infer.bench.command:run",
    "Chat": "infer.chat:run",
    "Generate": "infer.answer:run",
    "Check": "infer.check:run",
    "Eval": "infer.evaluation.command:run",
    "Plan": "infer.plan.command:run",
    "Quantize": "infer.quantize:run",
    "Warmup": "infer.engine.command:run",
}
