"""Tiny runs of training: what they read, how they are started, killed, and compared."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from infer import plots
from pangu_jax.model import Pangu
from train import __main__ as door
from train import loop
from train.config import Config
from train.recipe import Recipe
from train.step import Step

ROOT = Path(__file__).parent.parent

TINY = """
vocab_size = 1024
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
intermediate_size = 48
attention_bias = true
tie_embeddings = true
rope_theta = 10_000.0
init_range = 0.05
max_positions = 128
bos_token_id = 1
pad_token_id = 0
eos_token_ids = [15]
dtype = "float32"
"""

TINY_MOGE = """
vocab_size = 1024
hidden_size = 32
num_layers = 1
num_heads = 4
num_kv_heads = 2
head_dim = 8
rope_theta = 10_000.0
init_range = 0.05
max_positions = 128
eos_token_ids = [45]
dtype = "float32"
[moge]
num_experts = 8
num_groups = 4
expert_width = 11
shared_width = 20
"""

# Six steps, a checkpoint after every second.
DENSE_RUN = """
[model]
preset = "{home}/tiny.toml"
tokenizer = "nano"
[data]
path = "{home}/talks.jsonl"
length = 64
batch = 2
[optimizer]
warmup_steps = 2
learning_rate = 1e-2
[run]
output = "{home}/unused"
steps = 6
save_every = 2
"""

# The same with everything that a step can do, and frozen leaves.
MOGE_RUN = """
[model]
preset = "{home}/tiny-moge.toml"
tokenizer = "nano"
[data]
path = "{home}/texts.jsonl"
length = 48
batch = 4
[step]
accumulate = 2
z_loss = 1e-4
balance = 1e-2
[optimizer]
name = "muon"
ema = 0.5
warmup_steps = 2
learning_rate = 1e-2
freeze = ["blocks.*.qkv_bias"]
[run]
output = "{home}/unused"
steps = 6
save_every = 2
"""

# The command and the configuration of each.
KINDS = {
    "dense": ("sft", "run.toml"),
    "text": ("pretrain", "run.toml"),
    "moge": ("pretrain", "moge.toml"),
}

# What differs between two runs that are the same.
TIMED = ("seconds", "tokens_per_s", "tflops", "memory_gb")


def write_home(home: Path) -> Path:
    """Presets, data and configurations."""
    home.mkdir(exist_ok=True)
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + 2?"},
                {"role": "assistant", "thinking": f"{a}+2={a + 2}", "content": f"{a + 2}"},
            ]
        }
        for a in range(30)
    ]
    texts = [{"text": f"The number {a} comes before {a + 1}."} for a in range(40)]
    for name, lines in (("talks", talks), ("texts", texts)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "tiny.toml").write_text(TINY)
    (home / "tiny-moge.toml").write_text(TINY_MOGE)
    (home / "run.toml").write_text(DENSE_RUN.format(home=home))
    (home / "moge.toml").write_text(MOGE_RUN.format(home=home))
    return home


def argv(kind: str, home: Path, output: Path, *flags: str) -> list[str]:
    """The command line of a run; other kinds than these pretrain with the file of that name."""
    command, config = KINDS.get(kind, ("pretrain", f"{kind}.toml"))
    return [command, str(home / config), "--run.output", str(output), *flags]


class SharedRecipe(Recipe):
    """A recipe whose step is the same function for the same configuration and model, so that
    `jax.jit` compiles it once.
    """

    made: ClassVar[dict[Any, Step]] = {}

    def __init__(self, config: Config, model: Pangu) -> None:
        super().__init__(config, model)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(model))
        table = dataclasses.asdict(config)
        said = [table[name] for name in table if name not in ("model", "data", "run", "source")]
        self._key = (repr((said, config.stages)), jax.tree.structure(model), shapes)

    def step(self) -> Step:
        return self.made.setdefault(self._key, super().step())


def start(kind: str, home: Path, output: Path, *flags: str, plot: bool = False) -> int:
    """The exit code of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Recipe", SharedRecipe)
        if not plot:  # half a second each
            patch.setattr(plots, "try_save", lambda make, path: None)
        return door.main(argv(kind, home, output, *flags))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without what depends on the machine."""
    return [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in lines(folder / "metrics.jsonl")
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints."""
    return sorted(int(each.name) for each in (folder / "checkpoints").iterdir())


def numbers(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All that is in a checkpoint, by its path, as Orbax alone reads it."""
    with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        found = reader.restore((folder / "checkpoints" / str(step) / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(one: Path, two: Path) -> None:
    """Two finished runs: every number that they left is the same."""
    assert metrics(one) == metrics(two)
    assert load(one) == load(two)
    for file in (one / "final").iterdir():
        assert file.read_bytes() == (two / "final" / file.name).read_bytes(), file.name
    step = steps(one)[-1]
    wanted = numbers(two, step)
    for name, leaf in numbers(one, step).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name, strict=True)


def load(folder: Path) -> list:
    """The sums of all lines of router.jsonl."""
    found = [np.array(line["load"]) for line in lines(folder / "router.jsonl")]
    return sum(found[1:], found[0]).tolist() if found else []


def same_programs() -> dict[str, str]:
    """The environment in which other processes compile as this one does: to the same bits."""
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}


PROGRAM = """
import fnmatch, json, os, signal, sys, threading, warnings

import grain, jax, orbax.checkpoint

from infer import door as doors, plots
from train import __main__ as door, loop, pretrain, sft

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
plots.try_save = lambda make, path: None


def strike(sign, pattern, number, seconds):
    left = number

    def hook(event, arguments):
        nonlocal left
        if event not in EVENTS or (event == "open" and not arguments[2] & WRITING):
            return
        if any(isinstance(a, str) and fnmatch.fnmatch(a, pattern) for a in map(text, arguments)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), sign)

    if seconds is None:
        sys.addaudithook(hook)
    else:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), sign))
        timer.daemon = True
        timer.start()


def text(argument):
    return os.fsdecode(argument) if isinstance(argument, (bytes, os.PathLike)) else argument


while line := sys.stdin.readline():
    argv, said, *when = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        strike(*when)
        doors.leave(lambda: door.main(argv))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Starts the program itself, as often as asked (a fork of one that has imported everything),
    and sends it a signal at a moment.
    """

    def __init__(self, folder: Path) -> None:
        """folder: for compiled programs and what is said"""
        env = {
            **same_programs(),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        self.said = folder / "said.txt"
        self._program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Killer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._program.communicate()

    def __call__(
        self,
        argv: list[str],
        sign: int = signal.SIGKILL,
        *,
        at: str = "",
        number: int = 1,
        seconds: float | None = None,
    ) -> int:
        """The exit code of a command that is sent a signal: when it touches the path `at` (with
        `*`) for that time (creates, opens to write, renames or removes it), or after `seconds`.
        """
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        when = (int(sign), at, number, seconds)
        self._program.stdin.write(json.dumps([argv, str(self.said), *when]) + "\n")
        self._program.stdin.flush()
        return int(self._program.stdout.readline())
