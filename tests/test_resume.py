"""k epochs, a stop and k epochs are 2k epochs at a stretch, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_states import bits
from tiny_runs import perturbed

import ddrl_jax.train as loop
from ddrl_jax.command_line import parse
from ddrl_jax.models.emoji import emoji_pipeline, write_params
from ddrl_jax.program import build
from ddrl_jax.rollout import initial_noise

ROOT = Path(__file__).resolve().parents[1]
K = 2
SETTINGS = (
    "--config.mesh.data=1",
    "--config.log.tensorboard=False",
    "--config.log.progress=False",
)
ROWS = {
    # The terms and noise of DDRL; a tracker whose history decides every advantage
    # from its fourth reward on, which some prompts reach within the first k epochs.
    "ddrl_paper": (),
    # And evaluations that do not fall on epoch K: only a run that ends there has one.
    # No save is due either: what a notice ends is saved because of it.
    "ddpo_is": (
        "--config.checkpoint.every=10",
        "--config.advantages.tracker_min=4",
        "--config.data_term.weight=0.01",
        f"--config.evaluate.every={K + 1}",
    ),
}
# And rows that are only resumed in processes of their own.
LORA = "train.inner_epochs=2 checkpoint.every=3 lora.rank=2 model.dtype=bfloat16 "
LORA += "sampler.guidance_scale=2.0 sampler.window=(1,3)"
MORE = {"flow_grpo": tuple(f"--config.{key}" for key in LORA.split())}
CLOCKS = ("time/", "perf/", "samples_per_second")
LOSSES = ("data/loss", "data/heldout_loss", "policy/loss")

pytestmark = pytest.mark.slow


class Runs(NamedTuple):
    """One row: its flags, k epochs, 2k epochs at a stretch, and how to run more."""

    flags: tuple[str, ...]
    half: Path
    whole: Path
    draws: dict[int, Any]
    run: Any


def flags_of(row: str) -> tuple[str, ...]:
    own = (ROWS | MORE)[row]
    return (f"--config={ROOT}/configs/{row}.py:smoke", *SETTINGS, *own)


def checkpoint(workdir: Path, epoch: int) -> dict[str, Any]:
    """Everything of a checkpoint, read without the program that wrote it."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(workdir / "checkpoints" / str(epoch) / "state")


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines
    ]


def check_same(workdir: Path, other: Path) -> None:
    """Every leaf of the last checkpoint, every metric and every picture."""
    found, wanted = (bits(checkpoint(w, 2 * K)) for w in (workdir, other))
    assert [leaf[:2] for leaf in found] == [leaf[:2] for leaf in wanted]
    assert [a[0] for a, b in zip(found, wanted, strict=True) if a != b] == []
    assert metrics(workdir) == metrics(other)
    pictures = sorted(path.name for path in (other / "samples").iterdir())
    assert len(pictures) in (2 * K + 1, 3)
    for name in pictures:
        here, there = (w / "samples" / name for w in (workdir, other))
        assert here.read_bytes() == there.read_bytes()


def drawn(batch: Any) -> dict[str, Any]:
    """What an epoch drew: prompts, noise, trained steps and data of each sample."""
    chunks, data = batch.chunks, jax.random.key_data
    shape = chunks[0].trajectory.x_t.shape[2:]
    each = {
        "noise keys": [data(c.keys) for c in chunks],
        "noise": [initial_noise(c.keys, shape) for c in chunks],
        "data keys": [data(c.data_keys) for c in chunks],
        "records": [c.records for c in chunks],
        "steps": [c.trajectory.index.T for c in chunks],
    }
    found = {k: np.concatenate([np.asarray(a) for a in v]) for k, v in each.items()}
    return found | {"prompts": batch.prompts.index, "groups": batch.prompts.group}


