"""What follows a preemption: requeueing, and another slice."""

import pytest
from launch_machine import OPTIONS, PROGRAM, Machine


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


SRUN = """
name = "SRUN_CPUS_PER_TASK"
with open(note, "a") as file:
    file.write(json.dumps([name, os.environ[name]]) + "\\n")
sys.exit({status})
"""


@pytest.mark.parametrize(
    "status, state, requeued",
    [(143, "RUNNING", True), (143, "CANCELLED", False), (0, "RUNNING", False)],
)
def test_slurm_requeues_only_what_was_told_of_its_limit(
    status, state, requeued, machine
):
    machine.add("srun", SRUN.format(status=status))
    machine.add("squeue", f"print({state!r})")
    machine.add("scontrol")
    given = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    result = machine.run("slurm.sbatch", *PROGRAM, **given)
    assert result.returncode == status
    start = ["srun", "--kill-on-bad-exit=0", "bash", "launch/run.sh", "--platform=gpu"]
    assert machine.calls[0] == [*start, *PROGRAM]
    assert machine.calls[1] == ["SRUN_CPUS_PER_TASK", "8"]
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
