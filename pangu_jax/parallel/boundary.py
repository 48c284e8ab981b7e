"""Where data crosses devices: a block gathers its tokens with `enter` and hands results back with
`leave`.

The residual stream is sharded by tokens over every axis that shares them. A module that splits its
own weights over some axes needs all the tokens of those axes, and returns partial sums of them:

    x = x + leave(module(enter(norm(x), axes)), axes)

Over axes of size one nothing moves, and nothing is emitted.
"""

from jax import lax
from jaxtyping import Array, Float

from pangu_jax.parallel.layout import Axes


def enter(x: Float[Array, "shard D"], axes: Axes) -> Float[Array, "N D"]:
    """The tokens of all devices along `axes`, gathered in stream order."""
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def leave(y: Float[Array, "N D"], axes: Axes) -> Float[Array, "shard D"]:
    """This device's tokens of the sum of all devices' partial results along `axes`."""
    return lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True) if axes else y
