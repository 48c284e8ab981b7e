"""What the kernels compute, in NumPy float64; and arguments for them."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from pangu_jax.quant.scheme import Scheme
from pangu_jax.quant.weight import Weight

# The kinds of matrices that the kernels know, and the dtype of the activations that meet them.
SCHEMES = {"weight-only": Scheme("int8"), "dynamic": Scheme("int8", "dynamic")}
KINDS = ("float32", "bfloat16", *(f"{s} {d}" for s in SCHEMES for d in ("float32", "bfloat16")))
SOME = ("float32", "bfloat16", "weight-only bfloat16", "dynamic float32")  # what is in the others

FP8_SCHEMES = {"fp8": Scheme("fp8"), "fp8-dynamic": Scheme("fp8", "dynamic")}
FP8 = tuple(f"{s} {d}" for s in FP8_SCHEMES for d in ("float32", "bfloat16"))

# int4 of groups that are no multiple of a vector, and that are.
INT4 = tuple(f"int4-{group} {d}" for group in (2, 6, 32, 128) for d in ("float32", "bfloat16"))

# No multiple of a vector among them, one, and one that is.
WIDTHS = (1, 7, 17, 64, 130)


def kinds(quick: Iterable[str], others: Iterable[str]) -> pytest.MarkDecorator:
    """A parameter `kind`; the others are for those who have more time."""
    slow = (pytest.param(kind, marks=pytest.mark.slow) for kind in others)
    return pytest.mark.parametrize("kind", [*quick, *slow])


some_kinds = kinds(SOME[1::2], SOME[::2])


def array(x: Any, dtype: str) -> jax.Array:
    """Numbers of NumPy as JAX's; nothing is compiled for it."""
    return jax.device_put(np.asarray(x).astype(jnp.dtype(dtype)))


def wide(x: Any) -> np.ndarray:
    """float64 of any array."""
    return np.asarray(x).astype(np.float64)


def activations(kind: str, seed: int, *shape: int) -> jax.Array:
    """Rows of the dtype that a kind of matrix is multiplied with. The largest of each is 127 / 32:
    rounded to int8 they are the same however one divides.
    """
    rng = np.random.default_rng(seed)
    x, largest = rng.normal(size=shape), 127 / 32
    x = np.clip(x, -largest, largest).reshape(-1, shape[-1])
    x[np.arange(len(x)), rng.integers(0, shape[-1], len(x))] = rng.choice([-largest, largest])
    return array(x.reshape(shape), kind.split()[-1])


def matrix(kind: str, seed: int, *shape: int) -> Any:
    """A matrix [*out, D] of a kind, numbers about 1 / sqrt(D)."""
    rng = np.random.default_rng(seed)
    if kind.startswith("int4"):
        return _int4(rng, int(kind.split()[0].removeprefix("int4-")), *shape)
    scheme = (SCHEMES | FP8_SCHEMES).get(kind.split()[0])
    if scheme is None:
        return array(rng.normal(size=shape) * shape[-1] ** -0.5, kind)
    if scheme.numbers == "fp8":
        numbers = array((73 * rng.normal(size=shape)).clip(-448, 448), "float8_e4m3fn")
    else:
        numbers = array(rng.integers(-127, 128, shape), "int8")
    scale = rng.uniform(0.5, 2, (*shape[:-1], 1)) * shape[-1] ** -0.5 / 73
    return Weight(scheme=scheme, numbers=numbers, scale=array(scale, "float32"))


