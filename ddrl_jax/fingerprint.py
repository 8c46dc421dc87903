"""What a checkpoint must give back: shape, dtype and checksum of every leaf."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ddrl_jax.checksum import Part, checksums, host_parts
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params
from ddrl_jax.text import parse_json

_FORMAT = "ddrl_jax checkpoint, format 2"
_OLD = "ddrl_jax checkpoint, format 1"  # its checksums are of another kind


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


def parts(state: Params) -> dict[str, list[Part]]:
    """Returns what this process holds of each leaf of a tree, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): host_parts(leaf) for path, leaf in leaves}


def record(
    epoch: int, state: Params, cursor: dict[str, Any], held: Mapping[str, list[Part]]
) -> dict[str, Any]:
    """Describes a checkpoint, with a checksum of the description itself.

    Every process has to call it and finds the same checksums; of the cursor, which
    holds times, what process 0 writes counts.

    Args:
      epoch: the epoch of the checkpoint.
      state: the tree.
      cursor: JSON values.
      held: the output of `parts(state)`.

    Returns:
      JSON values: program, epoch, cursor, leaves {name: [shape, dtype, checksum]} and
      the crc32 of all of it.

    Raises:
      UserError: the processes do not hold the same.
    """
    sums = dict(zip(held, checksums(held.values()), strict=True))
    apart = [name for name, checksum in sums.items() if checksum is None]
    if apart:
        raise UserError(
            "the processes of the run hold different copies of its state",
            got=", ".join(apart[:5]),
            wanted="the same bits wherever a part of an array is held twice",
            way_out="run the same command again: it goes on from the last checkpoint",
        )
    leaves = {name: [*found, sums[name]] for name, found in _shapes(state).items()}
    found = {"program": _FORMAT, "epoch": epoch, "cursor": cursor, "leaves": leaves}
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
    found = parse_json(content)
    if not isinstance(found, dict) or found.get("program") not in (_FORMAT, _OLD):
        raise ValueError(f"no record of this program ({_FORMAT})")
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


def reshaped(found: dict[str, Any], state: Params, begin: str) -> Params:
    """The abstract tree with the shapes that a record has of some of its leaves.

    Args:
      found: the record.
      state: the abstract tree.
      begin: of the names of these leaves.
    """

    def like(path: Any, leaf: Any) -> Any:
        name = _name(path)
        if not name.startswith(begin) or name not in found["leaves"]:
            return leaf
        shape = tuple(found["leaves"][name][0])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(like, state)


def is_old(found: dict[str, Any]) -> bool:
    """Whether a record is of the version whose checksums are not read any more."""
    return found["program"] == _OLD


def first_corrupt(found: dict[str, Any], state: Params) -> str | None:
    """Returns the first leaf whose bytes differ from those recorded, or None.

    Every process has to call it, and finds the same.
    """
    held = parts(state)
    for name, checksum in zip(held, checksums(held.values()), strict=True):
        if checksum is None or checksum != found["leaves"][name][2]:
            return name
    return None


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def _json_checksum(found: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())
