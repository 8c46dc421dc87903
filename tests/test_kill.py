"""A run killed with -9 at ten moments ends with the bits of one left in peace."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from one_message import check_message
from saved_states import bits

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 12
FLAGS = (
    f"--config={ROOT}/configs/ddrl_paper.py:smoke",
    "--config.advantages.kind=tracker",
    "--config.advantages.tracker_min=4",
    "--config.policy.transform=linear",
    f"--config.train.epochs={EPOCHS}",
    "--config.evaluate.every=4",
    "--config.evaluate.solver=euler",  # its rollouts would count as training's
    "--config.log.tensorboard=False",
    "--config.log.progress=False",
)
# Where the program dies. Each comes once, "writing" and "rollout" twice, in an order
# and at a call that the seed draws.
STAGES = (
    "rollout",
    "rollout",
    "judge",
    "reward",
    "update",
    "after update",
    "save",
    "writing",
    "writing",
    "metrics",
)
CLOCKS = ("time/", "perf/", "samples_per_second")
# The program with one function that kills it: STAGE, the number of the call, and the
# seconds until then where the function has left work behind.
DRIVER = """
import os, signal, sys, threading
import ddrl_jax.train as loop
from ddrl_jax.main import run
from ddrl_jax.rewards import pool

stage, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:4]
calls, collecting = 0, False

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted():
    global calls
    calls += collecting  # the self-test and the first evaluation do not count
    return collecting and calls == number

def before(function):
    def wrapped(*arguments, **others):
        if counted():
            die()
        return function(*arguments, **others)
    return wrapped

def after(function):
    def wrapped(*arguments, **others):
        result = function(*arguments, **others)
        if counted():
            threading.Timer(seconds, die).start() if seconds else die()
        return result
    return wrapped

def torn(self, step, values):
    if counted():
        self._file.write('{"step": %d, "data/lo' % step)
        self._file.flush()
        die()
    return write(self, step, values)

build, collect, write = loop.build, loop.collect, loop.Metrics.write

def built(config, judges=None):
    program = build(config, judges)
    wrap = {"rollout": ("rollout", before), "update": ("update", before),
            "after update": ("update", after)}
    name, how = wrap.get(stage, (None, None))
    if name is None:
        return program
    return program._replace(**{name: how(getattr(program, name))})

def begun(*arguments):
    global collecting
    collecting = True
    return collect(*arguments)

count = loop.Utilization.__call__

def counting(*arguments):  # it traces the functions to count their FLOPs
    global collecting
    collecting = False
    result = count(*arguments)
    collecting = True
    return result

loop.Utilization.__call__ = counting
loop.build, loop.collect = built, begun
if stage == "judge":
    pool._Call.run = before(pool._Call.run)
if stage == "reward":
    loop.RewardPool.collect = before(loop.RewardPool.collect)
if stage == "save":
    loop.Checkpoints.save = before(loop.Checkpoints.save)
if stage == "writing":
    loop.Checkpoints.save = after(loop.Checkpoints.save)
if stage == "metrics":
    loop.Metrics.write = torn
sys.exit(run(sys.argv))
"""

pytestmark = pytest.mark.slow


def start(workdir: Path, *more: str, moment: tuple = ("none", 0, 0.0)):
    """The whole program in a process of its own, to its end, whatever it is."""
    return subprocess.run(
        [
            sys.executable,
            *("-c", DRIVER, *map(str, moment)),
            *(*FLAGS, f"--workdir={workdir}", *more),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def state(workdir: Path) -> list[tuple[str, str, bytes]]:
    """The last checkpoint, read without the program that wrote it."""
    with ocp.StandardCheckpointer() as reader:
        return bits(reader.restore(workdir / "checkpoints" / str(EPOCHS) / "state"))


def lines(path: Path) -> list[dict[str, Any]]:
    """A metrics file without what a clock measured."""
    found = map(json.loads, path.read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in found
    ]


def whole_lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without a torn line at their end."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def check_same(workdir: Path, other: Path) -> None:
    found, wanted = state(workdir), state(other)
    assert [leaf[:2] for leaf in found] == [leaf[:2] for leaf in wanted]
    assert [a[0] for a, b in zip(found, wanted, strict=True) if a != b] == []
    assert lines(workdir / "metrics.jsonl") == lines(other / "metrics.jsonl")
    for picture in (other / "samples").iterdir():
        twin = workdir / "samples" / picture.name
        assert twin.read_bytes() == picture.read_bytes()


def epochs_saved(workdir: Path) -> list[int]:
    """The epochs whose checkpoint has its final name."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = start(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def moments() -> list[tuple[str, int, float]]:
    """(stage, call, seconds): within the first three epochs of each start.

    Of this seed's, the starts that die latest save at least 6 epochs together, because
    a save begins when the one before it is complete, and all of them at most 11.
    """
    draw = random.Random(30)
    calls = {"rollout": 2, "judge": 4}  # an epoch: two chunks, each judged in two parts
    return [
        (stage, draw.randint(1, 3 * calls.get(stage, 1)), 0.03 * draw.random())
        for stage in draw.sample(STAGES, len(STAGES))
    ]


def test_killed_at_ten_moments_it_ends_with_the_same_bits(whole, tmp_path):
    workdir = tmp_path / "run"
    assert len(moments()) == 10 and {m[0] for m in moments()} == set(STAGES)
    saved = 0
    for moment in moments():
        result = start(workdir, moment=moment)
        assert result.returncode == -signal.SIGKILL, (moment, result.stderr)
        found = max(epochs_saved(workdir), default=0)
        assert saved <= found < EPOCHS, moment
        saved = found
        # The epoch in flight is lost and no other: a save is waited for, and comes
        # before the line, which it has in itself.
        logged = max((line["step"] for line in whole_lines(workdir)), default=0)
        assert found - logged in (0, 1), moment
    assert saved >= 6  # later starts went on and did not begin again
    result = start(workdir)
    assert result.returncode == 0, result.stderr
    check_same(workdir, whole)
    # What the kills cost was kept aside, and the torn line with it.
    moved = (workdir / "metrics.discarded.jsonl").read_text()
    assert '"data/lo\n' in moved


def test_a_torn_checkpoint_is_one_message_and_the_older_one_is_used_if_asked(
    whole, tmp_path
):
    workdir = shutil.copytree(whole, tmp_path / "run")
    leaves = workdir / "checkpoints" / str(EPOCHS) / "state"
    largest = max(leaves.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])

    refused = start(workdir)
    check_message(refused.returncode, refused.stderr, "checkpoint.resume=last_good")
    assert str(workdir / "checkpoints" / str(EPOCHS)) in refused.stderr
    assert epochs_saved(workdir) == [EPOCHS - 1, EPOCHS]  # nothing was touched

    result = start(workdir, "--config.checkpoint.resume=last_good")
    assert result.returncode == 0, result.stderr
    assert f"resuming from {workdir}/checkpoints/{EPOCHS - 1}" in result.stderr
    check_same(workdir, whole)


def test_a_workdir_of_another_configuration_is_refused_with_what_differs(whole):
    before = lines(whole / "metrics.jsonl"), epochs_saved(whole)
    changes = ("--config.seed=1", "--config.data_term.weight=0.5")
    result = start(whole, *changes)
    check_message(result.returncode, result.stderr, "data_term.weight")
    assert "seed" in result.stderr and "0.5" in result.stderr
    assert "sampler" not in result.stderr  # what is equal is not named
    assert (lines(whole / "metrics.jsonl"), epochs_saved(whole)) == before