def _int4(rng: np.random.Generator, group: int, *shape: int) -> Weight:
    *out, D = shape
    scale = rng.uniform(0.5, 2, (*out, D // group)) * D**-0.5 / 5
    return Weight(
        scheme=Scheme("int4", group=group),
        numbers=array(rng.integers(0, 256, (*out, D // 2)), "uint8"),
        scale=array(scale, "float32"),
    )


def routing(seed: int, N: int, k: int, E: int, pattern: str) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens chose, and their weights."""
    rng = np.random.default_rng(seed)
    chosen = {
        "spread": rng.integers(0, E, (N, k)),  # some twice
        "one": np.full((N, k), E - 1),
        "some elsewhere": rng.integers(0, 2 * E, (N, k)).clip(max=E),
        "all elsewhere": np.full((N, k), E),
    }[pattern]
    return array(chosen, "int32"), array(rng.uniform(-1, 1, (N, k)), "float32")


def stack(kind: str, seed: int, *shape: int) -> tuple[Any, Any]:
    """gate_up and down of E experts of F by D, of layers where there are more axes in front."""
    *lead, E, F, D = shape
    gate_up = matrix(kind, seed + 1, *lead, E, 2, F, D)
    return gate_up, matrix(kind, seed + 2, *lead, E, D, F)


def experts(
    kind: str, seed: int, N: int, k: int, E: int, F: int, D: int, pattern: str = "spread"
) -> tuple[Any, ...]:
    """Arguments of `mix_experts`."""
    x = activations(kind, seed, N, D)
    return x, *routing(seed, N, k, E, pattern), *stack(kind, seed, E, F, D)


def worth(held: Any) -> np.ndarray:
    """The numbers of a matrix of any kind."""
    if isinstance(held, Weight) and held.scheme.numbers == "int4":
        packed = np.asarray(held.numbers).astype(np.int64)
        numbers = np.stack([packed % 16 - 8, packed // 16 - 8], -1).reshape(held.shape)
        return numbers * np.repeat(wide(held.scale), held.scheme.group or 1, -1)
    return wide(held.numbers) * wide(held.scale) if isinstance(held, Weight) else wide(held)


def rounded(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers and the float32 scale of each row: its largest times a 127th, in float32."""
    x = np.asarray(x).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    ratio = x / np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.round(ratio), -127, 127).astype(np.int8), scale


def rounded_to_fp8(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """e4m3fn numbers and the scale of each row, in which the kernels divide by a reciprocal."""
    x = np.asarray(x).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 448)
    ratio = x * (np.float32(1) / np.where(scale > 0, scale, np.float32(1)))
    return np.clip(ratio, -448, 448).astype(jnp.float8_e4m3fn), scale


def is_dynamic(held: Any) -> bool:
    """Whether its activations are rounded."""
    return isinstance(held, Weight) and held.scheme.activations == "dynamic"


def seen_by(held: Any, x: np.ndarray) -> np.ndarray:
    """The rows that a matrix is multiplied with: rounded where its kind says so."""
    if not is_dynamic(held):
        return wide(x)
    numbers, scale = (rounded_to_fp8 if held.scheme.numbers == "fp8" else rounded)(x)
    return wide(numbers) * wide(scale)


def matmul(x: Any, held: Any) -> np.ndarray:
    """x @ held^T."""
    return seen_by(held, np.asarray(x)) @ worth(held).T


def mix_experts(
    x: Any, chosen: Any, weights: Any, gate_up: Any, down: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Pair by pair; expert E and beyond adds nothing. And the sizes of `swiglu`."""
    size, out = np.zeros(x.shape), np.zeros(x.shape)
    one = lambda stack, e: jax.tree.map(lambda leaf: np.asarray(leaf)[e], stack)
    for e in range(down.shape[0]):
        values, sizes = swiglu(x, one(gate_up, e), one(down, e))
        share = np.where(np.asarray(chosen) == e, wide(weights), 0)
        out += share.sum(-1, keepdims=True) * values
        size += np.abs(share).sum(-1, keepdims=True) * sizes
    return out, size


def swiglu(x: Any, gate_up: Any, down: Any) -> tuple[np.ndarray, np.ndarray]:
    """down(silu(gate(x)) * up(x)); and a size for each result, of which rounding moves a part: the
    sum of all products, where those of gate and up are as large as their own sums.
    """
    rows = seen_by(gate_up, np.asarray(x))
    project = lambda rows, matrix: np.moveaxis(np.einsum("nd,pfd->npf", rows, matrix), 1, 0)
    (gate, up), (of_gate, of_up) = (
        project(keep(rows), keep(worth(gate_up))) for keep in (np.asarray, np.abs)
    )
    size = (of_gate * np.abs(up) + np.abs(gate) * of_up) @ np.abs(worth(down)).T
    return seen_by(down, gate / (1 + np.exp(-gate)) * up) @ worth(down).T, size


def close(
    got: Any, wanted: np.ndarray, tolerance: float, what: Any = "", size: np.ndarray | None = None
) -> None:
    """Equal but for `tolerance` of the largest number, or of a size for each."""
    got = wide(got)
    assert got.shape == wanted.shape, what
    size = np.broadcast_to(np.abs(wanted).max(), wanted.shape) if size is None else size
    error = np.abs(got - wanted) / np.maximum(size, 1e-30)
    assert (error <= tolerance).all(), (what, error.max())


def same(got: Any, wanted: Any, what: Any = "") -> None:
    """Equal bit by bit."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (got, wanted)]
    np.testing.assert_array_equal(*bits, err_msg=str(what))


DEVICES = 8


def mesh(devices: int = DEVICES) -> Mesh:
    """One axis, "x"."""
    return jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
