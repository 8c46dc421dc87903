"""Checkpoints: a tree of arrays and a JSON cursor an epoch, saved in the background.

A checkpoint is a directory `ROOT/EPOCH` that Orbax writes under another name and
renames when it is complete, so a killed run leaves the previous ones untouched. Its
JSON record holds the cursor and, of every leaf, the shape, the dtype and a checksum
of the bytes: what is read back is what was written, or there is one error.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddrl_jax import fingerprint, orbax_log
from ddrl_jax.distributed import every, every_text, is_main, numbers_of_main
from ddrl_jax.errors import UserError
from ddrl_jax.fingerprint import abstract as abstract
from ddrl_jax.interfaces import Params

_AVERAGE = "train/ema/"  # of the learner's state, in the names of leaves
_TRACKER = "tracker/"  # its rows are prompts, and a reader may have others
_ASIDE = "damaged"  # where resume=last_good moves what it skipped
_RECORD = Path("cursor", "metadata")  # where Orbax puts the JSON item


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the epoch, the state and the cursor."""

    epoch: int
    state: Params
    cursor: dict[str, Any]


class _Damaged(Exception):
    """This checkpoint can not be read back as it was written."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      root: their directory; created by the first save.
      every: epochs between two saves; 0 saves only where `force` is set.
      keep: how many are kept; older ones are deleted after a newer one is complete.
      read_only: never writes, moves or cleans anything (evaluation beside a run).
    """

    def __init__(
        self, root: str | os.PathLike, every: int, keep: int, *, read_only: bool = False
    ):
        self.root = Path(root).absolute()
        self.every, self.keep, self.read_only = every, keep, read_only
        self.skipped: list[tuple[int, str]] = []
        self._known: set[int] = set()  # epochs this run wrote or restored
        self._pending: int | None = None
        self._held: list[Any] = []
        self._bytes = 0
        self._manager: ocp.CheckpointManager | None = None
        orbax_log.drop_own_log()

    def save(
        self, epoch: int, state: Params, cursor: dict[str, Any], force: bool = False
    ) -> bool:
        """Starts to save in the background, after the save before it is complete.

        Args:
          epoch: how many epochs are done; the name of the checkpoint.
          state: everything on device that influences the future; no empty arrays.
          cursor: everything else, as JSON values; comes back as JSON gives it (tuples
            as lists, integer keys as strings).
          force: save whatever `every` says (SIGTERM, the last epoch).

        Returns:
          Whether a save was started; False too where this run has this epoch already.

        Raises:
          UserError: the disk refused this save or the one before it, or a checkpoint
            of this epoch exists that this run neither wrote nor restored.
        """
        if not force and (self.every <= 0 or epoch % self.every != 0):
            return False
        self.wait()
        if epoch in self._known:
            return False
        if epoch in self.epochs():
            raise UserError(
                f"the checkpoint {self.root / str(epoch)} exists already",
                got="one that this run neither wrote nor restored",
                wanted="no checkpoint of this epoch",
                way_out="resume from it, or start in another --workdir",
            )
        # The host views stay referenced until the save is complete: on a CPU they are
        # the buffers themselves, and XLA copies instead of donating what is referenced.
        held = fingerprint.parts(state)
        self._held = [part.data for parts in held.values() for part in parts]
        self._bytes = sum(view.nbytes for view in self._held)
        record = fingerprint.record(epoch, state, cursor, held)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), cursor=ocp.args.JsonSave(record)
        )
        try:
            self._pending = epoch
            self._open().save(epoch, args=args, force=True)
        except Exception as error:  # Orbax and TensorStore raise many types
            self._raise_write_error(error)
        return True

    def wait(self) -> None:
        """Blocks until the save in progress is on disk.

        Raises:
          UserError: it could not be written (full disk, lost permission).
        """
        if self._pending is None or self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many types
            self._raise_write_error(error)
        self._known.add(self._pending)
        self._pending, self._held = None, []

    def restore(
        self,
        abstract_state: Params,
        which: str = "latest",
        check: Callable[[dict[str, Any]], None] = lambda cursor: None,
    ) -> Restored | None:
        """Reads a checkpoint back, onto the shardings of `abstract_state`.

        Args:
          abstract_state: the tree of `abstract`.
          which: "latest", or "last_good": skips damaged ones (moved to ROOT/damaged).
          check: is given the cursor before any array is looked at, and may refuse it.

        Returns:
          (epoch, state, cursor), or None where there is no checkpoint.

        Raises:
          UserError: the newest is damaged (which="latest"), foreign, or none is whole.
        """
        if which not in ("latest", "last_good"):
            raise ValueError(f"which is {which!r}, not latest or last_good")
        # Those that process 0 sees: a shared file system may show others an older list.
        epochs = numbers_of_main(self.epochs())
        if not epochs:
            self._refuse_foreign_root()
            return None
        self.skipped = []
        for epoch in reversed(epochs):
            try:
                restored = self._read_everywhere(epoch, abstract_state, check)
            except _Damaged as reason:
                if self.read_only and numbers_of_main(self.epochs()) != epochs:
                    return self.restore(abstract_state, which, check)  # the run goes on
                if which == "latest":
                    raise self._damaged(epoch, reason, epochs) from None
                self.skipped.append((epoch, str(reason)))
                continue
            self._report_skipped(epoch)
            self._known.add(epoch)
            return restored
        raise UserError(
            f"no checkpoint in {self.root} is whole",
            got="; ".join(f"epoch {epoch}: {why}" for epoch, why in self.skipped),
            wanted="at least one that reads back as it was saved",
            way_out="restore one from a backup, or start in another --workdir",
        )

    def epochs(self) -> list[int]:
        """Returns the epochs that have a checkpoint directory, whole or not, sorted."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def latest(self) -> int | None:
        """Returns the newest epoch that has a checkpoint directory, or None."""
        return max(self.epochs(), default=None)

    def close(self) -> None:
        """Waits for the save in progress and lets go of the directory.

        Raises:
          UserError: the last save could not be written.
        """
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        assert not self.read_only, "it only reads"
        if self._manager is None:
            keep = ocp.checkpoint_managers.LatestN(self.keep)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.root, options=options)
        return self._manager

    def _read(self, epoch: int, abstract_state: Params, check) -> tuple[dict, Params]:
        """The record and the state, with bytes that nobody has looked at yet."""
        path = self.root / str(epoch)
        record = _read_record(path, epoch)
        check(record["cursor"])
        if self.read_only:
            abstract_state = fingerprint.reshaped(record, abstract_state, _TRACKER)
        if different := fingerprint.first_difference(record, abstract_state):
            raise _foreign(path, *different)
        state = self._read_state(epoch, abstract_state)
        changed = fingerprint.first_difference(record, state, "memory")
        if changed is not None:
            # Without one of its metadata files Orbax gives a PRNG key as plain numbers.
            raise _Damaged(f"{changed[0]} came back as {changed[2]}")
        return record, state

    def _read_everywhere(self, epoch: int, abstract_state: Params, check) -> Restored:
        """What was read; all processes find the checkpoint damaged, or none."""
        reason, record, state = "", {}, None
        try:
            record, state = self._read(epoch, abstract_state, check)
        except _Damaged as damage:
            reason = str(damage)
        for process, why in enumerate(every_text(reason)):
            if why:
                who = f"process {process}: " if jax.process_count() > 1 else ""
                raise _Damaged(who + why)
        if fingerprint.is_old(record):
            _tell(
                f"{self.root / str(epoch)} was saved by an older version: its bytes "
                "are taken as they are, without a checksum"
            )
            return Restored(epoch, state, record["cursor"])
        if (bad := fingerprint.first_corrupt(record, state)) is not None:
            raise _Damaged(f"the bytes of {bad} are not those that were saved")
        return Restored(epoch, state, record["cursor"])

    def _read_state(self, epoch: int, abstract_state: Params) -> Params:
        # Not through the manager: after a restore it lets the processes meet, and one
        # that could not read its part does not come.
        handler = ocp.StandardCheckpointHandler()
        args = ocp.args.StandardRestore(abstract_state)
        path = epath.Path(self.root / str(epoch) / "state")
        quiet = orbax_log.hook_without_late_reads()
        hook, sys.unraisablehook = sys.unraisablehook, quiet
        try:
            state = handler.restore(path, args=args)
        except Exception as error:  # Orbax and TensorStore raise many types
            orbax_log.drop_late_reads(self.root)
            raise _Damaged(orbax_log.first_line(error)) from None
        sys.unraisablehook = hook  # not after a failure: callbacks are still to come
        return state

    def _raise_write_error(self, error: Exception) -> None:
        failed, self._pending, self._held = self._pending, None, []
        if not orbax_log.is_write_fault(error):
            raise error
        free = shutil.disk_usage(self.root if self.root.exists() else "/").free
        kept = [epoch for epoch in self.epochs() if epoch != failed]
        last = f"epoch {max(kept)}" if kept else "the start"
        raise UserError(
            f"the checkpoint of epoch {failed} could not be written to {self.root}",
            got=f"{orbax_log.first_line(error)} ({free / 1e6:.0f} MB free)",
            wanted=f"a writable disk with about {self._bytes / 1e6:.0f} MB free",
            way_out="make room (of the checkpoints only the newest is needed) and run "
            f"the same command again: it goes on from {last}",
        ) from error

    def _damaged(self, epoch: int, reason: object, epochs: list[int]) -> UserError:
        older = ", ".join(str(e) for e in epochs if e < epoch) or "none"
        return UserError(
            f"the checkpoint {self.root / str(epoch)} is damaged or of another program",
            got=reason,
            wanted="a checkpoint that reads back as it was saved",
            way_out="--config.checkpoint.resume=last_good goes on from the newest "
            f"whole one (older here: {older}); or start in another --workdir",
        )

    def _report_skipped(self, used: int) -> None:
        for epoch, why in self.skipped if is_main() else ():
            path, moved = self.root / str(epoch), ""
            if not self.read_only:
                moved = f"; moved to {_move_aside(path)}"
            _tell(f"skipped the damaged checkpoint {path}: {why}{moved}")
        if self.skipped:
            _tell(f"resuming from {self.root / str(used)}")
            every(np.zeros(1))  # nobody goes on before they are moved

    def _refuse_foreign_root(self) -> None:
        if not self.root.is_dir():
            return
        ours = re.compile(rf"\..*|{_ASIDE}|\d+\.orbax-checkpoint-tmp.*")
        names = sorted(path.name for path in self.root.iterdir())
        if found := [name for name in names if not ours.fullmatch(name)]:
            raise UserError(
                f"{self.root} holds files of another program and no checkpoint",
                got=", ".join(found[:5]),
                wanted="directories named after epochs, or an empty directory",
                way_out="use another --workdir",
            )


def _read_record(path: Path, epoch: int) -> dict[str, Any]:
    try:
        return fingerprint.parse((path / _RECORD).read_bytes(), epoch)
    except (OSError, ValueError) as error:
        raise _Damaged(f"{path / _RECORD}: {orbax_log.first_line(error)}") from None


def _foreign(path: Path, leaf: str, got: str, wanted: str) -> UserError:
    if leaf.startswith(_AVERAGE) and wanted.startswith("no such leaf"):
        return UserError(
            f"the checkpoint {path} holds an average of the weights",
            got=f"{leaf}: {got}",
            wanted="none, as optimizer.ema_decay is 0",
            way_out="it was written by an older version, or with an average: finish "
            "the run there, or start in another --workdir",
        )
    return UserError(
        f"the checkpoint {path} is of another model: the first difference is {leaf}",
        got=got,
        wanted=wanted,
        way_out="use the config it was trained with (config.json of the workdir), or "
        "another --workdir",
    )


def _move_aside(path: Path) -> Path:
    folder = path.parent / _ASIDE
    folder.mkdir(exist_ok=True)
    names = (f"{path.name}-{n}" if n else path.name for n in range(10_000))
    target = next(folder / name for name in names if not (folder / name).exists())
    return path.rename(target)


def _tell(line: str) -> None:
    if is_main():
        print(line, file=sys.stderr, flush=True)
