"""How large an engine is: what memory is left for pages, by the plan's formulas."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from infer.engine.runner import Shape
from pangu_jax.errors import ConfigError
from pangu_jax.kernels.attention import pages
from pangu_jax.model import Pangu
from pangu_jax.plan import cost
from pangu_jax.plan.cost import Work

# Own choices, by platform: tokens of prompts in a step at most (a step of a GPU that reads weights
# has time for many), tokens of a tile, and of a page.
STEP_TOKENS = {"cpu": 256, "gpu": 2048, "tpu": 2048}
TILE = {"cpu": 32, "gpu": 128, "tpu": 128}
PAGE = {"cpu": 32, "gpu": 64, "tpu": 64}

# Of the memory that is left when weights and working memory are in: fragments need some.
SHARE = 0.9

# Decode steps of a dispatch at most.
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Wish:
    """What may be asked of an engine; None is what fits.

    slots: requests at a time, of each replica of attention
    context: tokens of a request at most, prompt and answer
    memory: bytes of pages on each device
    page: tokens of a page
    deterministic: see `Shape`
    """

    slots: int = 64
    context: int | None = None
    memory: int | None = None
    page: int | None = None
    deterministic: bool = False


def fitting(model: Pangu, wish: Wish = Wish()) -> Shape:
    """The shape of an engine for a model that is loaded. Raises ConfigError with the numbers where
    there is no room, or the wish makes no sense.
    """
    if wish.slots < 1 or (wish.page or 1) < 1 or (wish.context or 1) < 1:
        raise ConfigError("slots, page and context must be at least 1")
    platform = next(iter(_mesh(model).devices.flat)).platform
    most = model.config.max_positions
    context = min(wish.context or most, most)
    page = min(wish.page or PAGE[platform], context)
    tile = min(TILE[platform], context)
    tiles = math.ceil(min(STEP_TOKENS[platform], wish.slots * context) / tile)
    of_page = page_bytes(model, page)
    room = wish.memory
    if room is None:
        working = _working(model, wish.slots, context, tiles * tile)
        room = int(SHARE * max(0, _free(model) - working))
    # Twice what all slots can fill: the rest is for prefixes that may come again.
    pages = min(room // of_page, 2 * wish.slots * math.ceil(context / page))
    if pages < 1:
        raise ConfigError(
            f"no room for pages: one takes {of_page:,} bytes on each device and {room:,} are left; "
            "give it more memory, or fewer slots or a smaller context"
        )
    fits, own = min(context, pages * page), wish.deterministic
    return Shape(wish.slots, pages, page, tile, tiles, fits, STEPS, own)


def page_bytes(model: Pangu, page: int) -> int:
    """Bytes of a page of so many tokens on each device."""
    whole = jax.eval_shape(lambda: model.empty_cache(1, page))
    heads = model.layout.size(model.layout.of("heads"))
    leaves = jax.tree.leaves((whole.keys, whole.values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // heads


def _working(model: Pangu, slots: int, context: int, tokens: int) -> int:
    """The plan's estimate for the widest step, the pages it reads at a time, and what is held of
    the requests in slots.
    """
    ranks = model.layout.size(model.layout.of("batch"))
    works = (Work("decode", slots * ranks, context), Work("prefill", ranks, slots + tokens))
    of = lambda work: cost.of(model.config, model.layout, model.dtype, work, model.recipe).working
    rows, config = slots + tokens // TILE["gpu"], model.config
    gathered = 2 * rows * page_bytes(model, pages.BLOCK["default"]) // config.num_layers
    return max(map(of, works)) + gathered + 9 * slots * config.vocab_size


def _free(model: Pangu) -> int:
    """Bytes that a device has left; of a CPU, its share of what Linux calls available."""
    devices = list(_mesh(model).devices.flat)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats:
        return min(s["bytes_limit"] - s["bytes_in_use"] for d in devices if (s := d.memory_stats()))
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        # Half of it: others live here too.
        return int(lines["MemAvailable"].split()[0]) * 1024 // 2 // len(devices)
    except (OSError, KeyError, ValueError):  # not Linux
        return 2 * 2**30 // len(devices)


def _mesh(model: Pangu) -> Mesh:
    assert isinstance(model.mesh, Mesh)
    return model.mesh
