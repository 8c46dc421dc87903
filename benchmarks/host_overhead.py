"""What the program itself costs a process, as processes are added.

    python -m benchmarks.host_overhead

Weak scaling: every process brings one device and the same number of samples. Counted
is what the main thread spends outside the jitted rollout, update and advantages and
outside waiting for judges: drawing prompts and data, placing batches, metrics; and,
apart, what the processes tell each other. Writes host_overhead.md below --out and
prints it.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = (1, 2, 4)
EPOCHS = 12
FIRST = 4  # the first epochs compile, and the processes wait for the slowest
SAMPLES = 16  # of a process and epoch, in two chunks
KINDS = ("jitted", "judges", "agreement")


class Clock:
    """Seconds of the main thread by kind: on the wall and of the processor."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, list[float]]] = []
        self._spent = {kind: [0.0, 0.0] for kind in KINDS}
        self._busy = False
        self._mark = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def timed(self, kind: str, work: Callable) -> Callable:
        """Books the time of `work`, results included, unless it is part of another."""
        import jax

        def run(*arguments: Any, **others: Any) -> Any:
            if self._busy:
                return work(*arguments, **others)
            self._busy, begun = True, self._now()
            found = jax.block_until_ready(work(*arguments, **others))
            for i, now in enumerate(self._now()):
                self._spent[kind][i] += now - begun[i]
            self._busy = False
            return found

        return run

    def epoch(self) -> None:
        """Closes an epoch: what was booked on nothing is the program's own."""
        now = self._now()
        whole = [b - a for a, b in zip(self._mark, now, strict=True)]
        booked = [sum(spent[i] for spent in self._spent.values()) for i in range(2)]
        own = [a - b for a, b in zip(whole, booked, strict=True)]
        self.epochs.append(self._spent | {"own": own, "epoch": whole})
        self._spent = {kind: [0.0, 0.0] for kind in KINDS}
        self._mark = now


def child(out: str, argv: list[str]) -> None:
    """Trains as main does, and writes the epochs of this process to `out`.

    Args:
      out: a JSON file.
      argv: as of ddrl_jax.main.
    """
    from ddrl_jax.main import run

    clock = Clock()
    watched(clock)
    status = run(argv, join=True)
    Path(out).write_text(json.dumps(clock.epochs))
    sys.exit(status)


def watched(clock: Clock) -> None:
    """Puts the clock around what a training run calls."""
    import ddrl_jax.train as loop
    from ddrl_jax import collect as experience
    from ddrl_jax import distributed, preemption

    build, collect = loop.build, loop.collect

    def built(*arguments: Any) -> Any:
        program = build(*arguments)
        names = ("rollout", "update", "advantages", "sampling")
        jitted = {n: clock.timed("jitted", getattr(program, n)) for n in names}
        return program._replace(**jitted)

    def collected(*arguments: Any) -> Any:
        clock.epoch()
        return collect(*arguments)

    loop.build, loop.collect = built, collected
    every = clock.timed("agreement", distributed.every)
    distributed.every = preemption.every = every
    # Which samples are finite, of all processes.
    experience.to_host = clock.timed("agreement", experience.to_host)
    loop.RewardPool.collect = clock.timed("judges", loop.RewardPool.collect)


def measure(processes: int, folder: Path) -> dict[str, list[float]]:
    """Median epoch of the slowest process: kind -> [wall ms, processor ms].

    Args:
      processes: how many, on this machine.
      folder: for their files.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = (
        f"--config={ROOT}/configs/ddrl_paper.py:smoke",
        f"--workdir={folder}/run",
        f"--config.train.epochs={EPOCHS}",
        f"--config.train.microbatch={SAMPLES // 2}",
        "--config.train.minibatches=1",
        f"--config.prompts.per_epoch={SAMPLES // 4 * processes}",
        "--config.prompts.group_size=4",
        "--config.evaluate.every=0",
        f"--config.checkpoint.every={EPOCHS}",
        "--config.log.tensorboard=False",
        "--config.log.progress=False",
        f"--distributed.processes={processes}",
        f"--distributed.coordinator=127.0.0.1:{port}",
    )
    outs = [folder / f"{i}.json" for i in range(processes)]
    code = "import sys; from benchmarks.host_overhead import child; "
    code += "child(sys.argv[1], sys.argv[1:])"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(out),
                *flags,
                f"--distributed.process={i}",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for i, out in enumerate(outs)
    ]
    assert [process.wait() for process in running] == [0] * processes
    epochs = [json.loads(out.read_text())[FIRST:] for out in outs]
    kinds = ("own", "agreement", "judges", "jitted", "epoch")
    return {kind: [slowest(epochs, kind, i) for i in range(2)] for kind in kinds}


def slowest(epochs: list[list[dict]], kind: str, clock: int) -> float:
    """The largest median over the processes, in milliseconds."""
    medians = [statistics.median(e[kind][clock] for e in one) for one in epochs]
    return 1000 * max(medians)


def table(found: dict[int, dict[str, list[float]]], load: float) -> str:
    """The report as Markdown."""
    lines = [
        "# The program's own overhead, as processes are added",
        "",
        "`python -m benchmarks.host_overhead`, "
        + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "",
        f"{os.cpu_count()} cores of one machine, gloo; load average at the start"
        f" {load:.1f}. Weak scaling: each process has 1 CPU device and {SAMPLES}"
        " samples an epoch in two chunks (configs/ddrl_paper.py:smoke). Milliseconds"
        f" an epoch, median of epochs {FIRST} to {EPOCHS - 1}, slowest process.",
        "",
        "| processes | own, processor | own, wall | agreement, processor | agreement,"
        " wall | epoch, wall |",
        "|---|---|---|---|---|---|",
    ]
    for processes, row in found.items():
        own, agreement, whole = row["own"], row["agreement"], row["epoch"]
        lines.append(
            f"| {processes} | {own[1]:.1f} | {own[0]:.1f} | {agreement[1]:.1f} | "
            f"{agreement[0]:.1f} | {whole[0]:.0f} |"
        )
    lines += [
        "",
        "Own: the main thread outside jitted rollout, update and advantages, outside",
        "waiting for judges and outside agreement: drawing, placing batches, metrics.",
        "Agreement: stop flags, rewards of the other processes and which samples are",
        "finite, the check that all do the same; on the wall it contains waiting for",
        "the slowest process.",
        f"With more processes than the {os.cpu_count()} cores (and other work on them)",
        "the wall times measure the queue for a core; the processor times do not.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, writes the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out, load, found = parser.parse_args().out, os.getloadavg()[0], {}
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            found[processes] = measure(processes, Path(folder))
    text = table(found, load)
    (out / "host_overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
