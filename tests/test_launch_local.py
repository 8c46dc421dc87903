"""launch/local_processes.sh: what it starts, and how its processes are told to end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launch_machine import ROOT, Machine, commands


def script(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "launch" / "local_processes.sh", *arguments],
        cwd=ROOT,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_launcher_shows_what_it_would_start():
    found = script("--dry-run", "2", "3", "--", "--workdir=a b", PORT="77")
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == 2
    for i, line in enumerate(lines):
        assert line.startswith("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3 ")
        assert "--distributed.coordinator=127.0.0.1:77" in line
        assert "--distributed.processes=2" in line and r"--workdir=a\ b" in line
        assert line.endswith(f"--distributed.process={i}")


@pytest.mark.parametrize(
    "arguments", [(), ("2", "1"), ("0", "1", "--", "x"), ("2", "a", "--", "x")]
)
def test_the_launcher_explains_itself(arguments):
    found = script(*arguments)
    assert found.returncode == 2 and "PROCESSES DEVICES_EACH" in found.stderr


STAND_IN = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo 1; exit; }
rank=${@: -1}; rank=${rank##*=}
trap 'echo "told $rank"; exit 0' TERM
[ "$rank" = "$FAILING" ] && exit 7
echo "ready $rank"
for i in $(seq 200); do sleep 0.1; [ "$FAILING" ] && exit 0; done
"""


def test_the_launcher_hands_on_signals_and_statuses(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    script_path = ROOT / "launch" / "local_processes.sh"
    with subprocess.Popen(
        [script_path, "3", "1", "--", "x"],
        env=os.environ | {"PYTHON": str(stand_in), "FAILING": ""},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert sorted(child.stdout.readline() for _ in range(3))[0] == "ready 0\n"
        child.terminate()
        told, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    assert sorted(told.split("\n"))[-3:] == ["told 0", "told 1", "told 2"]
    assert (
        script("3", "1", "--", "x", PYTHON=str(stand_in), FAILING="1").returncode == 7
    )


def test_a_process_that_ends_while_its_signal_is_handed_on_has_its_own_status(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    # The launcher's kill returns when the process it has told is long gone.
    slow = '() { builtin kill "$@"; local status=$?; sleep 1; return $status; }'
    more = {"PYTHON": str(stand_in), "FAILING": "", "BASH_FUNC_kill%%": slow}
    with subprocess.Popen(
        [ROOT / "launch" / "local_processes.sh", "1", "1", "--", "x"],
        env=os.environ | more,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready 0\n"
        child.terminate()
        told, _ = child.communicate(timeout=30)
    assert told == "told 0\n" and child.returncode == 0


# Of a job in the background, as this may be, a shell could not trap them.
OBEY_INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


# What a terminal does: INT to all of the group. A second one would mean "do not save".
NOTES_SIGNALS = f"""#!{sys.executable} -SE
import signal, sys, time
seen = []
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, lambda number, _: seen.append(signal.Signals(number).name))
print("ready", flush=True)
limit = time.monotonic() + 30
while len(seen) < 2 and time.monotonic() < limit:
    time.sleep(0.05)
time.sleep(0.5)  # for a third one
print(*sorted(seen), flush=True)
sys.exit(3)
"""


def test_an_interrupt_of_the_group_reaches_each_process_once(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(NOTES_SIGNALS)
    stand_in.chmod(0o755)
    launcher = str(ROOT / "launch" / "local_processes.sh")
    with subprocess.Popen(
        [sys.executable, "-c", OBEY_INTERRUPTS, launcher, "2", "1", "--", "x"],
        env=os.environ | {"PYTHON": str(stand_in), "PORT": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        time.sleep(0.5)  # the launcher sets its traps when all are started
        os.killpg(child.pid, signal.SIGINT)
        told, _ = child.communicate(timeout=90)
    assert told == "SIGINT SIGTERM\n" * 2
    assert child.returncode == 3


# ---- which interpreter


@pytest.mark.parametrize(
    ("mode", "more", "chosen"),
    [
        (None, {}, "python3"),
        (0o755, {}, ".venv/bin/python"),
        (0o644, {}, "python3"),  # nothing that can be started
        (0o755, {"PYTHON": "mine"}, "mine"),
        (0o755, {"PYTHON": ""}, ".venv/bin/python"),
    ],
)
def test_the_interpreter_is_named_or_that_of_the_folder(mode, more, chosen, tmp_path):
    """None is on this PATH, and a dry run needs none."""
    if mode is not None:
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("")
        python.chmod(mode)
    dry = ("--dry-run", "2", "1", "--", "x")
    found = Machine(tmp_path).run("local_processes.sh", *dry, **more)
    assert found.returncode == 0, found.stderr
    lines = commands(found.stdout)
    assert [line[2:6] for line in lines] == [[chosen, "-m", "ddrl_jax.main", "x"]] * 2
    assert {line[6] for line in lines} == {"--distributed.coordinator=127.0.0.1:PORT"}
