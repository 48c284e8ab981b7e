"""Reading a compiled program's text: its collectives, and its largest intermediate arrays.

XLA's text has one computation after another, an instruction a line. What stands in a loop's body
counts as often as the loop runs, where that is known when compiling; a loop that ends when the data
say so (generation's) counts once: its numbers are those of one step.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
NO_BUFFER = {
    *("parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "constant"),
    *(
        "call",
        "opt-barrier",
        "copy-start",
        "async-start",
        "async-update",
        "partition-id",
        "after-all",
    ),
}
COPIES = ("copy", "copy-done", "transpose")

# XLA for TPU has no reduce-scatter of its own: a fused all-reduce of which each keeps its part.
FUSED_SCATTER = re.compile(r"calls=%?all-reduce-scatter")

# It also carries an asynchronous collective on inside of other work, in a loop's every turn, and
# names it wherever it does: what counts is where it starts.
CARRIED_ON = re.compile(r"calls=%?async_collective_fusion")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_TYPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it makes (a type, or several in parentheses), from what, and the rest."""

    name: str
    type: str
    op: str
    rest: str


@dataclasses.dataclass
class Traffic:
    """What a device receives in collectives of one kind."""

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An intermediate array, and where in the source it comes from."""

    bytes: int
    op: str
    type: str
    source: str


class Program:
    """The computations of a compiled program by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        whole = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(whole[1]) if whole else 1
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := _LINE.match(line):
                current.append(Instruction(*found.groups()))

    def collectives(self) -> dict[str, Traffic]:
        """What a device receives, by kind of collective; kinds that do not occur are left out."""
        found: dict[str, Traffic] = {kind: Traffic() for kind in KINDS}
        for instruction, owner, times in self._run(self.entry, 1):
            kind = instruction.op.removesuffix("-done")
            if FUSED_SCATTER.search(instruction.rest):
                kind = "reduce-scatter"
            if kind not in KINDS:
                continue
            size, ranks = sum(sizes(instruction.type)), self._ranks(instruction, owner)
            found[kind].count += times
            found[kind].bytes += times * received(kind, size, ranks)
        return {kind: traffic for kind, traffic in found.items() if traffic.count}

    def buffers(self, count: int) -> list[Buffer]:
        """The largest intermediate arrays, one for each source and type. An array of the type of an
        argument is most likely that argument, changed in place, unless it is a copy.
        """
        arguments = {bare(i.type) for i in self.computations[self.entry] if i.op == "parameter"}
        found: dict[tuple[str, str], Buffer] = {}
        for instruction, _, _ in self._run(self.entry, 1, fused=False):
            kind = instruction.type
            copied = instruction.op in COPIES
            if instruction.op in NO_BUFFER or (not copied and bare(kind) in arguments):
                continue
            parts = sizes(kind)
            named = re.search(r'op_name="([^"]*)"', instruction.rest)
            source = _short(named[1]) if named else ""
            if parts:
                buffer = Buffer(max(parts), instruction.op, bare(kind), source)
                found.setdefault((bare(kind), source), buffer)
        return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]

    def _run(
        self, name: str, times: int, fused: bool = True
    ) -> Iterator[tuple[Instruction, str, int]]:
        """The instructions that a computation runs, with theirs, and how often."""
        for instruction in self.computations.get(name, ()):
            yield instruction, name, times
            for called, repeats in self._calls(instruction, fused):
                yield from self._run(called, times * repeats, fused)

    def _calls(self, instruction: Instruction, fused: bool) -> Iterator[tuple[str, int]]:
        rest = instruction.rest
        if instruction.op == "while":
            body, condition = (
                re.search(rf"{key}=%?([\w.\-]+)", rest) for key in ("body", "condition")
            )
            if body and condition:
                times = self._trips(rest, condition[1])
                yield from ((called[1], times) for called in (body, condition))
        elif instruction.op == "conditional":
            listed = re.findall(r"branch_computations=\{([^}]*)\}", rest)
            named = re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", rest)
            for called in ",".join(listed + named).split(","):
                yield called.strip().lstrip("%"), 1
        elif instruction.op in ("call", "async-start") or (fused and instruction.op == "fusion"):
            called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
            ends = instruction.name.startswith("async-collective-done")
            known = ends or FUSED_SCATTER.search(rest) or CARRIED_ON.search(rest)
            if called and not known:
                yield called[1], 1

    def _trips(self, rest: str, condition: str) -> int:
        """How often a loop runs: as XLA says, or as a comparison with an integer does; else 1."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", rest):
            return int(known[1])
        lines = self.computations.get(condition, [])
        whole = [line for line in lines if line.type.startswith(("s", "u"))]
        constants = {i.name: int(v[1]) for i in whole if (v := _constant(i))}
        for line in lines:
            if line.op == "compare" and "direction=LT" in line.rest:
                operands = re.findall(r"%?([\w.\-]+)", line.rest.split(")")[0])
                return next((constants[o] for o in operands if o in constants), 1)
        return 1

    def _ranks(self, instruction: Instruction, owner: str) -> int:
        """Devices of each group of a collective; an asynchronous one says so where it starts."""
        rest = instruction.rest
        if instruction.op.endswith("-done"):
            started = re.search(r"%?([\w.\-]+)\)", rest)
            for other in self.computations[owner]:
                if started and other.name == started[1]:
                    rest = other.rest
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
            return listed[1].count(",") + 1
        if counted := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]", rest):
            return int(counted[1])
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
            return _ranks_of_axes(*named.groups())
        if "replica_groups={}" in rest:
            return self.devices
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inner = self.computations.get(called[1], []) if called else []
        return next((self._ranks(i, owner) for i in inner if i.op in KINDS), 1)


def _ranks_of_axes(mesh: str, axes: str) -> int:
    """Of groups as newer XLA writes them: the axes of a mesh, or parts of axes such as 'y':(1)2."""
    of_mesh = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or of_mesh[name]) for name, part in parts)


def received(kind: str, size: int, ranks: int) -> int:
    """Bytes that reach a device in a collective whose result has `size` bytes, at least.

    A reduction counts every partial sum that must come in once on its way through a ring.
    """
    match kind:
        case "all-reduce":
            return 2 * size * (ranks - 1) // ranks
        case "reduce-scatter":
            return size * (ranks - 1)
        case "collective-permute":
            return size
        case _:
            return size * (ranks - 1) // ranks


def sizes(type: str) -> list[int]:
    """Bytes of every array in a type."""
    found = []
    for kind, dimensions in _TYPE.findall(type):
        bits = BITS.get(kind) or int((re.search(r"\d+", kind) or ["8"])[0])
        for size in filter(None, dimensions.split(",")):
            bits *= int(size)
        found.append(-(-bits // 8))
    return found


def bare(type: str) -> str:
    """A type without memory layouts."""
    return re.sub(r"\{[^}]*\}", "", type)


def _constant(instruction: Instruction) -> re.Match[str] | None:
    return re.match(r"(\d+)\)", instruction.rest) if instruction.op == "constant" else None


def _short(source: str) -> str:
    """An op_name without the parts that say nothing to a reader."""
    noise = {"shard_map", "while", "body", "cond", "closed_call", "branch_0_fun", "branch_1_fun"}
    parts = [part for part in source.split("/") if part not in noise]
    return "/".join(collections.OrderedDict.fromkeys(parts))
