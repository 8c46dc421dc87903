"""Which cache belongs to data that have not changed: then nothing of them is read.

The name of a cache is of all bytes of its data, and knowing it takes reading them all.
CACHES/seen/DIGEST.json names the cache of data whose files had these names, sizes and
times of change, so that a start that finds them as they were goes on at once.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddrl_jax.data.record_table import read_json, unwritable, write_json
from ddrl_jax.file_tree import walk


def files_digest(folder: Path) -> str:
    """Of names, sizes and times of change of all files below a folder, links followed.

    Args:
      folder: of the data.

    Returns:
      The digest; "" where no file is seen, as in a bucket: then nothing is known.
    """
    rows = [
        _row(folder, os.path.join(top, name))
        for top, _, files in walk(folder)
        for name in files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if rows else ""


def _row(folder: Path, path: str) -> list[Any]:
    name = os.path.relpath(path, folder)
    try:
        found = os.stat(path)
    except OSError:  # a broken link; the reader reports it
        return [name]
    return [name, found.st_size, found.st_mtime_ns]


def recall(caches: Path, key: Mapping[str, Any]) -> Path | None:
    """The complete cache that was remembered for this key, if it is still there.

    Args:
      caches: folder of all caches.
      key: JSON values: `files_digest` of the data and all that decides the bytes.
    """
    try:
        cache = caches / read_json(_place(caches, key))["cache"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never seen, or a line cut short: the data are read
    return cache if (cache / "cache.json").is_file() else None


def remember(caches: Path, key: Mapping[str, Any], cache: Path) -> None:
    """Notes which cache the data of this key have.

    Raises:
      UserError: the disk refuses.
    """
    place = _place(caches, key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(place.parent, e) from e
    write_json(place, {"cache": cache.name})


def _place(caches: Path, key: Mapping[str, Any]) -> Path:
    text = json.dumps(dict(key), sort_keys=True)
    return caches / "seen" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
