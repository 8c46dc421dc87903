"""Reward hacking, and what DDRL, KL and nothing do about it: all arms, several seeds.

    python benchmarks/reward_hacking.py --seeds 4 5 6 --processes 2

Each run is `python -m ddrl_jax.main --config=configs/hacking.py:ARM` in its own workdir
with its own share of the cores. Seed 0 of all arms comes first, so that there is early
something to look at. The same command again goes on where it stopped. At the end it
writes reward_hacking.md and its figures. Keys go to every run, as in
`--config.optimizer.lr=1e-4`.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for configs, from wherever this is started

from configs.hacking import ARMS  # noqa: E402
from ddrl_jax.compare import draw, load_runs, write_table  # noqa: E402
from ddrl_jax.compare.runs import read_lines  # noqa: E402
from ddrl_jax.config_file import load_config, override  # noqa: E402
from ddrl_jax.errors import UserError  # noqa: E402

PAUSE = 1.0  # seconds between two looks at the runs
REPORT = 60.0  # seconds between two lines of progress
SEEDS = [4, 5, 6]  # fixed before any of them was run: hacking_trials.md
GRACE = 600.0  # seconds a stopped run may take to save


class Job(NamedTuple):
    """One run to be done."""

    arm: str
    seed: int
    command: tuple[str, ...]
    workdir: Path
    config: dict[str, Any]  # as config.json will hold it

    @property
    def name(self) -> str:
        """Arm and seed, as in its workdir."""
        return f"{self.arm}/seed_{self.seed}"

    @property
    def log(self) -> Path:
        """What its processes have said, beside its workdir."""
        return self.workdir.with_name(self.workdir.name + ".log")

    @property
    def epochs(self) -> int:
        """Epochs it is to have."""
        return self.config["train"]["epochs"]

    def done(self) -> int:
        """Epochs in its metrics."""
        rows = read_lines(self.workdir / "metrics.jsonl")
        return max((row.get("step", 0) for row in rows), default=0)

    def finished(self) -> bool:
        """All epochs are there and its configuration is the one asked for."""
        try:
            stored = json.loads((self.workdir / "config.json").read_text())
        except (OSError, ValueError):
            return False
        return stored == self.config and self.done() >= self.epochs


class Running(NamedTuple):
    """A run in progress."""

    job: Job
    process: subprocess.Popen
    cores: tuple[int, ...]
    start: float
    log: TextIO


class Failed(Exception):
    """A run ended badly; the message names its log."""


def make_jobs(
    arms: Sequence[str],
    seeds: Sequence[int],
    workdir: str,
    smoke: bool,
    overrides: Sequence[str],
) -> list[Job]:
    """The runs in the order in which they start: the first seed of all arms first."""
    jobs = []
    for seed in seeds:
        for arm in arms:
            spec = f"configs/hacking.py:{arm}" + ("-smoke" if smoke else "")
            keys = (f"--config.seed={seed}", *overrides)
            path = f"{workdir}/{arm}/seed_{seed}"
            program = (sys.executable, "-m", "ddrl_jax.main")
            command = (*program, f"--config={spec}", f"--workdir={path}", *keys)
            config = override(load_config(str(ROOT / spec)), ["", *keys])
            stored = json.loads(json.dumps(config.to_dict()))
            jobs.append(Job(arm, seed, command, ROOT / path, stored))
    return jobs


def shares(cores: Sequence[int], processes: int) -> list[tuple[int, ...]]:
    """Divides the cores among the processes; with too few they take turns on one."""
    ordered = sorted(cores)
    if processes > len(ordered):
        return [(ordered[i % len(ordered)],) for i in range(processes)]
    return [tuple(ordered[i::processes]) for i in range(processes)]


def available_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside may use these cores only; Linux, elsewhere nothing."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(cores: Sequence[int]) -> dict[str, str]:
    """That of a run: as many threads as it has cores, and no GPU memory set aside."""
    count = str(len(cores))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    flags = os.environ.get("XLA_FLAGS", "")
    if len(cores) == 1 and "multi_thread_eigen" not in flags:
        flags = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | dict(os.environ)
    return shared | limits | {"XLA_FLAGS": flags}


def start(job: Job, cores: tuple[int, ...]) -> Running:
    """Starts a run; what it says goes to its log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = job.log.open("a")
    with pinned(cores):
        process = subprocess.Popen(
            job.command, cwd=ROOT, env=environment(cores), stdout=log, stderr=log
        )
    return Running(job, process, cores, time.monotonic(), log)


def run_all(jobs: Sequence[Job], processes: int, walls: Path) -> None:
    """Runs what is not finished, so many at a time.

    Args:
      jobs: in their order.
      processes: at a time.
      walls: .jsonl file that gets the seconds of every process, for the table.

    Raises:
      Failed: a run ended badly, or was stopped from outside; the others are stopped.
    """
    waiting = [job for job in jobs if not job.finished()]
    free = shares(available_cores(), processes)
    running: list[Running] = []
    progress = Progress(jobs)
    try:
        while waiting or running:
            while waiting and free:
                running.append(start(waiting.pop(0), free.pop(0)))
                progress.say(running)
            time.sleep(PAUSE)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                free.append(one.cores)
                settle(one, walls)
                progress.say(running)
            progress.maybe(running)
    finally:
        stop(running, walls)


