"""One mesh, one table from logical axes to mesh axes, and where batches live."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
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


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Puts values that every process has whole on a mesh; each takes its shards.

    Args:
      tree: of NumPy arrays, arrays of this process, or arrays on a mesh already.
      sharding: of every leaf, maybe over devices of several processes.
    """

    def place(x):
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        if sharding.is_fully_addressable or elsewhere:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    return jax.tree.map(place, tree)


def place_batch(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Puts arrays on the mesh, split over (data, fsdp) along `axis`."""
    return put(tree, NamedSharding(mesh, P(*(None,) * axis, ("data", "fsdp"))))


def place_fetched(mesh: Mesh, numbers: np.ndarray, fetch: Any) -> Any:
    """The records of a batch on the mesh; each process fetches the rows it holds.

    Args:
      mesh: of all processes.
      numbers: [b] record of each row.
      fetch: record numbers [n] -> tree of arrays with leading axis n.
    """
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    if sharding.is_fully_addressable:
        return place_batch(mesh, fetch(numbers))
    held = sharding.addressable_devices_indices_map(numbers.shape).values()
    rows = np.unique(np.concatenate([np.arange(len(numbers))[i] for i in held]))

    def place(x):
        x, shape = np.asarray(x), (len(numbers), *x.shape[1:])
        own = lambda i: x[np.searchsorted(rows, np.arange(len(numbers))[i[0]])]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding, own)

    return jax.tree.map(place, fetch(numbers[rows]))


def to_host(tree: Any) -> Any:
    """Copies a tree of arrays to NumPy; what is spread over processes comes whole.

    Every process has to call it for the same tree.
    """

    def spread(x):
        if not isinstance(x, jax.Array):
            return False
        return not (x.is_fully_addressable or x.is_fully_replicated)

    gather = partial(multihost_utils.process_allgather, tiled=True)
    tree = jax.tree.map(lambda x: gather(x) if spread(x) else x, tree)
    return jax.tree.map(np.asarray, jax.device_get(tree))
