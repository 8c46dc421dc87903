"""One mesh, one table from logical axes to mesh axes, and where batches live."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.interfaces import Params

AXES = ("data", "fsdp", "tensor", "context")
RULES: Mapping[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
    "length": ("context",),
}


def make_mesh(sizes: Any) -> Mesh:
    """Returns the mesh (data, fsdp, tensor, context) over the first devices.

    Args:
      sizes: config.mesh, or any mapping axis -> size; one may be -1: what is left.
    """
    shape = [sizes[a] for a in AXES]
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = jax.device_count() // known
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(axes: tuple, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
    """Resolves logical axes to a spec; a mesh axis that does not divide is dropped.

    Args:
      axes: one logical name (or None) a dimension; missing ones count as None.
      shape: of the array.
      mesh: whose axis sizes must divide.
      rules: logical name -> mesh axes, used from the left.
    """
    out, used = [], set()
    for size, name in zip(
        shape, (*axes, *(None,) * (len(shape) - len(axes))), strict=True
    ):
        names = tuple(a for a in rules.get(name, ()) if a not in used)
        while names and size % math.prod(mesh.shape[a] for a in names):
            names = names[:-1]
        used |= set(names)
        out.append(names if len(names) > 1 else (names[0] if names else None))
    return P(*out)


def batch_shares(mesh: Mesh) -> int:
    """Returns into how many shares the samples of a call are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def params_shardings(axes: Any, shapes: Params, mesh: Mesh) -> Params:
    """Shardings of a parameter tree from the tree of its logical axes."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, spec_for(names, leaf.shape, mesh)),
        shapes,
        axes,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def place_batch(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Puts arrays on the mesh, split over (data, fsdp) along `axis`."""

    def place(x):
        spec = P(*(None,) * axis, ("data", "fsdp"))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Copies a tree of arrays to NumPy in one transfer."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
