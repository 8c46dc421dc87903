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


def with_home(path: str) -> str:
    """As `spelt_out`, but a path in a home that is not known here stays as it is."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a name that no user can have
        return path


def spelt_out(path: str, key: str) -> str:
    """The path with the home in place of its leading "~" or "~name".

    Args:
      path: as it was given.
      key: what it was given as, such as "--config.data.cache".

    Raises:
      UserError: there is no such home.
    """
    found = with_home(path)
    if not found.startswith("~"):
        return found
    home = path.split("/")[0]
    mend = "set HOME" if home == "~" else "correct the name"
    # Taken as it is, it would become a folder of that odd name.
    raise UserError(
        f"{key} begins with a home that is not known here",
        got=path,
        wanted="a path, ~ where there is a home, or ~NAME of a user of this machine",
        way_out=f"write the folder in place of {home} in {key}, or {mend}",
    )
