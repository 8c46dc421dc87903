"""launch/detached.sh on one host, with a program that sleeps."""

import signal
import subprocess
import time

import pytest
from launch_machine import LAUNCH, PROGRAM, Machine

SLEEPER = """
import signal, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("begun", flush=True)
until = time.time() + float(os.environ["SECONDS_TO_RUN"])
while time.time() < until and not stop:
    time.sleep(0.01)
print("saved" if stop else "done", flush=True)
sys.exit(int(os.environ.get("STATUS", 0)))
"""
START = ("start", "--platform=cpu", *PROGRAM)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    for name in ("setsid", "mkdir", "mv", "rm", "tail", "tr", "pkill", "ps"):
        made.link(name)
    made.add("program", SLEEPER)
    yield made
    made.run("detached.sh", "stop", STOP_SECONDS="3")


def _run(machine: Machine, *arguments: str, seconds: float = 0, **more: str):
    python = {"PYTHON": str(machine.tools / "program")}
    return machine.run(
        "detached.sh", *arguments, SECONDS_TO_RUN=str(seconds), **python, **more
    )


@pytest.mark.parametrize("status", [0, 2, 7])
def test_following_has_the_programs_words_and_status(status, machine):
    assert _run(machine, *START, seconds=0.5, STATUS=str(status)).returncode == 0
    found = _run(machine, "follow")
    assert found.returncode == status, found.stderr
    assert found.stdout.splitlines() == ["begun", "done"]
    assert _run(machine, "status").stdout == f"ddrl_jax: ended {status}\n"
    assert machine.calls[0][3:] == [*PROGRAM, machine.calls[0][-1]]


def test_the_program_outlives_who_follows_it(machine):
    _run(machine, *START, seconds=30)
    follower = subprocess.Popen(
        ["bash", str(LAUNCH / "detached.sh"), "follow"],
        env=machine.environment(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert follower.stdout and follower.stdout.readline() == b"begun\n"
    follower.send_signal(signal.SIGKILL)  # the connection is gone
    follower.wait()
    assert _run(machine, "status").stdout == "ddrl_jax: running\n"
    assert "running already" in _run(machine, *START).stderr
    assert _run(machine, "stop").returncode == 0
    assert _run(machine, "status").stdout == "ddrl_jax: ended 143\n"
    assert _run(machine, "follow", "1").stdout == "saved\n"
    assert len(machine.calls) == 1


def test_a_program_that_does_not_end_is_killed(machine):
    deaf = SLEEPER.replace("stop.append(1)", "None")
    machine.add("program", deaf)
    _run(machine, *START, seconds=60)
    until = time.monotonic() + 20
    while "begun" not in (machine.folder / "ddrl_jax.run" / "log").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert _run(machine, "stop", STOP_SECONDS="1").returncode == 0
    assert _run(machine, "status").stdout == "ddrl_jax: ended 137\n"


def test_stopping_nothing_is_fine_and_following_it_is_a_message(machine):
    assert _run(machine, "stop").returncode == 0
    found = _run(machine, "follow")
    assert found.returncode == 2 and "nothing was started" in found.stderr