def settle(one: Running, walls: Path) -> None:
    """Books the seconds of a run that has ended, and checks that it ended well."""
    book(one, walls)
    code = one.process.returncode
    if code == 0 and one.job.finished():
        return
    tail = "\n".join(one.job.log.read_text(errors="replace").splitlines()[-8:])
    what = f"failed with status {code}" if code else "stopped before its last epoch"
    raise Failed(
        f"{one.job.name} {what}; its log is {one.job.log} and ends with:\n{tail}\n"
        "The other runs have been stopped; the same command again goes on."
    )


def book(one: Running, walls: Path) -> None:
    """Appends the wall-clock seconds of a process to the file of all."""
    one.log.close()
    seconds = round(time.monotonic() - one.start, 1)
    line = {"run": one.job.name, "seconds": seconds, "cores": len(one.cores)}
    with walls.open("a") as file:
        file.write(json.dumps(line) + "\n")


def stop(running: Sequence[Running], walls: Path) -> None:
    """Asks runs to save and end; kills those that do not."""
    for one in running:
        one.process.terminate()
    for one in running:
        try:
            one.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        book(one, walls)


class Progress:
    """Lines that say what is done, what runs, and how long it will take."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.start = jobs, time.monotonic()
        self.before, self.last = self._epochs(), self.start

    def maybe(self, running: Sequence[Running]) -> None:
        """A line, if the last one is long ago."""
        if time.monotonic() - self.last > REPORT:
            self.say(running)

    def say(self, running: Sequence[Running]) -> None:
        """A line now."""
        self.last = time.monotonic()
        spent, done = self.last - self.start, self._epochs()
        total = sum(job.epochs for job in self.jobs)
        left = "?"
        if done > self.before:
            left = clock(spent / (done - self.before) * (total - done))
        now = [f"{r.job.name} {r.job.done()}/{r.job.epochs}" for r in running]
        print(
            f"[{clock(spent)}] {sum(job.finished() for job in self.jobs)} of "
            f"{len(self.jobs)} runs, {done} of {total} epochs, {left} left; "
            f"now {', '.join(now) or 'nothing'}",
            flush=True,
        )

    def _epochs(self) -> int:
        return sum(min(job.done(), job.epochs) for job in self.jobs)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def compare(jobs: Sequence[Job], out: Path, command: str, walls: Path) -> Path:
    """Writes the table and the figures of all runs."""
    workdirs: dict[str, list[Path]] = {}
    for job in jobs:
        workdirs.setdefault(job.arm, []).append(job.workdir)
    runs = load_runs(workdirs)
    names = {job.name for job in jobs}
    spent = [line for line in read_lines(walls) if line["run"] in names]
    hours = sum(line["seconds"] for line in spent) / 3600
    core_hours = sum(line["seconds"] * line["cores"] for line in spent) / 3600
    facts = {
        "command": f"`{command}`",
        "wall-clock hours of all processes, restarts included": (
            f"{hours:.2f}, {core_hours:.2f} core hours"
        ),
    }
    figures = draw(runs, out / "reward_hacking.png")
    return write_table(runs, out / "reward_hacking.md", facts, figures)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and the keys that go to every run."""
    flags = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed must not pass for --seeds
    )
    flags.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    flags.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    flags.add_argument("--processes", type=int, default=2)
    flags.add_argument("--workdir", default="runs/hacking")
    flags.add_argument("--out", type=Path, help="benchmarks/results for all runs")
    flags.add_argument("--smoke", action="store_true", help="every arm in seconds")
    options, keys = flags.parse_known_args(arguments)
    for key in keys:
        if not key.startswith("--config.") or "=" not in key:
            flags.error(f"got {key}, wanted a flag above or --config.KEY=VALUE")
    whole = options.arms == list(ARMS) and options.seeds == SEEDS and not keys
    if options.out is None:  # a part is no result to put in the place of the whole
        results = ROOT / "benchmarks" / "results"
        options.out = ROOT / options.workdir if options.smoke or not whole else results
    if options.processes < 1:
        flags.error(f"got --processes {options.processes}, wanted at least 1")
    return options, keys


def main(arguments: Sequence[str]) -> int:
    """Runs everything and returns the exit status."""
    options, keys = parse(arguments)
    command = shlex.join(["python", "benchmarks/reward_hacking.py", *arguments])
    walls = ROOT / options.workdir / "wall_clock.jsonl"
    try:
        jobs = make_jobs(
            options.arms, options.seeds, options.workdir, options.smoke, keys
        )
        walls.parent.mkdir(parents=True, exist_ok=True)
        run_all(jobs, options.processes, walls)
        print(compare(jobs, options.out, command, walls))
    except (Failed, UserError) as error:
        print(f"reward_hacking: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command again goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # being terminated is as orderly as Ctrl-C: the runs save before they end
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
