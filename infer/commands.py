"""The commands of `pangu-infer`.

No JAX here: this is read before the command line is understood.
"""

import dataclasses
from typing import Literal

from infer.cli import flag
from pangu_jax.config import DType

FormName = Literal["separate", "stacked"]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate from a checkpoint folder.

    Settings that are not given come from the folder's generation_config.json.
    """

    model: str = flag("Hugging Face model folder", metavar="DIR")
    prompt_ids: tuple[int, ...] = flag("the prompt as token ids, such as 1,5,9", metavar="N,N,...")
    max_new_tokens: int | None = flag("the most tokens to generate (else 128)", None)
    temperature: float | None = flag("0 is greedy", None)
    top_k: int | None = flag("sample among the k likeliest tokens; 0 is off", None)
    top_p: float | None = flag("sample among the likeliest tokens reaching this probability", None)
    seed: int | None = flag("makes sampling repeatable", None)
    stop_token_ids: tuple[int, ...] = flag("also stop at these ids", ())
    ignore_eos: bool = flag("do not stop at the model's end tokens", False)
    dtype: DType | None = flag("dtype of weights and activations (else the folder's)", None)
    layout: str | None = flag("a layout's name or TOML file", None, metavar="NAME")
    form: FormName | None = flag("layer form (else by platform)", None)
    json: bool = flag("print one JSON object on stdout", False)


@dataclasses.dataclass(frozen=True)
class Check:
    """Check a checkpoint folder: names, shapes, counts, values, a few greedy tokens.

    Prints a report to paste. Exit code 0 when all is well, 1 when something is wrong.
    """

    model: str = flag("Hugging Face model folder", metavar="DIR")
    skip_run: bool = flag("do not load the model and generate", False)
    json: bool = flag("print one JSON object on stdout", False)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Write small random checkpoints, check them and generate from them: needs no weights and no
    network.
    """

    output: str = flag("folder for the checkpoints", "runs/demo", metavar="DIR")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure prefill and decode speed against the bounds of this machine.

    Bandwidth and FLOP bounds are measured in the same run. A preset's weights are random.
    """

    model: str = flag("model folder, or the name or TOML file of a preset", metavar="DIR|NAME")
    dtype: DType | None = flag("dtype of weights and activations (else the model's)", None)
    form: FormName | None = flag("layer form (else by platform)", None)
    prompt: int = flag("tokens of each prompt", 512)
    tokens: int = flag("tokens to decode", 32)
    batch: int = flag("prompts at a time", 1)
    repeats: int = flag("timed repetitions", 3)
    json: bool = flag("print one JSON object on stdout", False)


COMMANDS = {"generate": Generate, "check": Check, "bench": Bench, "demo": Demo}
HANDLERS = {
    "Bench": "infer.bench:run",
    "Generate": "infer.answer:run",
    "Check": "infer.check:run",
    "Demo": "infer.demo:run",
}
