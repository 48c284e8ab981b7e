"""A model and problems in, answers and their scores out."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax import monitoring

from infer import generation, inputs
from infer.evaluation import score
from infer.evaluation.problems import Problem
from infer.evaluation.score import Answer, Evaluation, Speed
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax.config import ModelConfig
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text import chat, markers, parse
from pangu_jax.text.markers import Markers, Think
from pangu_jax.text.tokenizer import Tokenizer

# What JAX calls the making of a program, or the reading of one from its cache on disk.
COMPILED = "/jax/core/compile/backend_compile_duration"


def evaluate(
    model: Pangu,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    modes: Sequence[Think] = ("fast", "slow"),
    *,
    batch: int = 64,
    max_new_tokens: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Greedy answers to every problem in every mode, with their scores.

    The model stays in its form: separate layers decode fastest on CPU and GPU (`convert`).

    progress: called with the tokens of every answer
    Raises InputError for a prompt that does not fit the model.
    """
    prompts = encode(model.config, tokenizer, problems, modes)
    return answer(model, tokenizer, prompts, Sampling(max_new_tokens), batch, progress)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem as the model gets it."""

    problem: Problem
    mode: Think
    ids: np.ndarray


def encode(
    config: ModelConfig, tokenizer: Tokenizer, problems: Sequence[Problem], modes: Sequence[Think]
) -> list[Prompt]:
    """The prompts of every problem, mode by mode. Raises InputError, naming the problem."""
    marks, prompts = markers.of(tokenizer), []
    for mode in modes:
        for problem in problems:
            ids = chat.encode(tokenizer, problem.messages, think=mode, markers=marks)
            try:
                prompts.append(Prompt(problem, mode, inputs.check_prompt(config, ids)))
            except InputError as error:
                raise InputError(f"{problem.where}: {error}") from None
    if not prompts:
        raise InputError("there are no problems to answer")
    return prompts


def answer(
    model: Pangu,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The answers to prompts, in their order, with their scores; arguments as for `evaluate`."""
    marks = markers.of(tokenizer)
    answers: dict[int, Answer] = {}
    calls: list[_Call] = []
    for group in _batches(prompts, batch):
        asked = [prompts[i].ids for i in group]
        with _compilations() as compiled:
            start = time.perf_counter()
            completions = generation.generate(model, asked, sampling, tokenizer=tokenizer)
            seconds = time.perf_counter() - start
        tokens = [len(completion.token_ids) for completion in completions]
        calls.append(_Call(prompts[group[0]].mode, sum(tokens), seconds, bool(compiled)))
        for i, completion in zip(group, completions, strict=True):
            answers[i] = _judge(prompts[i], completion, marks)
            if progress:
                progress(answers[i].tokens)
    ordered = tuple(answers[i] for i in range(len(prompts)))
    speed = tuple(_speed(mode, calls) for mode in _modes_of(prompts))
    return Evaluation(score.tally(ordered), speed, ordered, sampling.max_new_tokens)


def _modes_of(prompts: Sequence[Prompt]) -> list[Think]:
    """The modes, as they first come."""
    return list({prompt.mode: None for prompt in prompts})


def _batches(prompts: Sequence[Prompt], batch: int) -> Iterator[list[int]]:
    """The prompts' numbers in groups of one mode each, of nearly equal size, so that few shapes are
    compiled.

    Within a group, prompts are padded alike, and come from the same tasks and difficulties if
    possible: their answers are about as long, so that few rows wait for the last one.
    """

    def like(i: int) -> tuple[int, str, int]:
        width = inputs.bucket(prompts[i].ids.size, inputs.SMALLEST_PROMPT)
        return width, prompts[i].problem.task, prompts[i].problem.difficulty

    for mode in _modes_of(prompts):
        order = sorted((i for i, prompt in enumerate(prompts) if prompt.mode == mode), key=like)
        groups = -(-len(order) // batch)
        for group in range(groups):
            yield order[len(order) * group // groups : len(order) * (group + 1) // groups]


def _judge(prompt: Prompt, completion: Completion, marks: Markers) -> Answer:
    reply = parse.parse(completion.text or "", prompt.mode, marks)
    problem = prompt.problem
    return Answer(
        problem.task,
        problem.difficulty,
        prompt.mode,
        problem.question,
        problem.answer,
        reply.answer,
        reply.thinking,
        len(completion.token_ids),
        completion.finish_reason == "length",
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of `generate`, and whether programs were compiled in it."""

    mode: Think
    tokens: int
    seconds: float
    compiled: bool


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """A list that gets an item for every program that JAX makes within."""
    heard: list[str] = []

    def hear(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            heard.append(event)

    monitoring.register_event_duration_secs_listener(hear)
    try:
        yield heard
    finally:
        monitoring.unregister_event_duration_listener(hear)


def _speed(mode: Think, calls: Sequence[_Call]) -> Speed:
    mine = [call for call in calls if call.mode == mode]
    cold = [call for call in mine if call.compiled]
    tokens = lambda calls: sum(call.tokens for call in calls)
    seconds = lambda calls: sum((call.seconds for call in calls), 0.0)
    return Speed(mode, tokens(mine), seconds(mine), tokens(cold), seconds(cold))
