"""Bytes of a tree of shapes on one device: as the shapes say, or in a TPU's tiles.

A TPU keeps an array in tiles, of 8 x 128 or so, and rounds it up to whole ones: latents
of 64 x 64 x 4 take twice what they hold. Which axes the tiles lie along is the
compiler's choice, which is asked for it.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout

from ddrl_jax.plan.target import unsaved

# Of a leaf by its id(): two of equal shape on equal devices are the same size.
Sizes = Mapping[int, int]
AS_SHAPED: Sizes = MappingProxyType({})


def bytes_per_device(tree: Any, sizes: Sizes = AS_SHAPED) -> int:
    """Bytes of a tree of shapes with shardings on the device that holds most.

    Args:
      tree: its leaves are shapes with shardings.
      sizes: of the leaves that take more than their shapes, from `laid_out`.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        known = sizes.get(id(leaf))
        total += math.prod(_shard(leaf)) * _item(leaf) if known is None else known
    return total


def laid_out(tree: Any) -> Sizes:
    """Bytes that each leaf takes on a device, by the compiler of its devices.

    That lays out the arguments of every program by their shapes alone, so one that does
    nothing tells of all.

    Args:
      tree: its leaves are shapes with shardings; they have to outlive the result.
    """
    leaves = list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())
    nothing = jax.jit(lambda *_: (), keep_unused=True)
    with unsaved():
        formats, _ = nothing.lower(*leaves).compile().input_formats
    pairs = zip(leaves, formats, strict=True)
    return {id(leaf): padded(leaf, found.layout) for leaf, found in pairs}


def padded(leaf: Any, layout: Layout) -> int:
    """Bytes of a device's part of a leaf in whole tiles.

    Args:
      leaf: a shape with a sharding.
      layout: of its compiled program.
    """
    tile = layout.tiling[0] if layout.tiling else ()
    shape = [_shard(leaf)[axis] for axis in layout.major_to_minor]
    shape = [1] * (len(tile) - len(shape)) + shape
    outer = len(shape) - len(tile)
    whole = [-(-n // t) * t for n, t in zip(shape[outer:], tile, strict=True)]
    return math.prod((*shape[:outer], *whole)) * _item(leaf)


def _shard(leaf: Any) -> tuple[int, ...]:
    words = (2,) if _is_key(leaf) else ()
    return (*leaf.sharding.shard_shape(leaf.shape), *words)


def _item(leaf: Any) -> int:
    return 4 if _is_key(leaf) else np.dtype(leaf.dtype).itemsize


def _is_key(leaf: Any) -> bool:
    """Whether it is a key of threefry: two words of 32 bits."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
