"""What Slurm does with a run that was told to end."""

import pytest
from launch_machine import PROGRAM, Machine

from ddrl_jax.errors import EXIT_AGAIN, EXIT_ERROR


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
    "status, state, killed, requeued",
    [
        (143, "RUNNING", 0, True),
        (143, "RUNNING", 20, True),
        (143, "CANCELLED", 0, False),
        (EXIT_AGAIN, "RUNNING", 0, True),
        (EXIT_AGAIN, "RUNNING", 19, True),
        (EXIT_AGAIN, "RUNNING", 20, False),
        (EXIT_AGAIN, "CANCELLED", 0, False),
        (137, "RUNNING", 19, True),
        (137, "RUNNING", 20, False),
        (EXIT_ERROR, "RUNNING", 0, False),
        (1, "RUNNING", 0, False),
        (0, "RUNNING", 0, False),
    ],
)
def test_slurm_requeues_what_was_told_of_its_limit_or_lost_a_task(
    status, state, killed, requeued, machine
):
    machine.add("srun", SRUN.format(status=status))
    machine.add("squeue", f"print({state!r})")
    machine.add("scontrol")
    given = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    given |= {"SLURM_JOB_NAME": "mine", "SLURM_RESTART_COUNT": "99"}  # of notices too
    record = machine.folder / "mine-42.killed"
    if killed:
        record.write_text("137\n" * killed)
    result = machine.run("slurm.sbatch", *PROGRAM, **given)
    assert result.returncode == status
    start = ["srun", "--kill-on-bad-exit=0", "bash", "launch/run.sh", "--platform=gpu"]
    assert machine.calls[0] == [*start, *PROGRAM]
    assert machine.calls[1] == ["SRUN_CPUS_PER_TASK", "8"]
    assert (["scontrol", "requeue", "42"] in machine.calls) == requeued
    lines = record.read_text().splitlines() if record.exists() else []
    assert len(lines) == killed + (status in (EXIT_AGAIN, 137))
