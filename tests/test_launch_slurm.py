"""What Slurm does with a run that was told to end."""

import pytest
from launch_machine import PROGRAM, Machine


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
