"""New keys or values into the slots of a cache."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pangu_jax.kernels import native
from pangu_jax.kernels.choice import Kernel, choose

Implementation = Literal["xla", "native"]


def write(
    cache: Shaped[Array, "*pages"],
    added: Shaped[Array, "B K T ..."],
    pages: Int[Array, "B #T"],
    slots: Int[Array, "B T"],
    layer: Int[Array, ""] | None,
    implementation: Implementation | None = None,
) -> Shaped[Array, "*pages"]:
    """A cache [*L, M, K, Z, ..] with token t of sequence b in slot `slots[b, t]` of page
    `pages[b, t]` (of one of stacked layers); tokens whose slot is Z or more are left out.

    `native` (CPU) copies what is new. XLA there takes a whole bf16 cache to float32 and back.
    """
    own = cache.shape if layer is None else cache.shape[1:]
    alike = (cache.dtype, own[1], *own[3:]) == (added.dtype, added.shape[1], *added.shape[3:])
    fits = alike and added.size > 0
    unlike = "" if fits else "numbers or heads unlike the cache's"
    if implementation == "xla" or (implementation is None and not fits):
        return _xla(cache, added, pages, slots, layer)
    pages = jnp.broadcast_to(pages, slots.shape)
    place = jnp.zeros((), jnp.int32) if layer is None else layer
    plain = lambda *given: _xla(*given[:4], layer=None if layer is None else given[4])
    kernels = {"native": Kernel(_native, "cpu", lambda: native.why_not() or unlike)}
    return choose(plain, implementation, kernels)(cache, added, pages, slots, place)


def _xla(cache: Array, added: Array, pages: Array, slots: Array, layer: Array | None) -> Array:
    index = (pages[:, None, :], jnp.arange(added.shape[1])[None, :, None], slots[:, None, :])
    if layer is not None:
        index = (layer, *index)
    return cache.at[index].set(added, mode="drop")


def _native(cache: Array, added: Array, pages: Array, slots: Array, layer: Array) -> Array:
    integers = (part.astype(jnp.int32) for part in (pages, slots, layer))
    return native.call("pangu_write", cache.shape, cache.dtype, cache, added, *integers, aliases=0)
