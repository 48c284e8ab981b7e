"""Counting the collectives of a lowered program: those asked for, not what XLA makes of them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from pangu_jax.plan.hlo import KINDS, Traffic, received, sizes

_KINDS = {f"stablehlo.{kind.replace('-', '_')}": kind for kind in KINDS}


def traffic(lowered: Any, mesh: Mapping[str, int]) -> dict[str, Traffic]:
    """What a device receives, by kind of collective. The body of a loop counts once, a function as
    often as it is called.

    lowered: of jax.jit(...).lower(...)
    mesh: sizes of the axes of the mesh that it was lowered for
    """
    from jaxlib.mlir import ir

    named = lambda op: ir.StringAttr(op.operation.attributes["sym_name"]).value
    functions = {named(op): op for op in lowered.compiler_ir("stablehlo").body.operations}
    found: dict[str, Traffic] = {}

    def visit(op: Any) -> Any:
        if op.name == "func.call":
            functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value].operation.walk(visit)
        elif kind := _KINDS.get(op.name):
            own = found.setdefault(kind, Traffic())
            groups = op.attributes["replica_groups"] if "replica_groups" in op.attributes else ""
            ranks = _ranks(str(groups), mesh) if groups else 1  # a permutation has none
            own.count += 1
            own.bytes += sum(received(kind, _size(str(r.type)), ranks) for r in op.results)
        return ir.WalkResult.ADVANCE

    functions["main"].operation.walk(visit)
    return found


def _ranks(groups: str, mesh: Mapping[str, int]) -> int:
    """Devices of each group: newer JAX names the axes, older JAX lists the devices."""
    if axes := re.findall(r'axis_ref<name = "(\w+)"', groups):
        return math.prod(mesh[axis] for axis in axes)
    listed = re.search(r"tensor<\d+x(\d+)xi64>", groups)
    assert listed, groups
    return int(listed[1])


def _size(type: str) -> int:
    """Bytes of an MLIR tensor type such as tensor<32x5120xbf16>."""
    *dimensions, kind = re.sub(r"tensor<|>", "", type).split("x")
    kind = {"i8": "s8", "i32": "s32", "i1": "pred"}.get(kind, kind)
    return sizes(f"{kind}[{','.join(dimensions)}]")[0]
