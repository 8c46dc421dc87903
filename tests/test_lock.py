"""One run a folder: on this machine at once, on others by the beats of the holder."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ddrl_jax import lock
from ddrl_jax.errors import UserError
from ddrl_jax.lock import SIZE, Lock, Pace

QUICK = Pace(beat=0.05, stale=0.5, patience=0.3, look=0.02)
SLOW = Pace(beat=60, stale=60, patience=60, look=60)  # any wait would show
FAR = {"host": "vm-7", "pid": 4, "machine": "another", "started": "1", "token": "far"}


class Other:
    """A holder on another machine, whose lock the kernel here knows or does not."""

    def __init__(self, path):
        self.path, self.stop = path, threading.Event()
        self.count = 0
        self.beat()

    def beat(self):
        self.count += 1
        text = json.dumps({**FAR, "beat": self.count}).ljust(SIZE)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        os.pwrite(handle, text.encode(), 0)
        os.close(handle)

    def __enter__(self):
        def keep():
            while not self.stop.wait(0.03):
                self.beat()

        self.thread = threading.Thread(target=keep)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def said():
    return []


def test_a_second_run_on_this_machine_is_refused_at_once(path):
    first = Lock(path, SLOW)
    with pytest.raises(UserError) as error:
        Lock(path, SLOW)
    assert f"process {os.getpid()} on " in str(error.value.got)
    first.close()
    Lock(path, SLOW).close()


HOLD = """
import sys, time
from pathlib import Path
from ddrl_jax.lock import Lock
Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free_at_once(path):
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} "):
            Lock(path, SLOW)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie still
        Lock(path, SLOW).close()


def test_a_number_that_was_given_to_another_process_is_no_holder(path):
    here = Lock(path, SLOW)
    record = json.loads(path.read_text())
    here.close()
    path.write_text(json.dumps(record | {"started": "1"}))
    Lock(path, SLOW).close()


def _forgotten(path) -> int:
    """A lock that the kernel holds for nobody, as NFS for a machine that vanished."""
    handle = os.open(path, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


@pytest.mark.parametrize("held", [True, False])
def test_a_silent_holder_elsewhere_is_taken_over(held, path, said):
    Other(path)
    handle = _forgotten(path) if held else None
    begin = time.monotonic()
    taken = Lock(path, QUICK, said.append)
    assert time.monotonic() - begin >= QUICK.stale
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert len(said) == 2
    assert "in use by process 4 on vm-7; waiting up to" in said[0]
    assert "took over the lock of process 4 on vm-7" in said[1]
    with pytest.raises(UserError):  # the new file is a lock as any other
        Lock(path, SLOW)
    taken.close()
    if handle is not None:
        os.close(handle)
    assert [p.name for p in path.parent.iterdir()] == [".lock"]
    Lock(path, SLOW).close()


@pytest.mark.parametrize("held", [True, False])
def test_a_holder_elsewhere_that_beats_is_refused_in_the_end(held, path, said):
    with Other(path):
        handle = _forgotten(path) if held else None
        with pytest.raises(UserError) as error:
            Lock(path, QUICK, said.append)
        if handle is not None:
            os.close(handle)
    assert "process 4 on vm-7" in str(error.value.got)
    assert len(said) == 1


def test_a_holder_elsewhere_that_ends_is_waited_for(path, said):
    with Other(path) as other:
        release = threading.Timer(0.1, lambda: (other.stop.set(), _empty(path)))
        release.start()
        Lock(path, QUICK._replace(patience=20), said.append).close()
    assert len(said) == 1


def _empty(path):
    time.sleep(0.06)  # the last beat
    path.write_text("")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_a_lock_of_the_kernel_the_beats_are_enough(
    number, path, said, monkeypatch
):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    first = Lock(path, QUICK)
    with pytest.raises(UserError):
        Lock(path, QUICK)
    first.close()
    with Other(path), pytest.raises(UserError):
        Lock(path, QUICK, said.append)
    Lock(path, QUICK, said.append).close()  # silent by now
    assert "took over" in said[-1]


def test_a_lock_that_beats_keeps_its_size(path):
    held = Lock(path, QUICK)
    counts = set()
    until = time.monotonic() + 20
    while len(counts) < 3 and time.monotonic() < until:
        time.sleep(0.02)
        counts.add(json.loads(path.read_text())["beat"])
        assert path.stat().st_size == SIZE
    held.close()
    assert len(counts) == 3 and path.read_text() == ""


def test_who_has_lost_the_lock_is_told_and_leaves_it_alone(path):
    lost = threading.Event()
    names = []

    def leave(by):
        names.append(by)
        lost.set()

    held = Lock(path, QUICK, lost=leave)
    draft = path.with_name("other")
    Other(draft)
    draft.replace(path)
    assert lost.wait(20) and names == ["process 4 on vm-7 has taken over the workdir"]
    held.close()
    assert json.loads(path.read_text())["token"] == "far"


def test_a_folder_that_is_removed_ends_the_run(path):
    lost, whys = threading.Event(), []

    def leave(why):
        whys.append(why)
        lost.set()

    held = Lock(path, QUICK, lost=leave)
    path.unlink()
    assert lost.wait(20) and whys == [f"{path.parent} was removed"]
    held.close()
    assert not path.exists()


def test_a_beat_that_fails_is_told_once_and_tried_again(path, said, monkeypatch):
    failing, write = threading.Event(), os.pwrite

    def pwrite(*arguments):
        if failing.is_set():
            raise OSError(errno.EIO, "no disk")
        return write(*arguments)

    monkeypatch.setattr(lock.os, "pwrite", pwrite)
    held = Lock(path, QUICK, said.append)
    failing.set()
    until = time.monotonic() + 20
    while not said and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(3 * QUICK.beat)
    failing.clear()
    before = json.loads(path.read_text())["beat"]
    while json.loads(path.read_text())["beat"] == before and time.monotonic() < until:
        time.sleep(0.02)
    assert json.loads(path.read_text())["beat"] > before
    assert len(said) == 1 and "no disk" in said[0]
    held.close()


def test_a_file_of_an_older_release_is_no_obstacle(path):
    path.write_text("123\n")
    Lock(path, SLOW).close()
