"""One mesh, one table from logical axes to mesh axes, and where batches live."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params

Rules = Mapping[str | None, tuple[str, ...]]  # logical axis -> mesh axes

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")
READ_AT_ONCE = 8  # batches that one compiled call takes rows of
RULES: Rules = {
    "batch": BATCH,
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
    "length": ("context",),
}


def make_mesh(sizes: Any, devices: Sequence | None = None) -> Mesh:
    """Returns the mesh (data, fsdp, tensor, context) over the first devices.

    Several slices (TPU pods, or GPU nodes, joined by a data-centre network) share the
    data axis and, if it is too small, the fsdp axis; the others stay in one slice.

    Args:
      sizes: config.mesh, or any mapping axis -> size; one may be -1: what is left.
      devices: to lay it over; None: all that this program has.

    Raises:
      UserError: the slices divide neither data nor data x fsdp, or the links of a slice
        can not carry the mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[a] for a in AXES]
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // known
    types = (AxisType.Auto,) * len(AXES)
    slices = _slices(devices)
    if len(slices) == 1:
        grid = slice_grid(shape, slices[0][: math.prod(shape)])
    else:
        grid = hybrid_grid(shape, slices)
    return Mesh(grid, AXES, axis_types=types)


def _slices(devices: Sequence) -> list[list]:
    """Devices by slice; processes of one machine's CPUs are no slices."""
    found: dict[int, list] = {}
    for device in devices:
        # of GPUs jaxlib calls it partition_index, and has both names meanwhile
        names = () if device.platform == "cpu" else ("slice_index", "partition_index")
        index = next((getattr(device, n) for n in names if hasattr(device, n)), 0)
        found.setdefault(index, []).append(device)
    return [found[i] for i in sorted(found)]


def slice_grid(shape: Sequence[int], devices: list) -> np.ndarray:
    """Returns the devices of one slice as [data, fsdp, tensor, context].

    A mesh axis may take a part of an axis of a TPU's torus: most meshes with two axes
    or more need it (fsdp 16 x context 4 on 4 x 4 x 4 chips does not, on 8 x 8 it does).

    Args:
      shape: of the mesh.
      devices: as many as it has places.

    Raises:
      UserError: the torus can not be divided so, or these are not all of its devices.
    """
    try:
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError, AssertionError) as error:
        sizes = ", ".join(f"{a} {n}" for a, n in zip(AXES, shape, strict=True))
        raise UserError(
            "the mesh can not be laid over the links of these devices",
            got=f"{sizes} on {len(devices)} x {devices[0].device_kind}",
            wanted="all devices of a slice, and sizes that its torus can be divided by",
            way_out="set one size of config.mesh to -1, and the others to powers of 2",
        ) from error


