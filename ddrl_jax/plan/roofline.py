"""The time of a phase on a chip that is not here: the largest of three bounds.

    t = max(FLOPs / (efficiency peak), bytes / memory bandwidth, bytes / axis bandwidth)

(Williams 2009, doi 10.1145/1498765.1498785, with one more roof for each mesh axis.)
Everything is of one device. Communication is taken to overlap with computing, and
rewards, decoding and evaluation are not in it: the time is a bound, not a forecast.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ddrl_jax.plan.links import Links
from ddrl_jax.plan.lowered import Compiled

EFFICIENCY = 0.4  # of the peak: published runs of such networks reach 0.3 to 0.55
NETWORK_PASSES = {"rollout": 1, "update": 4}  # reads of the weights for each item


class Bounds(NamedTuple):
    """Seconds of one call of a phase, by what bounds it."""

    flops: float
    memory: float
    links: dict[tuple[str, ...], float]

    @property
    def term(self) -> str:
        """The bound that is met: "compute", "memory", or the axes of the links."""
        named = {"compute": self.flops, "memory": self.memory}
        named |= {"+".join(axes): t for axes, t in self.links.items()}
        return max(named, key=lambda name: named[name])

    @property
    def seconds(self) -> float:
        """Of the bound that is met."""
        return max(self.flops, self.memory, *self.links.values(), 0.0)


def sent(found: Compiled, widened: bool) -> dict[tuple[tuple[str, ...], str], float]:
    """Bytes a device sends along each set of axes by each kind of collective.

    Args:
      found: the phase.
      widened: whether the compiler has no bfloat16 arithmetic, as that for a CPU, and
        sends in float32 in its loops what an accelerator sends in half of that.
    """
    total: dict[tuple[tuple[str, ...], str], float] = {}
    for c in found.collectives:
        bytes_sent = c.bytes / (2 if widened and c.wide and c.count > 1 else 1)
        total[c.axes, c.kind] = total.get((c.axes, c.kind), 0.0) + bytes_sent
    return total


def moved(found: Compiled, mesh: Mapping[str, int], weights: int, items: int) -> float:
    """Bytes between a device and its memory in one call of a phase.

    Operands and results of products, once each and divided over all devices; and the
    weights that products read, which every device of the batch and context axes needs
    whole but for its share of tensor; and the state, read and written by the update.

    Args:
      found: the phase.
      mesh: axis -> size.
      weights: bytes of the network in the dtype of its products.
      items: calls of the network.
    """
    products = found.count.dot_bytes / math.prod(mesh.values())
    passes = NETWORK_PASSES[found.phase.name] * items
    state = 2 * found.arguments if found.phase.name == "update" else 0
    return products + passes * weights / mesh["tensor"] + state


def bounds(
    found: Compiled,
    links: Links,
    *,
    efficiency: float,
    widened: bool,
    weights: int,
    items: int,
) -> Bounds:
    """The bounds of one call of a phase.

    Args:
      found: the phase.
      links: the mesh on the chips whose peaks bound it.
      efficiency: share of the peak FLOP/s that products are taken to reach.
      widened: whether the compiler sends float32 for the network's bfloat16.
      weights: bytes of the network in the dtype of its products.
      items: calls of the network.
    """
    chip, seconds = links.chip, dict[tuple[str, ...], float]()
    each = found.count.flops / math.prod(links.mesh.values())
    for (axes, kind), size in sent(found, widened).items():
        took = size / links.bandwidth(axes, kind)
        seconds[axes] = seconds.get(axes, 0.0) + took
    memory = moved(found, links.mesh, weights, items) / chip.hbm_bandwidth
    return Bounds(each / (chip.flops * efficiency), memory, seconds)