@pytest.fixture(scope="module")
def train():
    """train(flags, workdir, draws) in this process; equal programs compile once.

    The start-up self-test and the report are left out: others test them.
    """
    programs, draws, collect = {}, {}, loop.collect

    def shared(config, judges):
        key = (config.name, config.train.microbatch)
        if key not in programs:
            programs[key] = build(config, judges)
        return programs[key]._replace(config=config)

    def recorded(program, state, epoch, *others):
        batch = collect(program, state, epoch, *others)
        if batch is not None:  # None: told to end
            draws[epoch] = drawn(batch)
        return batch

    def run(flags: tuple[str, ...], workdir: Path, epochs: int) -> dict[int, Any]:
        draws.clear()
        more = (f"--workdir={workdir}", f"--config.train.epochs={epochs}")
        loop.train(parse(["main", *flags, *more]).config, str(workdir))
        return dict(draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", shared)
        patch.setattr(loop, "collect", recorded)
        patch.setattr(loop, "check_ratio", lambda *_: None)
        patch.setattr(loop, "write_report", lambda home: home.root)
        yield run


@pytest.fixture(scope="module", params=ROWS)
def runs(request, train, tmp_path_factory) -> Runs:
    folder, flags = tmp_path_factory.mktemp(request.param), flags_of(request.param)
    train(flags, folder / "half", K)
    draws = train(flags, folder / "whole", 2 * K)
    return Runs(flags, folder / "half", folder / "whole", draws, train)


def test_stopped_by_its_last_epoch_and_made_longer(runs, tmp_path):
    workdir = shutil.copytree(runs.half, tmp_path / "run")
    runs.run(runs.flags, workdir, 2 * K)
    check_same(workdir, runs.whole)


def test_what_is_compared_moves_and_holds_the_rewards_of_each_prompt(runs):
    saved = checkpoint(runs.half, K), checkpoint(runs.whole, 2 * K)
    early, late = map(bits, saved)
    same = [a[0] for a, b in zip(early, late, strict=True) if a == b]
    assert all("bad_updates" in name or "tracker" in name for name in same), same
    losses = [line["data/loss"] for line in metrics(runs.whole)[1:]]
    assert len(set(losses)) == 2 * K
    if "tracker_min" in " ".join(runs.flags):
        counts = [np.asarray(s["tracker"]["count"]) for s in saved]
        assert counts[0].max() >= 4 and counts[1].sum() > counts[0].sum()


def told_to_end(patch: pytest.MonkeyPatch, name: str, epoch: int) -> None:
    """SIGTERM when a function of the loop is called for this epoch (from 0)."""
    work = getattr(loop, name)

    def interrupted(program, state, *others):
        if epoch in others:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(program, state, *others)

    patch.setattr(loop, name, interrupted)


def told_to_end_in_the_evaluation(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the first one, between its pictures and its data loss."""
    judged = loop.Evaluation.judged

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return judged(*arguments)

    patch.setattr(loop.Evaluation, "judged", interrupted)


@pytest.mark.parametrize(
    ("epoch", "first", "second"),
    [
        (K, "update_epoch", "update_epoch"),
        (K, "evaluation", "collect"),
        (2 * K - 1, "update_epoch", "collect"),
    ],
)
def test_told_to_end_after_the_rollout_it_saves_and_the_restart_evaluates(
    epoch, first, second, runs, tmp_path
):
    """The epoch is due for its evaluation; the second start is told to end as well."""
    workdir, wanted = shutil.copytree(runs.half, tmp_path / "run"), metrics(runs.whole)
    pictures = workdir / "samples" / f"evaluation_{epoch + 1:06d}.png"
    with pytest.MonkeyPatch.context() as patch:
        if first == "evaluation":
            told_to_end_in_the_evaluation(patch)
        else:
            told_to_end(patch, first, epoch)
        runs.run(runs.flags, workdir, 2 * K)
    assert (workdir / "checkpoints" / str(epoch + 1)).is_dir()
    assert not pictures.exists()  # those of the evaluation
    assert metrics(workdir) == wanted[: epoch + 1]
    with pytest.MonkeyPatch.context() as patch:
        told_to_end(patch, second, epoch + 1)
        runs.run(runs.flags, workdir, 2 * K)
    assert pictures.exists()
    runs.run(runs.flags, workdir, 2 * K)
    check_same(workdir, runs.whole)


@pytest.mark.parametrize("runs", ["ddpo_is"], indirect=True)
def test_told_to_end_before_any_epoch_is_done_it_begins_anew(runs, tmp_path, capfd):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        told_to_end(patch, "collect", 0)
        runs.run(runs.flags, workdir, 2 * K)
    assert "no epoch is done yet" in capfd.readouterr().err
    assert not list(workdir.glob("checkpoints/*"))
    runs.run(runs.flags, workdir, 2 * K)
    check_same(workdir, runs.whole)


@pytest.mark.parametrize("runs", ["ddpo_is"], indirect=True)
def test_another_microbatch_draws_the_same_and_loses_the_same(runs, tmp_path):
    workdir = shutil.copytree(runs.half, tmp_path / "run")
    flags = (*runs.flags, "--config.train.microbatch=4")
    draws = runs.run(flags, workdir, 2 * K)
    assert sorted(draws) == [K, K + 1]
    for epoch, found in draws.items():
        for name, wanted in runs.draws[epoch].items():
            assert np.array_equal(found[name], wanted), (epoch, name)
    found, wanted = metrics(workdir), metrics(runs.whole)
    assert found[: K + 1] == wanted[: K + 1]
    for line, other in zip(found[K + 1 :], wanted[K + 1 :], strict=True):
        assert line["policy/ratio_max_deviation"] == 0.0
        for name in LOSSES:
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


# Holds epoch K back until the signal has come: it is neither early nor late.
HELD_BACK = f"""
import sys, time
import ddrl_jax.train as loop
from ddrl_jax.main import run

collect = loop.collect

def held_back(program, state, epoch, pool, tracker, timer, stop):
    if epoch == {K}:
        print("now", flush=True)
        while not stop.requested:
            time.sleep(0.01)
    return collect(program, state, epoch, pool, tracker, timer, stop)

loop.collect = held_back
sys.exit(run(sys.argv))
"""


def program(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """A process of this repository, with its output to read."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def to_its_end(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    with program("-m", "ddrl_jax.main", *arguments, env=env) as child:
        _, errors = child.communicate(timeout=1800)
    assert child.returncode == 0, errors


def speaking(flags: tuple[str, ...], path: Path) -> str:
    """The flag of starting weights whose output layers are not 0, as new ones' are."""
    pipeline = emoji_pipeline(
        parse(["main", *flags, f"--workdir={path.parent}"]).config
    )
    params = jax.jit(pipeline.init)(jax.random.key(0))["params"]
    write_params(path, perturbed(params))
    return f"--config.model.init={path}"


@pytest.mark.parametrize("row", ["ddrl_paper", "flow_grpo"])
def test_sigterm_saves_ends_well_and_the_same_command_goes_on(row, tmp_path):
    """In processes of their own, which build and compile everything anew."""
    flags = (*flags_of(row), f"--config.train.epochs={2 * K}")
    if row == "flow_grpo":  # a LoRA of a network that says 0 stays as it is
        flags = (*flags, speaking(flags, tmp_path / "spoken.npz"))
    interrupted = (*flags, f"--workdir={tmp_path}/run")
    with program("-c", HELD_BACK, *interrupted) as child:
        assert child.stdout.readline() == "now\n"
        child.terminate()
        output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert "report" not in output
    assert errors.count(f"SIGTERM: epoch {K} is saved; the same command goes on") == 1
    assert (tmp_path / "run" / "checkpoints" / str(K)).is_dir()
    to_its_end(*interrupted)
    to_its_end(*flags, f"--workdir={tmp_path}/whole")
    if row == "flow_grpo":  # whose reference is the policy that the run began with
        last = metrics(tmp_path / "whole")[-1]
        assert last["policy/kl"] > 0 and last["policy/ratio_max_deviation"] == 0
    check_same(tmp_path / "run", tmp_path / "whole")


# What conftest.py sets for the sake of speed, and a user does not.
OF_THE_TESTS = (
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "XLA_FLAGS",
)


def test_as_a_user_runs_it(tmp_path):
    """With the optimisations and the threads of XLA.

    The run at a stretch compiles everything anew, or equal bits could be those of
    equal programs alone.
    """
    user = {k: v for k, v in os.environ.items() if k not in OF_THE_TESTS}
    flags = (f"--config={ROOT}/configs/quickstart.py:smoke",)
    for name, lengths in (("run", (K, 2 * K)), ("whole", (2 * K,))):
        env = user | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / f"{name}_cache")}
        for epochs in lengths:
            more = (f"--workdir={tmp_path / name}", f"--config.train.epochs={epochs}")
            to_its_end(*flags, *more, env=env)
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["step"] == 2 * K and lines[-1]["grad_norm"] > 0
    check_same(tmp_path / "run", tmp_path / "whole")
