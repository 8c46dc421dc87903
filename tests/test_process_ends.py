"""What the others of a run are told when one can not go on, before any training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_runs import MAIN, ROOT, ends, free_port, process, start

from ddrl_jax.distributed import HEARTBEAT
from ddrl_jax.errors import EXIT_AGAIN, EXIT_ERROR

# Longer than gloo waits (30 s) for a process that it was never connected to.
LATE = """
import os, sys, time
from ddrl_jax.distributed import is_main, joined, leave, main_first
from ddrl_jax.distributed import HEARTBEAT
from ddrl_jax.errors import UserError
from ddrl_jax.surroundings import place

def taken():
    if is_main():
        time.sleep(33)
    raise UserError("another run is using it", got="", wanted="", way_out="")

try:
    with joined(place({}, os.environ)):
        main_first(taken)
except UserError as error:
    print(error, file=sys.stderr)
    leave(error.status)
"""


@pytest.mark.slow
def test_who_waits_for_process_0_hears_what_it_found(tmp_path):
    """As where process 0 waits for the lock of a workdir, and does not get it."""
    found = ends(start(tmp_path, 2, code=LATE))
    assert [status for status, *_ in found] == [EXIT_ERROR] * 2, found
    for _, _, errors in found:
        assert "another run is using it" in errors and "Traceback" not in errors
    assert "got:     process 0 on " in found[1][2]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_device_that_does_not_start_in_one_ends_all(victim, tmp_path):
    """The others wait for its devices in the middle of their own start."""
    shared = {"DDRL_COORDINATOR": f"127.0.0.1:{free_port()}", "DDRL_PROCESSES": "2"}
    run = []
    for i in range(2):
        own = {"DDRL_PROCESS": str(i), "CUDA_VISIBLE_DEVICES": ""}
        own |= {"JAX_PLATFORMS": "cuda"} if i == victim else {}
        run.append(process(tmp_path / "run", 2, (), shared | own, MAIN))
    begin = time.monotonic()
    found = ends(run)
    assert time.monotonic() - begin < 60
    assert [status for status, *_ in found] == [EXIT_ERROR] * 2, found
    assert "error: JAX can not start on this machine" in found[victim][2]
    assert f"got:     process {victim} on " in found[1 - victim][2]
    assert "JAX can not start on this machine" in found[1 - victim][2]
    assert not any("Traceback" in errors for *_, errors in found)
    assert not (tmp_path / "run").exists()


# In a network of their own, which is then taken away: nothing arrives any more, and
# nobody says that a connection is closed.
CUT_OFF = """
ip link set lo up
for i in 0 1; do
  DDRL_PROCESS=$i "$1" -c "$2" >"$3/$i.out" 2>"$3/$i.err" &
  pids[i]=$!
done
until [ -f "$3/0.ready" ] && [ -f "$3/1.ready" ]; do sleep 0.1; done
ip link set lo down
for i in 0 1; do wait "${pids[i]}"; echo "ended $?"; done
"""
WORKING = """
import os, pathlib, sys, time
import numpy as np
from ddrl_jax.distributed import every, joined
from ddrl_jax.surroundings import place

with joined(place({}, os.environ)):
    every(np.zeros(1))
    pathlib.Path(os.environ["READY"], os.environ["DDRL_PROCESS"] + ".ready").touch()
    time.sleep(300)
"""


@pytest.mark.slow
def test_a_network_that_is_gone_ends_all_in_30_seconds(tmp_path):
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*command, "ip", "link"], capture_output=True).returncode:
        pytest.skip("this machine gives no network to cut off")
    place = {"DDRL_COORDINATOR": "127.0.0.1:9999", "DDRL_PROCESSES": "2"}
    place |= {"JAX_NUM_CPU_DEVICES": "1", "READY": str(tmp_path)}
    arguments = ["bash", "-c", CUT_OFF, "-", sys.executable, WORKING, str(tmp_path)]
    found = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    ready = max(path.stat().st_mtime for path in tmp_path.glob("*.ready"))
    assert found.stdout.split() == ["ended", str(EXIT_AGAIN)] * 2, found
    for i in range(2):
        written = tmp_path / f"{i}.err"
        assert written.stat().st_mtime - ready < 30
        assert f"process {1 - i} " in written.read_text()
        assert "is not reached any more" in written.read_text()


def working(folder: Path) -> list[subprocess.Popen]:
    """Two processes that have met and now have nothing to tell each other."""
    folder.mkdir()
    shared = {"DDRL_COORDINATOR": f"127.0.0.1:{free_port()}", "DDRL_PROCESSES": "2"}
    shared |= {"JAX_NUM_CPU_DEVICES": "1", "READY": str(folder)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKING],
            cwd=ROOT,
            env=os.environ | shared | {"DDRL_PROCESS": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.slow
def test_one_that_stands_still_ends_the_other_and_then_itself(tmp_path):
    """Its connection is open and answered by the kernel: only heartbeats are missed."""
    runs = [working(tmp_path / name) for name in "01"]  # run i stops its process i
    try:
        limit = time.monotonic() + 120
        while len([*tmp_path.glob("*/*.ready")]) < 4:
            assert time.monotonic() < limit
            time.sleep(0.1)
        for i in range(2):
            runs[i][i].send_signal(signal.SIGSTOP)
        for i in range(2):
            _, errors = runs[i][1 - i].communicate(timeout=2 * HEARTBEAT)
            assert runs[i][1 - i].returncode == -signal.SIGABRT  # a shell's 134
            assert "the JAX distributed service detected fatal errors" in errors
        for i in range(2):
            runs[i][i].send_signal(signal.SIGCONT)
            _, errors = runs[i][i].communicate(timeout=60)
            assert runs[i][i].returncode == EXIT_AGAIN, errors
            assert f"process {1 - i} " in errors and "Traceback" not in errors
    finally:
        for process in (*runs[0], *runs[1]):
            process.kill()
