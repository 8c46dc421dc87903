"""One run a folder, also where the folder is on a shared file system.

The kernel's lock alone is not enough there: NFS keeps the lock of a machine that has
vanished, Lustre may have none at all. So the file also says who holds it, and the
holder beats: a count in it goes up. A holder of another machine that does not beat is
gone. No clock is compared with another: who waits looks whether the count moves.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ddrl_jax.errors import EXIT_ERROR, UserError
from ddrl_jax.text import parse_json

SIZE = 400  # bytes of the file, always: a beat needs no room on a full disk


class Pace(NamedTuple):
    """The seconds of a lock.

    Attributes:
      beat: between two beats of a holder.
      stale: without a beat until a holder of another machine counts as gone; also more
        than the 60 s for which NFS may show an old file.
      patience: until a holder that does beat is no longer waited for: a run that was
        told to end may be saving.
      look: between two looks at another's lock.
    """

    beat: float = 15.0
    stale: float = 75.0
    patience: float = 120.0
    look: float = 1.0


PACE = Pace()


class Lock:
    """The lock of a folder, held from the start until `close`.

    Args:
      path: of its file.
      pace: in seconds.
      say: prints a line for the user.
      lost: called in the thread of the beats, with why, when another run has taken the
        lock over or its file is removed; by default it ends this process.

    Raises:
      UserError: a living run holds it.
      OSError: the file can not be written.
    """

    def __init__(
        self,
        path: Path,
        pace: Pace = PACE,
        say: Callable[[str], None] | None = None,
        lost: Callable[[str], None] | None = None,
    ):
        self._path, self._pace = path, pace
        self._say, self._lost = say or _print, lost or _end
        self._me = _identity()
        self._count = 0
        self._handle = _open(path)
        try:
            self._acquire()
            self._beat()
        except BaseException:
            os.close(self._handle)
            raise
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets another run have the folder, at once."""
        self._done.set()
        self._thread.join(self._pace.beat)
        try:
            if self._is_mine():
                os.ftruncate(self._handle, 0)
        finally:
            os.close(self._handle)

    def _acquire(self) -> None:
        owner = _read(self._path)
        if self._is_free(owner):
            return
        if owner is not None and _lives_here(owner, self._me):
            raise _taken(self._path, owner)
        self._say(
            f"{self._path.parent} is in use by {_name(owner)}; waiting up to "
            f"{max(self._pace.patience, self._pace.stale):.0f} s for its end"
        )
        self._wait(owner)

    def _wait(self, owner: dict[str, Any] | None) -> None:
        """Returns when the lock is free or its holder gone."""
        pace = self._pace
        begin = moved = time.monotonic()
        while True:
            time.sleep(pace.look)
            before, owner = owner, _read(self._path)
            now = time.monotonic()
            os.close(self._handle)  # the path may have another file by now
            self._handle = _open(self._path)
            if self._is_free(owner):
                return
            moved = moved if owner == before else now
            if owner is not None and now - moved >= pace.stale:
                self._take_over(owner)
                return
            beats = owner is None or now - moved < 2 * pace.beat
            if now - begin >= pace.patience and beats:
                raise _taken(self._path, owner)

    def _is_free(self, owner: dict[str, Any] | None) -> bool:
        """Whether nobody has the lock; then the kernel's is ours, if there is one."""
        kernels = _flock(self._handle)
        if kernels is False or not (owner is None or _is_dead_here(owner, self._me)):
            return False
        if kernels is None:
            self._beat()
            self._verify()
        return True

    def _verify(self) -> None:
        """Of several that write at once the last one wins: the others see it now."""
        time.sleep(2 * self._pace.look)
        if not self._is_mine():
            raise _taken(self._path, _read(self._path))

    def _take_over(self, owner: dict[str, Any]) -> None:
        """Puts a new file in the place of one whose holder is gone."""
        draft = self._path.with_name(f"{self._path.name}.{self._me['token']}")
        os.close(self._handle)
        self._handle = _open(draft)
        _flock(self._handle)
        self._beat()
        draft.replace(self._path)
        self._verify()
        self._say(f"took over the lock of {_name(owner)}, which has gone silent")

    def _beat(self) -> None:
        self._count += 1
        text = json.dumps({**self._me, "beat": self._count})
        os.pwrite(self._handle, text.encode().ljust(SIZE)[:SIZE], 0)
        os.fsync(self._handle)

    def _is_mine(self) -> bool:
        owner = _read(self._path)
        return owner is not None and owner.get("token") == self._me["token"]

    def _keep(self) -> None:
        told = False
        while not self._done.wait(self._pace.beat):
            owner = _read(self._path)
            if owner is not None and owner.get("token") != self._me["token"]:
                self._lost(f"{_name(owner)} has taken over the workdir")
                return
            try:
                if os.fstat(self._handle).st_nlink == 0:
                    self._lost(f"{self._path.parent} was removed")
                    return
                self._beat()
            except OSError as error:  # the next beat may succeed
                if not told:
                    self._say(f"the lock can not be kept up: {error}")
                told = True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _flock(handle: int) -> bool | None:
    """True: the kernel's lock is ours. False: another's. None: it has none to give."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return None
        raise
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where nobody does or the file is not (yet) a lock's."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "token" in found else None


def _identity() -> dict[str, Any]:
    """This process, as no other one is described, on whatever machine."""
    return {
        "host": socket.gethostname()[:64],
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "token": os.urandom(8).hex(),
    }


def _machine() -> str:
    """A machine since it was started, and the container: host names are used again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process was started, in ticks, for its number is given out again.

    Empty where it has ended, also if nobody has asked for its status yet.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _lives_here(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    if owner.get("machine") != me["machine"]:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return owner["started"] == _started(owner["pid"])


def _is_dead_here(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    return owner.get("machine") == me["machine"] and not _lives_here(owner, me)


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "an unknown process"
    return f"process {owner['pid']} on {owner['host']}"


def _taken(path: Path, owner: dict[str, Any] | None) -> UserError:
    return UserError(
        f"another run is using {path.parent}",
        got=f"a lock held by {_name(owner)}",
        wanted="one run a workdir",
        way_out="wait for it, stop it, or use another --workdir"
        + ("" if owner else f"; if there is none, remove {path}"),
    )


def _print(line: str) -> None:
    print(f"ddrl_jax: {line}", file=sys.stderr, flush=True)


def _end(why: str) -> None:
    """Nothing may be written any more into a folder that another run has, or none."""
    _print(f"error: the lock of the run is lost: {why}")
    os._exit(EXIT_ERROR)
