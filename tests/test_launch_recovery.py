"""launch/run.sh on a host, and what follows a preemption."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launch_machine import CONFIG, LAUNCH, OPTIONS, PROGRAM, WORKDIR, Machine

PYTHON = """
import signal, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
names = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "LIBTPU_INIT_ARGS",
         "JAX_OPTIMIZATION_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION")
with open(note, "a") as file:
    file.write(json.dumps({n: os.environ.get(n, "") for n in names}) + "\\n")
until = time.time() + float(os.environ.get("SECONDS_TO_RUN", 0))
while time.time() < until and not stop:
    time.sleep(0.01)
time.sleep(0.1)  # saving
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def _python(machine: Machine) -> dict[str, str]:
    machine.add("program", PYTHON)
    return {"PYTHON": str(machine.tools / "program")}


@pytest.mark.parametrize("status", [0, 2, 7])
def test_the_exit_status_is_the_programs(status, machine):
    python = _python(machine)
    result = machine.run(
        "run.sh", "--platform=cpu", *PROGRAM, STATUS=str(status), **python
    )
    assert result.returncode == status, result.stderr
    assert machine.calls[0] == ["program", "-m", "ddrl_jax.main", *PROGRAM]


@pytest.mark.parametrize("status, seen", [(0, 143), (7, 7)])
def test_a_notice_reaches_the_program_and_asks_for_a_restart(status, seen, machine):
    """143 only where the program itself ended well: an error stays an error."""
    more = _python(machine) | {"STATUS": str(status), "SECONDS_TO_RUN": "30"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "run.sh"), "--platform=cpu", *PROGRAM],
        env=machine.environment(**more),
    )
    until = time.time() + 20
    while len(machine.calls) < 2 and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == seen


def test_run_starts_the_real_program(machine):
    """Its own message for a mistake that only it knows."""
    arguments = ("--platform=cpu", CONFIG, WORKDIR, "--mode=nope")
    result = machine.run("run.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 2
    assert "there is no such --mode" in result.stderr


def _environment(machine: Machine, platform: str, *arguments: str, **more: str) -> dict:
    python = _python(machine)
    machine.run("run.sh", f"--platform={platform}", *arguments, **more, **python)
    return dict(machine.calls[1])


def test_the_cache_lies_beside_the_workdir_unless_it_is_set(machine):
    found = _environment(machine, "cpu", *PROGRAM)
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/mnt/shared/compile_cache"
    machine.notes.unlink()
    found = _environment(machine, "cpu", *PROGRAM, JAX_COMPILATION_CACHE_DIR="/c")
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/c"


@pytest.mark.parametrize(
    "platform, name", [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")]
)
def test_flags_follow_the_platform_and_the_users_own_come_last(platform, name, machine):
    other = {"XLA_FLAGS", "LIBTPU_INIT_ARGS"} - {name}
    found = _environment(machine, platform, *PROGRAM, **{name: "--mine=1"})
    assert re.fullmatch(r"(--xla_\w+=true )+--mine=1", found[name])
    assert found[other.pop()] == ""
    machine.notes.unlink()
    found = _environment(machine, platform, *PROGRAM, "--no-flags")
    assert found[name] == ""


def test_an_unknown_platform_is_an_error(machine):
    result = machine.run("run.sh", "--platform=npu", *PROGRAM, "--dry-run")
    assert result.returncode == 2
    assert "npu is not gpu, tpu or cpu" in result.stderr


def _jax_accepts(**environment: str) -> bool:
    code = "import jax; jax.numpy.zeros(1).block_until_ready()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )
    return result.returncode == 0


def test_the_installed_jaxlib_knows_the_gpu_flags(machine):
    """An unknown flag in XLA_FLAGS ends the process, on whatever platform."""
    found = _environment(machine, "gpu", *PROGRAM)
    del found["LIBTPU_INIT_ARGS"]
    assert _jax_accepts(**found)
    assert not _jax_accepts(XLA_FLAGS=found["XLA_FLAGS"] + " --xla_gpu_no_such=true")
    assert not _jax_accepts(JAX_OPTIMIZATION_LEVEL="O9")


@pytest.mark.parametrize(
    "status, state, requeued",
    [(143, "RUNNING", True), (143, "CANCELLED", False), (0, "RUNNING", False)],
)
def test_slurm_requeues_only_what_was_told_of_its_limit(
    status, state, requeued, machine
):
    machine.add("srun", f"sys.exit({status})")
    machine.add("squeue", f"print({state!r})")
    machine.add("scontrol")
    result = machine.run("slurm.sbatch", *PROGRAM, SLURM_JOB_ID="42")
    assert result.returncode == status
    start = ["srun", "--kill-on-bad-exit=0", "bash", "launch/run.sh", "--platform=gpu"]
    assert machine.calls[0] == [*start, *PROGRAM]
    assert (["scontrol", "requeue", "42"] in machine.calls) == requeued


CLOUD = """
import pathlib
state = pathlib.Path(note).with_name("state")
if "create" in sys.argv:
    state.write_text("ACTIVE")
if "delete" in sys.argv:
    state.unlink()
if "describe" in sys.argv:
    if not state.exists():
        sys.exit(1)
    print({"ACTIVE": "READY"}.get(state.read_text(), "PREEMPTED")
          if "tpu-vm" in sys.argv else state.read_text())
if any("launch/run.sh" in word for word in sys.argv):
    runs = [line for line in open(note) if "launch/run.sh" in line]
    if len(runs) < int(os.environ.get("LOST", 0)) + 1:
        state.write_text("SUSPENDED")
        sys.exit(255)
    sys.exit(int(os.environ.get("STATUS", 0)))
"""


def _verbs(machine: Machine) -> list[str]:
    """What was done, without looking at states."""
    verbs = []
    for call in machine.calls:
        runs = any("launch/run.sh" in word for word in call)
        verbs.append("train" if runs else call[4])
    return [verb for verb in verbs if verb != "describe"]


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_preempted_slice_is_requested_again(lost, machine):
    machine.add("gcloud", CLOUD)
    result = machine.run("tpu_pod.sh", *OPTIONS["tpu_pod"], *PROGRAM, LOST=str(lost))
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "ssh", "train", "delete"]
    assert _verbs(machine) == once * (lost + 1)


def test_a_failing_program_is_not_started_again(machine):
    """The slice is left as it is, for a look at the logs."""
    machine.add("gcloud", CLOUD)
    result = machine.run("tpu_pod.sh", *OPTIONS["tpu_pod"], *PROGRAM, STATUS="1")
    assert result.returncode == 1
    assert "failed on a healthy slice" in result.stderr
    assert _verbs(machine) == ["create", "scp", "ssh", "train"]


def test_it_gives_up_after_the_attempts(machine):
    machine.add("gcloud", CLOUD)
    arguments = [*OPTIONS["tpu_pod"], *PROGRAM, "--attempts=2"]
    result = machine.run("tpu_pod.sh", *arguments, LOST="9")
    assert result.returncode == 2
    assert "2 slices were lost" in result.stderr
    assert _verbs(machine).count("train") == 2
