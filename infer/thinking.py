"""The thinking budget: a thought that grows too long is closed by its end marker.

The marker is chosen in place of the token the model would have drawn, so that the answer follows
from the thought as it does in training. Text cut in the middle of a sentence never comes before a
marker there: in the last eighth of the budget the first end of a sentence or line closes the
thought, and only where none comes is it closed at the budget itself (own choice).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pangu_jax.errors import InputError
from pangu_jax.pytree import pytree
from pangu_jax.text import markers
from pangu_jax.text.tokenizer import Tokenizer

SENTENCE_ENDS = ("。", "！", "？", "；", ".", "!", "?", ";", "\n", "<0x0A>")
NO_BUDGET = 2**30
NOT_THINKING = -1


@pytree
class Budget:
    """What closes thoughts, for every row of a batch.

    limit: the most tokens between the markers, of each thought
    ends_sentence: whether a token ends a sentence or line
    """

    limit: Int[Array, " B"]
    start: Int[Array, ""]
    end: Int[Array, ""]
    ends_sentence: Bool[Array, " V"]

    def closes(self, used: Int[Array, " B"], last: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Whether the next token must be the end marker.

        used: tokens of the open thought, NOT_THINKING where there is none
        last: the token before
        """
        soft = self.limit - self.limit // 8
        at_end = self.ends_sentence[jnp.maximum(last, 0)]
        return (used >= self.limit) | ((used >= soft) & at_end & (used > 0))

    def count(self, used: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        """Tokens of the open thought after one more token."""
        going_on = jnp.where(used >= 0, used + 1, NOT_THINKING)
        return jnp.where(
            token == self.end,
            NOT_THINKING,
            jnp.where((token == self.start) & (used < 0), 0, going_on),
        )


def budget(tokenizer: Tokenizer, limits: list[int | None], vocab: int) -> Budget:
    """The budget of rows with these limits. Raises InputError if the tokenizer has no markers."""
    start, end = marker_ids(tokenizer, vocab)
    return Budget(
        jnp.asarray([NO_BUDGET if limit is None else limit for limit in limits], jnp.int32),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(end, jnp.int32),
        jnp.asarray(_ends_sentence(tokenizer, vocab)),
    )


def marker_ids(tokenizer: Tokenizer, vocab: int) -> tuple[int, int]:
    """The ids that open and close a thought. Raises InputError if there are none."""
    named = markers.of(tokenizer)
    start, end = tokenizer.id(named.think_start), tokenizer.id(named.think_end)
    if start is None or end is None or max(start, end) >= vocab:
        raise InputError("thinking_budget: the model and its tokenizer have no thinking markers")
    return start, end


def used_in_prompt(budget: Budget, prompt: np.ndarray) -> int:
    """0 when the prompt leaves a thought open, else NOT_THINKING."""
    return used_so_far(int(budget.start), int(budget.end), prompt.tolist(), prompt.size)


def used_so_far(start: int, end: int, tokens: list[int], prompt: int) -> int:
    """What `Budget.count` has come to after the first `prompt` tokens and those generated since.

    start, end: the ids of the markers
    """
    opened = max((i for i in range(prompt) if tokens[i] == start), default=-1)
    closed = max((i for i in range(prompt) if tokens[i] == end), default=-1)
    used = 0 if opened > closed else NOT_THINKING
    for token in tokens[prompt:]:
        if token == end:
            used = NOT_THINKING
        elif used < 0:
            used = 0 if token == start else used
        else:
            used += 1
    return used


def has_markers(tokenizer: Tokenizer, vocab: int) -> bool:
    """Whether the tokenizer has ids that open and close a thought."""
    try:
        marker_ids(tokenizer, vocab)
    except InputError:
        return False
    return True


@functools.lru_cache(maxsize=4)
def _ends_sentence(tokenizer: Tokenizer, vocab: int) -> np.ndarray:
    ends = np.zeros(vocab, bool)
    known = [piece.endswith(SENTENCE_ENDS) for piece in tokenizer.pieces[:vocab]]
    ends[: len(known)] = known
    return ends
