"""Two and four real processes are one run: same numbers, one end, one voice."""

import json
import signal
import time
from pathlib import Path

import pytest
from process_runs import (
    EPOCHS,
    ends,
    epochs_saved,
    free_port,
    metrics,
    process,
    start,
    start_by_script,
    to_its_end,
)

from ddrl_jax.errors import EXIT_AGAIN

# ---- real processes

pytest_slow = pytest.mark.slow
EXACT = ("evaluation/", "reward/", "diversity/", "samples_seen", "step")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run in one process with all devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    to_its_end(workdir, 1)
    return workdir


def check_same(workdir: Path, other: Path) -> None:
    """Samples and rewards to the bit; sums over devices in gloo's order."""
    found, wanted = metrics(workdir), metrics(other)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    assert len(found) == EPOCHS + 1
    for line, twin in zip(found, wanted, strict=True):
        for name, value in line.items():
            if name.startswith(EXACT):
                assert value == twin[name], name
            assert value == pytest.approx(twin[name], rel=1e-5, abs=1e-6), name
    for picture in (other / "samples").iterdir():
        twin = workdir / "samples" / picture.name
        assert twin.read_bytes() == picture.read_bytes()


@pytest_slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one_run(processes, alone, tmp_path):
    """Two of them are the launcher's, whose output is that of both."""
    workdir = tmp_path / "run"
    starting = start_by_script if processes == 2 else start
    found = ends(starting(workdir, processes))
    assert {status for status, *_ in found} == {0}, found
    check_same(workdir, alone)
    assert len((workdir / "starts.jsonl").read_text().splitlines()) == 1
    # by the launcher there are lines of Gloo before it, see process_runs.WITHOUT_GLOO
    assert found[0][1].splitlines()[-1] == f"report: {workdir}/report.html"
    assert found[0][1].count("report") == f"{workdir}/report.html".count("report") + 1
    assert found[0][2].count("epoch 2/") == 1
    for _, output, errors in found[1:]:
        assert output == "" and "epoch" not in errors
    # The other way round: one process reads what several have saved, and finds in it
    # what they found.
    (_, output, _), *_ = to_its_end(workdir, 1, "--mode=evaluate")
    last = metrics(workdir)[-1]["evaluation/compressibility/mean"]
    assert f"{last:.5g}" in output and f"epoch {EPOCHS}" in output


def saved_and_going(workdir: Path, run: list, epoch: int = 1) -> None:
    """Waits until a checkpoint of this epoch, or of a later one, is there."""
    limit = time.monotonic() + 240
    while max(epochs_saved(workdir), default=0) < epoch:
        assert all(p.poll() is None for p in run) and time.monotonic() < limit
        time.sleep(0.02)


LONG = ("--config.train.epochs=1000", "--config.evaluate.every=0")


def told_to_end(workdir: Path, run: list, victim: int) -> int:
    """SIGTERM to one: all end well and have saved the same epoch, which is returned."""
    run[victim].terminate()
    found = ends(run)
    assert [status for status, *_ in found] == [0] * len(run), found
    last = epochs_saved(workdir)[-1]
    cause = "a signal to another process" if victim else "SIGTERM"
    assert f"{cause}: epoch {last} is saved" in found[0][2]
    heard = [errors.count("SIGTERM: finishing the step") for *_, errors in found]
    assert heard == [int(i == victim) for i in range(len(run))]
    assert metrics(workdir)[-1]["step"] == last
    return last


def killed(workdir: Path, run: list, victim: int) -> int:
    """SIGKILL of one: the others end soon and name it. Returns the last epoch saved."""
    run[victim].kill()
    begin = time.monotonic()
    found = ends(run)
    assert time.monotonic() - begin < 30
    assert found[victim][0] == -signal.SIGKILL
    for status, _, errors in found[:victim] + found[victim + 1 :]:
        assert status == EXIT_AGAIN, errors
        assert errors.count("error: the run has ended because one of its") == 1
        assert f"got:     process {victim} " in errors and "Traceback" not in errors
    done = len(metrics_lines(workdir)) - 1  # epochs whose metrics were written
    # At most the one in flight is lost: a save comes before the line.
    assert epochs_saved(workdir)[-1] - done in (0, 1)
    return epochs_saved(workdir)[-1]


TOLD = """
import os, signal
import ddrl_jax.train as loop
from ddrl_jax.main import main

update = loop.update_epoch

def told(program, state, batch, epoch):
    if epoch == 1 and os.environ["DDRL_PROCESS"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return update(program, state, batch, epoch)

loop.update_epoch = told
main()
"""


