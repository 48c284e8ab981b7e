"""The `demo` command: a nano Pangu learns to think fast and slow, and is examined."""

import json
import shlex
import sys
import time
from pathlib import Path

import jax

import pangu_jax
from infer import evaluation, files, plots, progress
from infer.evaluation import problems, report, score
from infer.evaluation.score import Answer, Evaluation
from infer.progress import say
from pangu_jax.text.tokenizer import Tokenizer
from train import config as configs
from train import loop, sft, tasks
from train.commands import Demo
from train.config import Config
from train.tasks import files as task_files

KINDS = {"nano": "dense, as openPangu-Embedded", "nano-moge": "MoGE, as Pangu Pro MoE"}

# Own choices: examples for every step, about as many as it takes; questions of each task and
# difficulty, and how many are asked at a time; more tokens than any worked answer has.
EXAMPLES, HELD_OUT, BATCH, MOST = 20, 40, 80, 160

# The upper difficulties of train.tasks.
HARD = (3, 4)


def run(command: Demo) -> int:
    """Data, training, evaluation, a sample; what is there already is not done again."""
    start = time.perf_counter()
    folder = Path(command.output) / f"{command.model}-{command.seed}"
    config = configuration(command, folder)
    _introduce(command)
    examples = EXAMPLES * config.run.steps
    counts = task_files.write(
        folder / "tasks", tuple(tasks.TASKS), examples, HELD_OUT, command.seed
    )
    say(
        f"{counts[task_files.TRAINING]:,} examples; {counts[task_files.HELD_OUT]:,} questions are "
        "held out"
    )
    if code := loop.train(config, sft.READER):
        return code
    say(f"{time.perf_counter() - start:,.0f} s so far; now the questions it never saw")
    final = Path(config.run.output) / "final"
    found = _evaluate(final, folder)
    report.show(found)
    for line in (*_margin(found), "", *_sample(found)):
        print(line)
    sys.stdout.flush()
    say(
        f"\n{time.perf_counter() - start:,.0f} s in all; more in {folder}. Ask it more of the same "
        "kind, one question at a time (/reset makes it forget the last):\n"
        f"  {_program()} chat --model {shlex.quote(str(final))} --think slow"
    )
    return 0


def configuration(command: Demo, folder: Path) -> Config:
    """The model's recipe in configs/train, with this demo's data and folder."""
    overrides = {
        "data": {"path": str(folder / "tasks" / task_files.TRAINING)},
        "run": {"output": str(folder / "run"), "seed": command.seed},
    }
    return configs.load(command.model, overrides)


def _introduce(command: Demo) -> None:
    device = jax.devices()[0]
    parameters = pangu_jax.preset(command.model).num_parameters
    say(f"pangu_jax {pangu_jax.__version__} on {device.platform} ({device.device_kind})")
    say(f"{command.model}, {KINDS[command.model]}: {parameters:,} random parameters")
    say(f"are to learn {', '.join(tasks.TASKS)}: answered at once (fast) or thought out (slow)")


def _evaluate(final: Path, folder: Path) -> Evaluation:
    """The answers to the held-out questions; also eval.json, answers.jsonl and accuracy.png."""
    model, tokenizer = pangu_jax.load(final), Tokenizer.load(final)
    asked = problems.read(folder / "tasks" / task_files.HELD_OUT)
    with progress.answering(2 * len(asked), 0) as advance:
        found = evaluation.evaluate(
            model, tokenizer, asked, batch=BATCH, max_new_tokens=MOST, progress=advance
        )
    text = json.dumps({"model": str(final), **found.as_json()}, ensure_ascii=False)
    files.write(folder / "eval.json", text.encode())
    files.write(folder / "answers.jsonl", found.answers_as_lines().encode())
    plots.try_save(lambda: report.figure(found), folder / "accuracy.png")
    return found


def _margin(found: Evaluation) -> list[str]:
    """How the modes do on hard problems."""
    lines = []
    for mode in ("fast", "slow"):
        hard = [
            each
            for each in found.scores
            if each.mode == mode and each.task is None and each.difficulty in HARD
        ]
        if (whole := score.merge(hard)) is not None:
            low, high = whole.interval
            lines.append(
                f"difficulty {HARD[0]} and more, {mode}: {whole.accuracy:.1%} right "
                f"[{low:.1%}, {high:.1%}] of {whole.n:,}"
            )
    return lines


def _sample(found: Evaluation) -> list[str]:
    """The first question of the last difficulty of every task, answered both ways; not chosen by
    the result.
    """
    lines = []
    for task in tasks.TASKS:
        hardest = [a for a in found.answers if (a.task, a.difficulty) == (task, HARD[-1])]
        first = {a.mode: a for a in reversed(hardest)}
        if {"fast", "slow"} <= set(first):
            fast, slow = first["fast"], first["slow"]
            lines += [
                f"you   {fast.question}",
                f"fast  {fast.answer}  {_verdict(fast)}",
                f"slow  ({slow.thinking})",
                f"      {slow.answer}  {_verdict(slow)}",
            ]
    return [progress.printable(line) for line in lines]


def _verdict(answer: Answer) -> str:
    return "✓" if answer.correct else f"✗ it is {answer.expected}"


def _program() -> str:
    """pangu-infer as it lies beside this program, for a command to copy."""
    beside = Path(sys.argv[0]).with_name("pangu-infer")
    return shlex.quote(str(beside)) if beside.is_file() else "python -m infer"
