"""How fast a device sends along mesh axes: the torus or switch inside a slice, the
hosts' network between slices.

A slice is what the fast links join: up to a pod of TPUs, a host of GPUs. The mesh lies
over slices as `sharding.hybrid_grid` lays it, the data axis first.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ddrl_jax.chips import Chip
from ddrl_jax.errors import UserError
from ddrl_jax.sharding import hybrid_grid

# In these, what leaves a slice leaves it once, however many of its chips take part.
RINGS = ("all-reduce", "all-gather", "reduce-scatter")


class _StandIn:
    """A device of which only the slice is known."""

    device_kind = platform = "placeholder"

    def __init__(self, number: int):
        self.slice = number


class Links(NamedTuple):
    """A mesh on slices of chips.

    Attributes:
      chip: of all devices.
      mesh: axis -> size.
      slices: number of the slice of each device, in the shape of the mesh.
    """

    chip: Chip
    mesh: Mapping[str, int]
    slices: np.ndarray

    @property
    def count(self) -> int:
        """How many slices there are."""
        return int(self.slices.max()) + 1

    def bandwidth(self, axes: tuple[str, ...], kind: str = "all-reduce") -> float:
        """Bytes/s that a device sends in a collective along mesh axes.

        A group with k members on each slice has k shares of the hosts' network, one a
        chip: a ring that crosses it once can use them all, in an exchange of all with
        all each share carries its own chip's bytes.

        Args:
          axes: along which the members of a group differ.
          kind: of collective, as in the HLO.
        """
        index = tuple(slice(None) if a in axes else 0 for a in self.mesh)
        group = self.slices[index]
        here = int(np.unique(group, return_counts=True)[1].min())
        inside = self._inside(axes, kind, here)
        if here == group.size:
            return inside
        network = self.chip.dcn_bandwidth / self.chip.chips_per_host
        if kind in RINGS:
            return min(inside, here * network)
        leaving = (group.size - here) / (group.size - 1)
        return network / (leaving if kind == "all-to-all" else 1.0)

    def _inside(self, axes: tuple[str, ...], kind: str, members: int) -> float:
        """Within a slice: a switch gives all it has, a torus two links for each axis.

        In an exchange of all with all on a ring of n, bytes travel n / 4 links far.
        """
        chip = self.chip
        if chip.ici_links == 1:
            return chip.ici_bandwidth
        ways = 2 * min(len(axes), chip.ici_links // 2)
        far = max(members / 4, 1.0) if kind == "all-to-all" else 1.0
        return chip.ici_bandwidth * ways / chip.ici_links / far

    def torus(self) -> tuple[int, ...]:
        """The torus of one slice; () behind a switch and where its shape is not known.

        Slices of 2^k TPUs are as close to a square or a cube as can be.
        """
        exponent = math.log2(self.slices.size / self.count)
        if self.chip.ici_links == 1 or exponent % 1:
            return ()
        axes = self.chip.ici_links // 2
        return tuple(2 ** ((int(exponent) + k) // axes) for k in range(axes))

    def on_whole_axes(self) -> bool:
        """Whether each mesh axis can have whole axes of the torus to itself."""
        torus, wanted = self.torus(), self._in_a_slice()
        for owners in itertools.product(range(len(wanted)), repeat=len(torus)):
            found = [1] * len(wanted)
            for owner, size in zip(owners, torus, strict=True):
                found[owner] *= size
            if found == wanted:
                return True
        return not torus

    def _in_a_slice(self) -> list[int]:
        """Sizes of the mesh within one slice."""
        places = np.argwhere(self.slices == 0)
        return [len(np.unique(column)) for column in places.T]


def lay(chip: Chip, mesh: Mapping[str, int], slices: int = 0) -> Links:
    """Lays a mesh over slices.

    Args:
      chip: of all devices.
      mesh: axis -> size, in the order of `sharding.AXES`.
      slices: how many there are; 0: as few as the chip allows.

    Raises:
      UserError: there are no such slices, or the mesh does not divide over them.
    """
    devices = math.prod(mesh.values())
    count = slices or -(-devices // chip.slice_chips)
    if devices % count or devices // count > chip.slice_chips:
        raise UserError(
            f"{devices} x {chip.name} do not make equal slices",
            got=f"{count} slices",
            wanted=f"a divisor of {devices}, and at most {chip.slice_chips} chips in "
            "a slice (of GPUs: a host)",
            way_out="change --plan.devices or --plan.slices",
        )
    shape = tuple(mesh.values())
    if count == 1:
        return Links(chip, mesh, np.zeros(shape, int))
    each = [[_StandIn(n)] * (devices // count) for n in range(count)]
    numbers = [device.slice for device in hybrid_grid(shape, each).flat]
    return Links(chip, mesh, np.array(numbers).reshape(shape))