@pytest_slow
def test_sigterm_to_one_in_an_update_stops_all_after_it(alone, tmp_path):
    """The evaluation of its epoch is left to the restart, whatever the time left."""
    workdir = tmp_path / "run"
    found = ends(start(workdir, 2, code=TOLD))
    assert [status for status, *_ in found] == [0, 0], found
    assert "a signal to another process: epoch 2 is saved" in found[0][2]
    assert epochs_saved(workdir)[-1] == 2
    assert [line["step"] for line in metrics(workdir)] == [0, 1]
    to_its_end(workdir, 2)
    check_same(workdir, alone)


@pytest_slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end_and_name_it(victim, alone, tmp_path):
    workdir = tmp_path / "run"
    run = start(workdir, 2)
    saved_and_going(workdir, run)
    killed(workdir, run, victim)
    to_its_end(workdir, 2)
    check_same(workdir, alone)


@pytest_slow
def test_four_processes_lose_one_go_on_and_are_told_to_end(alone, tmp_path):
    """One run: SIGKILL of one of four, then from its last epoch SIGTERM to another."""
    workdir = tmp_path / "run"
    run = start(workdir, 4, *LONG)
    saved_and_going(workdir, run)
    last = killed(workdir, run, 3)
    run = start(workdir, 4, *LONG)
    saved_and_going(workdir, run, last + 1)
    done = told_to_end(workdir, run, 2)
    lines, wanted = metrics(workdir), metrics(alone)
    assert [line["step"] for line in lines] == list(range(done + 1))
    for line, twin in zip(lines, wanted, strict=False):
        names = [name for name in line if name.startswith(EXACT)]
        assert {n: line[n] for n in names} == {n: twin[n] for n in names}


def metrics_lines(workdir: Path) -> list[dict]:
    """Whole lines only: a kill may have cut the last one."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest_slow
def test_another_seed_in_one_process_is_refused_before_any_work(tmp_path):
    found = ends(start(tmp_path / "run", 2, own={1: ("--config.seed=3",)}))
    assert [status for status, *_ in found] == [2, 2], found
    assert any("differs in seed" in errors for *_, errors in found), found
    assert not (tmp_path / "run").exists()


OTHER_DATA = """
import os
import ddrl_jax.program as program
from ddrl_jax.main import main

make_source = program.make_source

def other(*arguments):
    return make_source(*arguments)._replace(digest=os.environ["DDRL_PROCESS"])

program.make_source = other
main()
"""


@pytest_slow
def test_other_data_in_one_process_are_refused_before_any_epoch(tmp_path):
    found = ends(start(tmp_path / "run", 2, code=OTHER_DATA))
    assert [status for status, *_ in found] == [2, 2], found
    assert any("differs in the data" in errors for *_, errors in found), found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


STRAYED = """
import os
import ddrl_jax.train as loop
from ddrl_jax.main import main

collect = loop.collect

def strayed(program, state, epoch, *others):
    batch = collect(program, state, epoch, *others)
    if epoch == 1 and os.environ["DDRL_PROCESS"] == "1":
        text = ("another", *batch.prompts.text[1:])
        batch = batch._replace(prompts=batch.prompts._replace(text=text))
    return batch

loop.collect = strayed
main()
"""
FAILING = """
import os
from ddrl_jax.main import main
from ddrl_jax.rewards import registry

def broken(images, prompts):
    raise ValueError("the judge is out")

if os.environ["DDRL_PROCESS"] == "1":
    registry.REWARDS["compressibility"] = lambda *_: broken
main()
"""


@pytest_slow
def test_a_process_that_strays_later_or_fails_stops_all(tmp_path):
    strayed = ends(start(tmp_path / "strayed", 2, code=STRAYED))
    assert [status for status, *_ in strayed] == [2, 2], strayed
    assert any("differs in the prompts" in errors for *_, errors in strayed), strayed
    assert [line["step"] for line in metrics(tmp_path / "strayed")] == [0, 1]
    found = ends(start(tmp_path / "failing", 2, code=FAILING))
    assert [status for status, *_ in found] == [2, 2], found
    assert "the judge is out" in found[1][2]
    assert "got:     process 1 on" in found[0][2], found[0][2]
    assert "the reward 'compressibility' failed" in found[0][2]


@pytest_slow
def test_slurm_needs_no_flags(tmp_path):
    port = free_port()
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "JAX_COORDINATOR_PORT": str(port),
    }
    own = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    flags = ("--config.train.epochs=1",)
    found = ends([process(tmp_path / "run", 2, flags, slurm | more) for more in own])
    assert [status for status, *_ in found] == [0, 0], found
    assert len(metrics(tmp_path / "run")) == 2
    begun = json.loads((tmp_path / "run" / "starts.jsonl").read_text())
    assert begun["devices"].startswith("4 x")
