"""Meshes whose axes lie across processes, and the other modes in two processes.

Each command runs in one process with four devices and in two of two: the first axis of
a mesh that is larger than 1 lies across the two. The commands of a side share their
processes, which start and compile once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from process_runs import (
    FLAGS,
    ROOT,
    WITHOUT_GLOO,
    epochs_saved,
    free_port,
    metrics,
)
from tiny_runs import perturbed

from ddrl_jax.config_file import load_config
from ddrl_jax.metrics import ONLY_AT_END
from ddrl_jax.models.emoji import emoji_pipeline, write_params

pytestmark = pytest.mark.slow

EPOCHS = 2
MESHES = {
    "fsdp": {"fsdp": 4},
    "tensor": {"tensor": 2, "context": 2},  # a device's tokens are all in its process
    "context": {"context": 4},
}
SHORT = (
    f"--config.train.epochs={EPOCHS}",
    "--config.train.microbatch=4",
    "--config.evaluate.every=0",  # at the end alone
    "--config.log.progress=False",
)
MODES = ("evaluate", "sample", "export")
COMMANDS = """
import json, os, sys
from ddrl_jax.distributed import joined
from ddrl_jax.main import run
from ddrl_jax.surroundings import place

with joined(place({}, os.environ)):
    for flags in json.loads(sys.argv[1]):
        print("COMMAND", flush=True)
        if run(["main", *flags]):
            raise SystemExit(f"failed: {flags}")
"""


def commands(root: Path, init: Path) -> list[list[str]]:
    """A training on every mesh, then every mode on the first of them."""
    found = []
    for name, sizes in MESHES.items():
        sizes = {"data": 1} | sizes
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
        start = (f"--config.model.init={init}", f"--workdir={root}/{name}")
        found.append([*FLAGS, *SHORT, *mesh, *start])
    return found + [[*found[0], f"--mode={mode}"] for mode in MODES]


def started(root: Path, init: Path, processes: int) -> list[subprocess.Popen]:
    place = {
        "DDRL_PROCESSES": str(processes),
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
    }
    place["DDRL_COORDINATOR"] = f"127.0.0.1:{free_port()}"
    program = WITHOUT_GLOO + COMMANDS
    command = [sys.executable, "-c", program, json.dumps(commands(root, init))]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | place | {"DDRL_PROCESS": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def said(run: Sequence[subprocess.Popen]) -> list[list[str]]:
    """What each command has printed, of each process."""
    try:
        ended = [process.communicate(timeout=1500) for process in run]
    finally:
        for process in run:
            process.kill()
    for process, (_, errors) in zip(run, ended, strict=True):
        assert process.returncode == 0, errors
    parts = [output.split("COMMAND\n")[1:] for output, _ in ended]
    assert {len(part) for part in parts} == {len(MESHES) + len(MODES)}
    return parts


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    """Weights with which every layer has a say: a new network's gates are all 0."""
    config = load_config(FLAGS[0].removeprefix("--config="))
    params = jax.jit(emoji_pipeline(config).init)(jax.random.key(0))["params"]
    path = tmp_path_factory.mktemp("init") / "spoken.npz"
    write_params(path, perturbed(params))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, init):
    """(workdirs and words of one process, those of two)."""
    root = tmp_path_factory.mktemp("meshes")
    (alone,) = said(started(root / "one", init, 1))
    return (root / "one", alone), (root / "two", said(started(root / "two", init, 2)))


@pytest.mark.parametrize("name", MESHES)
def test_training_across_processes_is_that_of_one(name, runs):
    (one, _), (two, _) = runs
    found, wanted = metrics(two / name), metrics(one / name)
    assert [line["step"] for line in found] == list(range(EPOCHS + 1))
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    assert {"reward/mean", "policy/loss", "data/loss", "grad_norm"} <= found[1].keys()
    for line, twin in zip(found, wanted, strict=True):
        assert line.pop(ONLY_AT_END, ()) == twin.pop(ONLY_AT_END, ())  # names
        for key, value in line.items():
            assert value == pytest.approx(twin[key], rel=1e-5, abs=1e-5), (key, line)
    assert len({line["grad_norm"] for line in found[1:]}) == EPOCHS  # it trains
    assert epochs_saved(two / name)[-1] == EPOCHS


def of_mode(runs, mode: str) -> tuple[str, list[str]]:
    """What a mode printed, of one process and of both others."""
    (one, alone), (two, both) = runs
    number = len(MESHES) + MODES.index(mode)
    parts = [part[number].replace(f"{two}/", f"{one}/") for part in both]
    return alone[number], parts


def test_evaluation_in_two_processes_is_that_of_one(runs):
    wanted, (found, other) = of_mode(runs, "evaluate")
    assert other == ""
    assert wanted.startswith(f"epoch {EPOCHS}\n") and "heldout_loss" in wanted
    values = [_values(text) for text in (found, wanted)]
    assert values[0].keys() == values[1].keys() and len(values[0]) == 3
    for name, value in values[0].items():
        assert value == pytest.approx(values[1][name], rel=1e-4), name


def _values(text: str) -> dict[str, float]:
    """The printed numbers, which have five digits."""
    lines = [line.split() for line in text.splitlines()[1:-1]]
    return {name: float(value) for name, value in lines}


def test_samples_of_two_processes_are_those_of_one(runs):
    (one, _), (two, _) = runs
    wanted, (found, other) = of_mode(runs, "sample")
    wanted, found = (text.splitlines()[-1] for text in (wanted, found))  # after TFDS's
    assert found == wanted and "samples of" in found and other == ""
    import tensorflow_datasets as tfds  # slow

    folders = [str(root / "fsdp" / "dataset") for root in (one, two)]
    sources = [tfds.builder_from_directory(folder) for folder in folders]
    sets = [list(source.as_data_source()["train"]) for source in sources]
    assert len(sets[0]) == len(sets[1]) == int(found.split()[0]) > 1
    for mine, theirs in zip(*sets, strict=True):
        assert mine.keys() == theirs.keys()
        apart = mine["image"].astype(int) - theirs["image"].astype(int)
        assert np.abs(apart).max() <= 1  # weights within rounding of each other


def test_the_weights_that_two_processes_export_are_those_of_one(runs, init):
    (one, _), (two, _) = runs
    wanted, (found, other) = of_mode(runs, "export")
    assert found == wanted and other == ""
    name = f"fsdp/export/{EPOCHS:06d}.npz"
    with np.load(one / name) as mine, np.load(two / name) as theirs:
        assert mine.files == theirs.files and len(mine.files) > 10
        assert _same_halves(mine, theirs)
        with np.load(init) as begin:  # and what they were trained from is not
            assert not _same_halves(begin, theirs)


def _same_halves(mine, theirs) -> bool:
    """Equal but for a rounding to half precision, either way, of two like numbers."""
    near = {"rtol": 2**-10, "atol": 5e-6}
    return all(np.allclose(mine[leaf], theirs[leaf], **near) for leaf in theirs.files)
