"""The time of a phase on a chip that is not here: the largest of three bounds.

    t = max(FLOPs / (efficiency peak), bytes / memory bandwidth, bytes / axis bandwidth)

(Williams 2009, doi 10.1145/1498765.1498785, with one more roof for each mesh axis.)
Everything is of one device. Communication is taken to overlap with computing, and
rewards, decoding and evaluation are not in it: the time is a bound, not a forecast.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ddrl_jax.chips import Chip
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


def sent(found: Compiled, dtype: str) -> dict[tuple[str, ...], float]:
    """Bytes a device sends along each set of axes, in one call of a phase.

    The CPU compiler has no bfloat16 arithmetic: it widens what a bfloat16 network
    sends in its loops to float32. An accelerator sends half of that.
    """
    total: dict[tuple[str, ...], float] = {}
    for c in found.collectives:
        narrow = dtype == "bfloat16" and c.wide and c.count > 1
        total[c.axes] = total.get(c.axes, 0.0) + c.bytes / (2 if narrow else 1)
    return total


def bandwidth(axes: tuple[str, ...], mesh: Mapping[str, int], chip: Chip) -> float:
    """Bytes/s that a device can send along mesh axes, neighbours first.

    An axis of a torus has a link each way; a switch gives a device all it has. Groups
    that do not fit into the chips behind one switch go over the hosts' network.
    """
    if chip.ici_links > 1:
        ways = 2 * min(len(axes), chip.ici_links // 2)
        return chip.ici_bandwidth * ways / chip.ici_links
    names = list(mesh)
    inner = names[min(names.index(a) for a in axes) :]  # from the outermost axis on
    if math.prod(mesh[a] for a in inner) <= chip.chips_per_host:
        return chip.ici_bandwidth
    return chip.dcn_bandwidth / chip.chips_per_host


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
    mesh: Mapping[str, int],
    chip: Chip,
    *,
    efficiency: float,
    dtype: str,
    weights: int,
    items: int,
) -> Bounds:
    """The bounds of one call of a phase.

    Args:
      found: the phase.
      mesh: axis -> size.
      chip: whose peaks bound it.
      efficiency: share of the peak FLOP/s that products are taken to reach.
      dtype: of the network's products.
      weights: bytes of the network in that dtype.
      items: calls of the network.
    """
    each = found.count.flops / math.prod(mesh.values())
    links = {
        axes: size / bandwidth(axes, mesh, chip)
        for axes, size in sent(found, dtype).items()
    }
    memory = moved(found, mesh, weights, items) / chip.hbm_bandwidth
    return Bounds(each / (chip.flops * efficiency), memory, links)
