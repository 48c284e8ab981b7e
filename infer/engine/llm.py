"""The door to the engine: prompts in, completions out, all at once or as they come.

with infer.LLM("openPangu-Embedded-1B") as llm:
    llm.generate(["Why is the sky blue?", [1, 5, 9]], infer.Sampling(max_new_tokens=64))
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pangu_jax
from infer import inputs, loading
from infer.engine import sizes
from infer.engine.engine import Engine, Ticket
from infer.engine.sizes import Wish
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.parallel.layout import Layout
from pangu_jax.quant.scheme import CacheNumbers
from pangu_jax.text.tokenizer import Tokenizer


class LLM:
    """A model that many can ask at once.

    model: a Hugging Face folder, or a loaded model
    tokenizer: for a loaded model; a folder brings its own, if it has one
    dtype, layout, form: of a folder's model, as for `pangu_jax.load`
    cache: "int8" halves the KV cache
    slots: requests at a time, of each replica of attention
    context: tokens of a request at most; None is what the model has and memory allows
    memory: bytes of keys and values on each device; None is what is left
    deterministic: what a request gets does not depend on the others, to the last bit; slower

    Programs are compiled when they are needed first; `warm_up` compiles them all. Close it (or use
    it in a `with`) when it is done. Raises CheckpointError, ConfigError.
    """

    def __init__(
        self,
        model: str | Path | Pangu,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: Any = None,
        layout: str | Layout | None = None,
        form: Any = None,
        cache: CacheNumbers | None = None,
        slots: int = 64,
        context: int | None = None,
        memory: int | None = None,
        deterministic: bool = False,
    ) -> None:
        if not isinstance(model, Pangu):
            folder = Path(model)
            model = pangu_jax.load(folder, dtype, layout, form)
            tokenizer = tokenizer or loading.tokenizer(folder, model.config)
        if cache is not None:
            model = build.with_cache(model, cache)
        shape = sizes.fitting(model, Wish(slots, context, memory, deterministic=deterministic))
        self.engine = Engine(model, shape, tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if there is one."""
        return self.engine.tokenizer

    def warm_up(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compiles every program, before the first request; `say` is told what comes next."""
        if self.engine.started:
            raise InputError("warm_up comes before the first request")
        for line in self.engine.warm_up():
            say(line)

    def submit(
        self, prompt: str | Sequence[int] | np.ndarray, sampling: Sampling | None = None, **how: Any
    ) -> list[Ticket]:
        """Tickets for a prompt of text or ids; `how` as for `Engine.submit`."""
        self.engine.start()
        return self.engine.submit(self._ids(prompt), sampling, **how)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress: Callable[[Completion], None] = lambda completion: None,
    ) -> list[Completion]:
        """The completions of all prompts, in order; `sampling.n` in a row for each.

        sampling: for all prompts, or one for each; None is greedy
        progress: called with each completion, in order
        Raises InputError before anything is generated.
        """
        config = self.engine.model.config
        ids = [inputs.check_prompt(config, self._ids(prompt)) for prompt in prompts]
        settings = inputs.settings(sampling, len(ids), config, self.tokenizer)
        for pair in zip(ids, settings, strict=True):
            self.engine.check(*pair)
        tickets: list[Ticket] = []
        try:
            for pair in zip(ids, settings, strict=True):
                tickets += self.submit(*pair)
            completions = []
            for ticket in tickets:
                completions.append(ticket.result())
                progress(completions[-1])
        except BaseException:
            for ticket in tickets:
                self.cancel(ticket)
            raise
        return completions

    async def stream(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        seconds: float = math.inf,
        tenant: str = "",
    ) -> AsyncIterator[str | Completion]:
        """The text of one completion as it becomes certain; its Completion last.

        Whoever stops listening cancels the request. Arguments as for `Engine.submit`.
        """
        if sampling is not None and sampling.n != 1:
            raise InputError("n must be 1 in a stream")
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()

        def told(text: str, end: Completion | BaseException | None) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, (text, end))

        how: dict[str, Any] = dict(priority=priority, seconds=seconds, tenant=tenant, told=told)
        (ticket,) = self.submit(prompt, sampling, **how)
        try:
            end = None
            while end is None:
                text, end = await heard.get()
                if text:
                    yield text
            if isinstance(end, BaseException):
                raise RuntimeError("the engine stopped") from end
            yield end
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request as it is; nothing if it has ended, or the engine has."""
        try:
            self.engine.cancel(ticket)
        except RuntimeError:
            pass

    def close(self) -> None:
        """Gives up what is not done yet, and stops."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, prompt: str | Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InputError("a prompt of text needs a tokenizer; give token ids")
        return self.tokenizer.encode(prompt)
