"""What a checkpoint must give back: shape, dtype and checksum of every leaf."""

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.interfaces import Params

_PROGRAM = "ddrl_jax checkpoint, format 1"

NamedView = tuple[str, np.ndarray | None]


def abstract(state: Params) -> Params:
    """Describes a tree of arrays by shape, dtype and sharding, without their bytes.

    Args:
      state: a tree of jax.Arrays, typed PRNG keys included, and NumPy leaves.

    Returns:
      The tree that `Checkpoints.restore` wants: jax.ShapeDtypeStruct with sharding for
      each jax.Array; NumPy arrays as they are, their scalars as 0-d arrays.
    """

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, np.generic):
            return np.asarray(leaf)  # Orbax restores 0-d arrays but not these
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, state)


def host_leaves(state: Params) -> Iterator[NamedView]:
    """Yields the name and the host view of each leaf of a tree.

    The view is None for an array that is spread over several hosts: each of them holds
    only a part of its bytes.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield _name(path), None if _is_spread(leaf) else np.asarray(_plain(leaf))


def parts(state: Params) -> Iterator[np.ndarray]:
    """Yields the host views of this process's parts of arrays spread over several."""
    for leaf in filter(_is_spread, jax.tree.leaves(state)):
        yield from (np.asarray(s.data) for s in _plain(leaf).addressable_shards)


def _is_spread(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    return not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def record(
    epoch: int, state: Params, cursor: dict[str, Any], views: Iterable[NamedView]
) -> dict[str, Any]:
    """Describes a checkpoint, with a checksum of the description itself.

    Args:
      epoch: the epoch of the checkpoint.
      state: the tree.
      cursor: JSON values.
      views: the output of `host_leaves(state)`.

    Returns:
      JSON values: program, epoch, cursor, leaves {name: [shape, dtype, crc32 or None]}
      and the crc32 of all of it.
    """
    shapes = _shapes(state)
    leaves = {
        name: [*shapes[name], None if view is None else _checksum(view)]
        for name, view in views
    }
    found = {"program": _PROGRAM, "epoch": epoch, "cursor": cursor, "leaves": leaves}
    found = json.loads(json.dumps(found))  # as it will be read back
    return found | {"checksum": _json_checksum(found)}


def parse(content: bytes, epoch: int) -> dict[str, Any]:
    """Reads a record back.

    Args:
      content: the bytes of the JSON file.
      epoch: the epoch that the name of its directory promises.

    Returns:
      The record without its checksum.

    Raises:
      ValueError: it is not the record of this epoch, or its bytes have changed.
    """
    found = json.loads(content)
    if not isinstance(found, dict) or found.get("program") != _PROGRAM:
        raise ValueError(f"no record of this program ({_PROGRAM})")
    if found.pop("checksum", None) != _json_checksum(found):
        raise ValueError("its bytes are not those that were saved")
    if found["epoch"] != epoch:
        raise ValueError(f"it is the record of epoch {found['epoch']}")
    return found


def first_difference(
    found: dict[str, Any], state: Params, owner: str = "this configuration"
) -> tuple[str, str, str] | None:
    """Compares a record with a tree, abstract or not, by names, shapes and dtypes.

    Args:
      found: the record.
      state: the tree.
      owner: whose tree it is, for the text.

    Returns:
      (leaf, got, wanted) of the first difference in the order of the tree, or None.
    """
    saved, wanted = found["leaves"], _shapes(state)
    for name in list(wanted) + [name for name in saved if name not in wanted]:
        got = saved[name][:2] if name in saved else None
        want = wanted.get(name)
        if got != want:
            here = _text(got, "the checkpoint"), _text(want, owner)
            return name, *here
    return None


def first_corrupt(found: dict[str, Any], state: Params) -> str | None:
    """Returns the first leaf whose bytes differ from those recorded, or None."""
    for name, view in host_leaves(state):
        wanted = found["leaves"][name][2]
        if view is None or wanted is None:
            continue
        if _checksum(view) != wanted:
            return name
    return None


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _plain(leaf: Any) -> Any:
    typed = isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )
    return jax.random.key_data(leaf) if typed else leaf


def _shapes(tree: Params) -> dict[str, list]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        found[_name(path)] = [list(leaf.shape), str(leaf.dtype)]
    return found


def _text(leaf: list | None, owner: str) -> str:
    if leaf is None:
        return f"no such leaf in {owner}"
    return f"shape {tuple(leaf[0])}, {leaf[1]}, in {owner}"


def _checksum(view: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(view).reshape(-1).view(np.uint8).data)


def _json_checksum(found: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())
