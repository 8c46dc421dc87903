"""Files below a folder, behind links too; and the folder that a "~" stands for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ddrl_jax.errors import UserError


def walk(
    root: str | Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk` with links followed, but for links to a folder above them.

    Two links to one folder are two folders. A link that leads back to where it was
    reached from would have no end and is left out.

    Args:
      root: folder to begin with.
      onerror: is told of a folder that cannot be listed; without it these are empty.

    Yields:
      A folder's path, the names of the folders in it (what is taken out of this list
      is not entered) and those of its files, both sorted.
    """
    above: dict[str, frozenset[str]] = {}  # real folders on the way to one to come
    for top, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        way = above.pop(top, frozenset()) | {os.path.realpath(top)}
        inside = {name: os.path.join(top, name) for name in sorted(folders)}
        folders[:] = [f for f, at in inside.items() if os.path.realpath(at) not in way]
        yield top, folders, sorted(files)
        above |= {inside[name]: way for name in folders}


def spelt_out(path: str, key: str) -> Path:
    """The path with the home in place of its leading "~" or "~name".

    Args:
      path: as it was given.
      key: what it was given as, such as "--config.data.cache".

    Raises:
      UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as e:  # nobody of that name, or no HOME and an unknown user
        raise UserError(
            f"{key} begins with a home that is not known here",
            got=path,
            wanted="a path, or ~ where there is a home",
            way_out=f"write the folder in place of the ~ in {key}, or set HOME",
        ) from e
