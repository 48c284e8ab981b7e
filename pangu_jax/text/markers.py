"""The strings that structure what a model reads and writes."""

import dataclasses
from typing import Literal

from pangu_jax.text.tokenizer import Tokenizer

# How a message is to be answered: at once, after thinking, or as the model sees fit.
Think = Literal["fast", "slow", "auto"]


@dataclasses.dataclass(frozen=True)
class Markers:
    """Special strings of turns, thoughts and tool calls; the defaults are the published models'."""

    turn_start: str = "[unused9]"
    turn_end: str = "[unused10]"
    think_start: str = "[unused16]"
    think_end: str = "[unused17]"
    tool_start: str = "[unused11]"
    tool_end: str = "[unused12]"


PUBLISHED = Markers()
THINK = ("<think>", "</think>")
TOOL = ("<|tool_call_start|>", "<|tool_call_end|>")


def of(tokenizer: Tokenizer) -> Markers:
    """A tokenizer's markers: the named ones where its vocabulary has both, as omni-infer's parsers
    choose, else the published ones. Turns are always marked as published.
    """
    has = lambda pair: all(tokenizer.id(text) is not None for text in pair)
    think = THINK if has(THINK) else (PUBLISHED.think_start, PUBLISHED.think_end)
    tool = TOOL if has(TOOL) else (PUBLISHED.tool_start, PUBLISHED.tool_end)
    return Markers(think_start=think[0], think_end=think[1], tool_start=tool[0], tool_end=tool[1])
