"""The folder of one run: its config, its lock and the names of what lies in it."""

import errno
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ddrl_jax.config_difference import (
    differing_keys,
    flattened,
    listed,
    nested,
    way_back,
)
from ddrl_jax.distributed import check_shared, is_main, main_first
from ddrl_jax.errors import UserError
from ddrl_jax.lock import Lock
from ddrl_jax.start_note import note_start
from ddrl_jax.text import parse_json


class Workdir:
    """The paths of a run; hold it open for as long as the run writes there.

    `os.fspath` of it is the folder. Made by `open_workdir`.
    """

    def __init__(self, root: Path, lock: Lock | None = None):
        self.root = root
        self._lock = lock

    @property
    def config(self) -> Path:
        """The configuration of the run, canonical JSON."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.root / "metrics.jsonl"

    @property
    def discarded(self) -> Path:
        """Metrics of epochs that a restart ran again; see `ddrl_jax.metrics_file`."""
        return self.root / "metrics.discarded.jsonl"

    @property
    def starts(self) -> Path:
        """One JSON object a start: date, command, machine and versions."""
        return self.root / "starts.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of `ddrl_jax.checkpoint.Checkpoints`."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of the pictures."""
        return self.root / "samples"

    @property
    def evaluations(self) -> Path:
        """The folder of the pictures of --mode=evaluate: no part of the run."""
        return self.root / "evaluations"

    def __fspath__(self) -> str:
        return str(self.root)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run use the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None


def open_workdir(
    path: str | os.PathLike,
    config: Any,
    *,
    exclusive: bool = True,
    mode: str = "train",
) -> Workdir:
    """Creates the folder of a run, or takes up the one that is there.

    Args:
      path: the folder.
      config: the ConfigDict of the run, or its `to_dict()`.
      exclusive: lock the folder, compare and store the config, note this start. False
        only reads beside a run (the folder must exist).
      mode: in which this start works; another one than "train" leaves the config of a
        run that has begun as it is, and may have other prompts.

    Raises:
      UserError: the folder can not be created or written, another run is using it, or
        it belongs to a run with another config.
    """
    root = Path(path).absolute()
    if not exclusive:
        if not root.is_dir():
            raise _unusable(root, "no such folder", "the workdir of an earlier run")
        return Workdir(root)
    workdir = main_first(
        lambda: _take(root, config, mode) if is_main() else Workdir(root)
    )
    check_shared(workdir.starts)  # that process 0 has just written to
    return workdir


def _take(root: Path, config: Any, mode: str) -> Workdir:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = Lock(root / ".lock")
    except OSError as error:
        raise _unusable(
            root, error, "a folder that can be created and written"
        ) from error
    workdir = Workdir(root, lock)
    try:
        _settle_config(workdir, flattened(config), keep=mode != "train")
        note_start(workdir.starts, mode)
    except OSError as error:
        workdir.close()
        raise _unusable(root, error, "a folder that can be written") from error
    except BaseException:
        workdir.close()
        raise
    return workdir


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves either the old one or the new one.

    Args:
      path: of the file.
      content: all of it.
    """
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _settle_config(workdir: Workdir, wanted: dict[str, Any], keep: bool) -> None:
    """Compares and writes the config; `keep` that of a run that has begun."""
    if not workdir.config.exists():
        foreign = [p.name for p in (workdir.checkpoints, workdir.metrics) if p.exists()]
        if foreign:
            raise UserError(
                f"{workdir.root} holds a run without its config.json",
                got=", ".join(foreign),
                wanted="an empty folder, or one with the config.json of its run",
                way_out="put config.json back, or use another --workdir",
            )
    else:
        begun = keep and _begun(workdir)
        _compare_config(workdir, wanted, ("prompts.",) if begun else ())
        if begun:
            return
    text = json.dumps(nested(wanted), indent=2, sort_keys=True) + "\n"
    replace_file(workdir.config, text.encode())


def _begun(workdir: Workdir) -> bool:
    """Whether there is something in the folder that belongs to its configuration.

    A start that was refused by its data, prompts or judges leaves none: the command may
    be mended.
    """
    metrics = workdir.metrics.exists() and workdir.metrics.stat().st_size > 0
    saved = workdir.checkpoints.is_dir() and any(workdir.checkpoints.iterdir())
    return metrics or saved


def tell_differences(
    workdir: Workdir, config: Any, but: tuple[str, ...], never: tuple[str, ...] = ()
) -> None:
    """Says on stderr where a config is not the one of the run that it looks at.

    Args:
      workdir: of the run.
      config: of this command.
      but: sections ("evaluate.") and keys that this command is free to set.
      never: sections that it may not set otherwise than the run, but for those keys.

    Raises:
      UserError: there is no run, or a key of `never` differs.
    """
    if not workdir.config.exists():
        raise UserError(
            f"{workdir.root} holds no run",
            got="a folder without config.json",
            wanted="a workdir of --mode=train",
            way_out="correct --workdir, or train first",
        )
    found = differing_keys(_stored(workdir), flattened(config))
    found = {key: pair for key, pair in found.items() if not key.startswith(but)}
    if wrong := {key: pair for key, pair in found.items() if key.startswith(never)}:
        raise UserError(
            f"{workdir.root} holds a run of another model",
            got="\n           ".join(listed(wrong)),
            wanted="the model that the run trained, as its config.json has it"
            + ", and its seed, from which random weights are drawn" * ("seed" in wrong),
            way_out="give the flags that the run was started with",
        )
    if found and is_main():
        head = f"not as the run in {workdir.root} was trained:"
        print("\n  ".join((head, *listed(found))), file=sys.stderr, flush=True)


def _stored(workdir: Workdir) -> dict[str, Any]:
    try:
        return flattened(parse_json(workdir.config.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{workdir.config} is not readable",
            got=error,
            wanted="the JSON that this program wrote",
            way_out="put it back, or use another --workdir",
        ) from error


def _compare_config(workdir: Workdir, wanted: dict, but: tuple[str, ...]) -> None:
    """Refuses another config where a run has begun, else says what replaces it."""
    found = differing_keys(_stored(workdir), wanted)
    found = {key: pair for key, pair in found.items() if not key.startswith(but)}
    if found and _begun(workdir):
        raise UserError(
            f"{workdir.root} holds a run with another config",
            got="\n           ".join(listed(found)),
            wanted="the config stored in its config.json",
            way_out=way_back(found),
        )
    if found:
        head = f"in place of a start that came to nothing in {workdir.root}:"
        print("\n  ".join((head, *listed(found))), file=sys.stderr, flush=True)


def _unusable(root: Path, got: object, wanted: str) -> UserError:
    full = isinstance(got, OSError) and got.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(
        f"the workdir {root} can not be used",
        got=got,
        wanted="a disk with room" if full else wanted,
        way_out="make room and run the same command again"  # a run there goes on
        if full
        else "name another folder with --workdir",
    )
