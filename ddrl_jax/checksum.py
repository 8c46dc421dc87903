"""Checksums of arrays that no process holds whole, the same on any mesh.

    checksum(a) = sum_i word_i k(i) mod 2^64

over the words of at most 32 bits of an array in C order, i the position of a word in
the whole array and k(i) an odd number mixed from i: a changed word always changes the
sum, and words that change places almost always. A sum has no order, so each process
adds up the parts it holds, and the sums of the processes are added.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.distributed import every

_BLOCK = 1 << 13  # words at a time: what is computed of them stays in the cache
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, spreads neighbouring positions
_WORD = 4  # bytes


class Part(NamedTuple):
    """A part of an array that this process holds.

    Attributes:
      data: its values; on a CPU the buffer itself.
      start: position of its first value along each axis of the whole.
      shape: of the whole.
      holders: the processes that hold this part, ascending.
    """

    data: np.ndarray
    start: tuple[int, ...]
    shape: tuple[int, ...]
    holders: tuple[int, ...]


def host_parts(leaf: Any) -> list[Part]:
    """Returns the parts of an array on this process, each once, as host views.

    Args:
      leaf: a jax.Array, typed PRNG keys included, or what every process has whole.
    """
    if not isinstance(leaf, jax.Array):
        whole = np.asarray(leaf)
        everybody = tuple(range(jax.process_count()))
        return [Part(whole, (0,) * whole.ndim, whole.shape, everybody)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    holders: dict[tuple[int, ...], set[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        holders.setdefault(_start(index), set()).add(device.process_index)
    own = sorted(leaf.addressable_shards, key=lambda shard: -shard.replica_id)
    found = {_start(shard.index): shard.data for shard in own}  # the lowest replica
    return [
        Part(np.asarray(data), start, leaf.shape, tuple(sorted(holders[start])))
        for start, data in sorted(found.items(), key=lambda pair: pair[0])
    ]


def checksums(leaves: Iterable[list[Part]]) -> list[int | None]:
    """Returns the checksum of each array; every process has to call it.

    None stands for an array of which two processes hold other copies of one part.

    Args:
      leaves: the output of `host_parts` for each.
    """
    here = jax.process_index()
    with ThreadPoolExecutor() as pool:  # NumPy lets other threads run meanwhile
        own = list(pool.map(lambda parts: _own_sums(parts, here), leaves))
    table = every(np.array(own, np.uint64).reshape(-1, 2)).sum(0)
    return [None if balance else int(total) for total, balance in table]


def _own_sums(parts: list[Part], here: int) -> tuple[int, int]:
    """What this process adds to a checksum, and to a sum that is 0 if copies agree."""
    total = balance = 0
    for data, start, shape, holders in parts:
        found = part_sum(data, start, shape)
        first = holders[0] == here
        total += found if first else 0
        balance += found * (1 - len(holders) if first else 1)
    return total % 2**64, balance % 2**64


def part_sum(data: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Returns what one part adds to the checksum of the whole; see `Part`."""
    bytes_each = min(data.dtype.itemsize, _WORD)
    per_value = data.dtype.itemsize // bytes_each
    flat = np.ascontiguousarray(data).reshape(-1).view(f"u{bytes_each}")
    held, start, shape = (*data.shape, per_value), (*start, 0), (*shape, per_value)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # From the last axis that is cut on, what is held lies in one run of the whole.
    cut = max((a for a, n in enumerate(held) if n != shape[a]), default=0)
    first = np.array(start[cut] * strides[cut], np.uint64)
    for axis in range(cut):
        places = np.arange(start[axis], start[axis] + held[axis], dtype=np.uint64)
        first = np.add.outer(first, places * np.uint64(strides[axis]))
    words = flat.reshape(first.size, math.prod(held[cut:]))
    return _weighted_sum(words, first.reshape(-1, 1))


def _weighted_sum(words: np.ndarray, first: np.ndarray) -> int:
    """Sum of words [rows run] times k(first [rows 1] + their place in the run)."""
    rows, run = words.shape
    step = max(1, _BLOCK // max(run, 1))
    total = 0
    for column in range(0, run, _BLOCK):
        places = np.arange(column, min(column + _BLOCK, run), dtype=np.uint64)
        for row in range(0, rows, step):
            k = (first[row : row + step] + places) * np.uint64(_GOLDEN)
            k ^= k >> np.uint64(32)
            k |= np.uint64(1)
            k *= words[row : row + step, column : column + _BLOCK]
            total += int(k.sum())
    return total % 2**64


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.start or 0 for s in index)
