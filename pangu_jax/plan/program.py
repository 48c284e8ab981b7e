"""What a target's compiler makes of a program: memory of a device, collectives, copies."""

import dataclasses
import time
from typing import Any

from pangu_jax.plan import hlo
from pangu_jax.plan.hlo import Buffer, Traffic

LISTED = 6


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes of one device, as the compiler says, and what its program does.

    resident: arguments, and results that do not take their place
    temporary: what a call needs beside them
    buffers: the largest of the intermediate arrays (they may share memory)
    """

    compile_s: float
    resident: int
    temporary: int
    collectives: dict[str, Traffic]
    buffers: list[Buffer]


def build(lowered: Any) -> Compiled:
    """Compiles a lowered program (jax.jit(...).lower(...)) for its devices."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    return Compiled(
        seconds,
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        program.collectives(),
        program.buffers(LISTED),
    )