def hybrid_grid(shape: Sequence[int], slices: list[list]) -> np.ndarray:
    """Returns the devices [data, fsdp, tensor, context] of several equal slices.

    Args:
      shape: of the mesh.
      slices: the devices of each.
    """
    over_data = math.gcd(shape[0], len(slices))
    over_fsdp = len(slices) // over_data
    if shape[1] % over_fsdp:
        raise UserError(
            "the mesh does not divide over the slices",
            got=f"data {shape[0]}, fsdp {shape[1]} on {len(slices)} slices",
            wanted="data, or data x fsdp, a multiple of the number of slices: tensor "
            "and context need the fast links inside one",
            way_out=f"set mesh.data to a multiple of {len(slices)}",
        )
    inner = (shape[0] // over_data, shape[1] // over_fsdp, *shape[2:])
    grids = [slice_grid(inner, devices) for devices in slices]
    grid = np.stack(grids).reshape(over_data, over_fsdp, *inner)
    return grid.transpose(0, 2, 1, 3, 4, 5).reshape(shape)


def spec_for(
    axes: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules=RULES
) -> P:
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


def constrain(x: Any, axes: tuple, mesh: Mesh) -> Any:
    """Says inside jit where an array lies, by the logical names of its axes."""
    sharding = NamedSharding(mesh, spec_for(axes, x.shape, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def batch_shares(mesh: Mesh) -> int:
    """Returns into how many shares the samples of a call are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def table(sharding: Any) -> Rules:
    """Returns logical axis -> mesh axes from config.sharding; the batch is fixed."""
    return {name: tuple(sharding[name]) for name in sharding} | {"batch": BATCH}


def without(rules: Rules, *axes: str) -> Rules:
    """Returns the table that leaves these mesh axes out: whole copies over them."""
    return {n: tuple(a for a in used if a not in axes) for n, used in rules.items()}


def params_shardings(axes: Any, shapes: Params, mesh: Mesh, rules=RULES) -> Params:
    """Shardings of a parameter tree from the tree of its logical axes."""

    def resolve(leaf, names):
        return NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules))

    return jax.tree.map(resolve, shapes, axes)


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
    return put(tree, NamedSharding(mesh, P(*(None,) * axis, BATCH)))


def take_rows(
    mesh: Mesh, batches: Sequence[Any], rows: np.ndarray, axis: int = 0
) -> Any:
    """The batch of some rows of several equal batches, wherever these lie.

    Only batches that have such a row are read, and never joined: beside them there is
    only the new one, and on several devices one of them whole.

    Args:
      mesh: where the batches are.
      batches: trees of arrays, split along `axis`.
      rows: which, counted through all batches; as many as a batch has.
      axis: of the rows.
    """
    place = NamedSharding(mesh, P(*(None,) * axis, BATCH))
    rows = np.asarray(rows, np.int32)
    needed = np.unique(rows // len(rows))
    # Devices send each other the whole batch: then one at a time.
    at_once = min(READ_AT_ONCE, len(batches)) if batch_shares(mesh) == 1 else 1
    wanted, found = put(rows, replicated(mesh)), None
    for first in range(0, len(needed), at_once):
        numbers = needed[first : first + at_once]
        numbers = np.pad(numbers, (0, at_once - len(numbers)), mode="edge")
        part = tuple(batches[n] for n in numbers)
        found = fill_rows(found, part, wanted, numbers, axis=axis, place=place)
    return found


@partial(jax.jit, static_argnames=("axis", "place"), donate_argnames="found")
def fill_rows(
    found: Any, batches: tuple, rows: Any, numbers: Any, *, axis: int, place: Any
) -> Any:
    """Writes those of the rows that are in these batches, which have these numbers."""

    def fill(*leaves: Any) -> Any:
        batch = leaves[0].shape[axis]
        out = jnp.zeros_like(leaves[0]) if found is None else leaves[0]
        for k, leaf in enumerate(leaves if found is None else leaves[1:]):
            local = rows - numbers[k] * batch
            taken = jnp.take(leaf, jnp.clip(local, 0, batch - 1), axis, mode="clip")
            here = (local >= 0) & (local < batch)
            shape = (*(1,) * axis, batch, *(1,) * (leaf.ndim - axis - 1))
            out = jnp.where(here.reshape(shape), taken, out)
        return jax.lax.with_sharding_constraint(out, place)

    return jax.tree.map(fill, *(() if found is None else (found,)), *batches)


def held_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Returns which rows of a batch the devices of this process hold."""
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    held = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[i] for i in held]))


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
    rows = held_rows(mesh, len(numbers))

    def place(x):
        x, shape = np.asarray(x), (len(numbers), *x.shape[1:])
        own = lambda i: x[np.searchsorted(rows, np.arange(len(numbers))[i[0]])]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding, own)

    return jax.tree.map(place, fetch(numbers[rows]))


class Held:
    """The rows of a batch that this process is the first to hold; read as an array.

    Every row is held by exactly one process, whatever else the mesh splits.

    Args:
      batch: an array of `place_batch`.

    Attributes:
      rows: their positions in the batch.
      shape: of what `np.asarray` gives.
    """

    def __init__(self, batch: jax.Array):
        where = np.arange(batch.shape[0])
        found = [s for s in batch.addressable_shards if s.replica_id == 0]
        found.sort(key=lambda s: where[s.index[0]][0])
        self._parts = [s.data for s in found]
        empty = np.zeros(0, where.dtype)
        self.rows = np.concatenate([empty, *(where[s.index[0]] for s in found)])
        self.shape = (len(self.rows), *batch.shape[1:])

    def copy_to_host_async(self) -> None:
        """Starts the copy to the host."""
        for part in self._parts:
            part.copy_to_host_async()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in self._parts])


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
