"""Rows of arrays of fixed shape in array_record shards: random access to any of them.

A row holds the little-endian bytes of its leaves one after the other; NAME.json says
which leaves. A shard gets its name when it is complete and on disk, so a writing that
was killed goes on after the last complete shard.
"""

import json
import math
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

SHARD = 512  # rows: 32 MB of SD latents in float16, 120 MB of CLIP texts in float32
OPEN_MAX = 10_240  # files, where no limit is named: what macOS grants at most
# Latents are noise to a compressor; one row a chunk makes one row cheap to read.
_OPTIONS = "group_size:1,uncompressed"

Rows = dict[str, np.ndarray]  # leaf -> [n ...]


def write_table(
    folder: Path,
    name: str,
    count: int,
    produce: Callable[[int, int], Rows],
    shard: int = SHARD,
) -> None:
    """Writes the rows of a table that are not in `folder` yet.

    Args:
      folder: an existing one.
      name: of the table.
      count: rows of the whole table.
      produce: (start, stop) -> those rows; called once for every missing shard.
      shard: rows of a shard but the last.

    Raises:
      UserError: the disk refuses, or the shapes differ from those already written.
    """
    card = folder / f"{name}.json"
    known = read_json(card) if card.exists() else None
    for start in range(0, count, shard):
        stop = min(start + shard, count)
        path = _shard_path(folder, name, start // shard)
        if known and _has_rows(path, stop - start):
            continue
        rows = {k: _little_endian(v) for k, v in produce(start, stop).items()}
        leaves = {k: [v.dtype.str, list(v.shape[1:])] for k, v in rows.items()}
        found = {"rows": count, "shard": shard, "leaves": leaves}
        if known is None:
            write_json(card, found)
            known = found
        if found != known:
            raise UserError(
                f"the rows {start} to {stop - 1} of {name!r} have other shapes than "
                f"those before them in {folder}",
                got=found,
                wanted=str(known),
                way_out=f"delete {folder} and start again",
            )
        _write_shard(path, rows)


class Table:
    """A table that `write_table` has written.

    Args:
      folder: where it lies.
      name: of the table.

    Raises:
      UserError: a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, name: str):
        # Slow import, only where data is read.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder, self.name = folder, name
        try:
            card = read_json(folder / f"{name}.json")
            self.rows: int = card["rows"]
            self.leaves = {
                k: (np.dtype(d), tuple(s)) for k, (d, s) in card["leaves"].items()
            }
            shards = range(math.ceil(self.rows / card["shard"]))
            paths = [str(_shard_path(folder, name, k)) for k in shards]
            _allow_files()  # it keeps every shard open that was read once
            self._records: Any = ArrayRecordDataSource(paths)
            if len(self._records) != self.rows:
                raise ValueError(f"{len(self._records)} rows instead of {self.rows}")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            raise damaged(folder, e) from e

    def read(self, records: Int[np.ndarray, " b"]) -> Rows:
        """Reads rows by index, in the order asked for; safe in threads.

        Raises:
          UserError: their bytes are not those that were written.
        """
        try:
            found = self._records.__getitems__([int(r) for r in records])
        except (RuntimeError, OSError) as e:
            if "Too many open files" in str(e):
                raise _too_many(self.folder, e) from e
            raise damaged(self.folder, e) from e
        raw = np.frombuffer(b"".join(found), np.uint8).reshape(len(records), -1)
        rows, at = {}, 0
        for leaf, (dtype, shape) in self.leaves.items():
            size = dtype.itemsize * math.prod(shape)
            part = np.ascontiguousarray(raw[:, at : at + size])
            rows[leaf] = part.view(dtype).reshape(len(records), *shape)
            at += size
        return rows


def _allow_files() -> None:
    """Raises the number of files that this process may have open as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_MAX if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _too_many(folder: Path, e: Exception) -> UserError:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"the cache {folder} has more shards than this process may have files open",
        got=f"{e}; a limit of {limit}",
        wanted="an open file for every shard",
        way_out="have the hard limit raised (ulimit -Hn shows it; docker run --ulimit "
        "nofile=N, LimitNOFILE of systemd and limits.conf set it); nothing is wrong "
        "with the cache",
    )


def damaged(folder: Path, why: object) -> UserError:
    """The error for a cache whose files are not as they were written."""
    return UserError(
        f"the cache {folder} is damaged",
        got=f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why,
        wanted="the files as they were written",
        way_out="delete this folder; it is made anew from the data",
    )


def unwritable(path: Path, e: Exception) -> UserError:
    """The error for a disk that refuses; what is complete stays for the next start."""
    return UserError(
        f"the cache {path} can not be written",
        got=f"{type(e).__name__}: {e}",
        wanted="a writable folder with enough space",
        way_out="make room or set --config.data.cache, and start again: complete "
        "shards are kept",
    )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file at once: it is there complete or not at all.

    Raises:
      UserError: the disk refuses.
    """
    # Two runs that saw the same data may note it at the same moment.
    scratch = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
        _settle(scratch, path)
    except OSError as e:
        raise unwritable(path, e) from e


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return parse_json(path.read_text(encoding="utf-8"))


def _shard_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.array_record"


def _little_endian(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))


def _has_rows(path: Path, count: int) -> bool:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return ArrayRecordReader(str(path)).num_records() == count
    except RuntimeError:  # not there, or cut off
        return False


def _write_shard(path: Path, rows: Rows) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    scratch = path.with_name(path.name + ".tmp")
    try:
        writer = ArrayRecordWriter(str(scratch), _OPTIONS)
        for leaves in zip(*rows.values(), strict=True):
            writer.write(b"".join(leaf.tobytes() for leaf in leaves))
        writer.close()
        _settle(scratch, path)
    except (OSError, RuntimeError) as e:
        raise unwritable(path, e) from e


def _settle(scratch: Path, path: Path) -> None:
    """Gives a file its name once its bytes are on disk."""
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
