"""Runs of several real processes on this machine, joined by gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 4  # of a run, however many processes share them
EPOCHS = 3
FLAGS = (
    f"--config={ROOT}/configs/ddrl_paper.py:smoke",
    f"--config.train.epochs={EPOCHS}",
    "--config.train.microbatch=2",
    "--config.advantages.kind=tracker",
    "--config.advantages.tracker_min=4",
    "--config.policy.transform=linear",
    "--config.rewards.heldout=()",
    "--config.log.tensorboard=False",
)
MAIN = "from ddrl_jax.main import main; main()"
CLOCKS = ("time/", "perf/", "samples_per_second")
# Gloo's threads write to standard output, through each other's lines: what a process
# prints by Python keeps that output, and Gloo has the one for errors.
WITHOUT_GLOO = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", 1)
os.dup2(2, 1)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def process(
    workdir: Path,
    processes: int,
    flags: tuple[str, ...],
    place: dict[str, str],
    code: str = MAIN,
) -> subprocess.Popen:
    """Starts one of several processes that share the devices evenly."""
    more = place | {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    program = WITHOUT_GLOO + code
    return subprocess.Popen(
        [sys.executable, "-c", program, *FLAGS, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(
    workdir: Path,
    processes: int,
    *more: str,
    code: str = MAIN,
    own: dict[int, tuple[str, ...]] | None = None,
) -> list[subprocess.Popen]:
    """Starts a run.

    Args:
      workdir: its folder.
      processes: how many; they share DEVICES devices evenly.
      more: flags.
      code: what each of them runs.
      own: further flags of single processes.
    """
    shared = {
        "DDRL_COORDINATOR": f"127.0.0.1:{free_port()}",
        "DDRL_PROCESSES": str(processes),
    }
    return [
        process(
            workdir,
            processes,
            (*more, *(own or {}).get(i, ())),
            shared | {"DDRL_PROCESS": str(i)},
            code,
        )
        for i in range(processes)
    ]


def start_by_script(
    workdir: Path, processes: int, *more: str
) -> list[subprocess.Popen]:
    """Starts a run as a user does: the launcher, which starts the processes."""
    launcher = str(ROOT / "launch" / "local_processes.sh")
    place = [str(processes), str(DEVICES // processes), "--"]
    return [
        subprocess.Popen(
            [launcher, *place, *FLAGS, f"--workdir={workdir}", *more],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    ]


def ends(run: list[subprocess.Popen], timeout: float = 300) -> list[tuple]:
    """(exit status, stdout, stderr) of each process, when all have ended."""
    found = []
    for process in run:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for other in run:
                other.kill()
            raise
        found.append((process.returncode, output.strip(), errors))
    return found


def to_its_end(workdir: Path, processes: int, *more: str) -> list[tuple]:
    found = ends(start(workdir, processes, *more))
    assert [status for status, *_ in found] == [0] * processes, found
    return found


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines
    ]


def epochs_saved(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())
