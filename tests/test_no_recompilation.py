"""After the first epoch nothing compiles, and pictures cross to the host once."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import ddrl_jax.train as loop
from ddrl_jax.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, CHUNKS, SAMPLES = 3, 2, 16  # an epoch; in microbatches of eight
COMPILED = "/jax/core/compile/backend_compile_duration"  # a cache hit counts as well
FLAGS = (
    f"--config={ROOT}/configs/ddrl_paper.py:smoke",
    "--config.policy.kl_weight=0.01",
    "--config.train.inner_epochs=2",
    "--config.rewards.weights={'compressibility': 1.0, 'incompressibility': 0.5}",
    f"--config.train.epochs={EPOCHS}",
    "--config.mesh.data=1",
    "--config.log.tensorboard=False",
    "--config.log.progress=False",
)

pytestmark = pytest.mark.slow


class Seen(NamedTuple):
    """What a run did."""

    compiled: list[tuple[int, str]]  # (epochs written by then, what)
    fetches: list[int]  # of each picture batch given to the judges
    got: dict[str, list[int]]  # stage -> jax.device_get calls in each of its runs
    largest: int  # bytes of a call in "collect"
    pulled: list[list[tuple[int, ...]]]  # of each collect: arrays that NumPy was handed


class Pictures:
    """Stands in for a device array of pictures; counts how often it is fetched."""

    def __init__(self, images: jax.Array):
        self.images, self.shape, self.fetched = images, images.shape, 0

    def __array__(self, *arguments: Any, **others: Any) -> np.ndarray:
        self.fetched += 1
        return np.asarray(self.images)


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def handed(function: Any, shapes: list[tuple[int, ...]]) -> Any:
    """The function of NumPy; notes the shapes of the arrays of devices it is given."""

    def wrapped(x: Any, *more: Any, **others: Any) -> Any:
        if isinstance(x, jax.Array):
            shapes.append(x.shape)
        return function(x, *more, **others)

    return wrapped


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    """A run of three epochs with policy, data term, KL and an evaluation every epoch.

    Its report is left out: it comes after the training.
    """
    workdir = tmp_path_factory.mktemp("no_recompilation")
    compiled: list[tuple[int, str]] = []
    written, pictures, calls = [], [], []
    pulled, shapes = [], []
    got: dict[str, list[int]] = {"collect": [], "update_epoch": []}
    sizes: list[int] = []

    def listen(event: str, seconds: float, **others: Any) -> None:
        if event == COMPILED:
            compiled.append((len(written) - 1, str(others)))

    def counting(name: str):
        function = getattr(loop, name)

        def wrapped(*arguments: Any) -> Any:
            before = len(calls)
            shapes.clear()
            result = function(*arguments)
            if name == "collect":
                pulled.append(list(shapes))
            got[name].append(len(calls) - before)
            sizes.extend(calls[before:] if name == "collect" else ())
            return result

        return wrapped

    def submit(pool: Any, images: jax.Array, prompts: Any) -> Any:
        pictures.append(Pictures(images))
        return original(pool, pictures[-1], prompts)

    def write(metrics: Any, step: int, values: Any) -> None:
        writer(metrics, step, values)
        written.append(step)

    original, writer, get = loop.RewardPool.submit, loop.Metrics.write, jax.device_get
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        for name in got:
            patch.setattr(loop, name, counting(name))
        patch.setattr(loop.RewardPool, "submit", submit)
        patch.setattr(loop.Metrics, "write", write)
        patch.setattr(
            jax, "device_get", lambda tree: calls.append(size(tree)) or get(tree)
        )
        for name in ("asarray", "array"):
            patch.setattr(np, name, handed(getattr(np, name), shapes))
        patch.setattr(loop, "write_report", lambda home: home.root)
        loop.train(parse(["main", *FLAGS, f"--workdir={workdir}"]).config, str(workdir))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert written == list(range(EPOCHS + 1))
    fetched = [p.fetched for p in pictures]
    return Seen(compiled, fetched, got, max(sizes), pulled)


def test_nothing_compiles_after_the_first_epoch(seen):
    """No request to compile, cached or not, once epoch 1 is evaluated and written.

    That covers the later epochs, their evaluations and all but the first save.
    """
    late = [what for written, what in seen.compiled if written >= 1]
    assert late == []
    # The listener does hear: the start and the first epoch compile the two big ones.
    assert sum(written < 1 for written, _ in seen.compiled) > 2


def test_pictures_come_to_the_host_once_a_chunk_and_scalars_once_an_epoch(seen):
    """Counted at the two places where the loop fetches anything.

    Pictures: two rewards judge each chunk in two parts on two threads, and the array
    that they share is converted once. Sampling and judging call jax.device_get once,
    for a byte a sample: is it finite? So log-probabilities and trajectories stay on the
    device. An epoch's updates call it once, for all their metrics.
    """
    evaluations = EPOCHS + 1  # judged through the same pool, from the host's copy
    assert seen.fetches == [1] * (EPOCHS * CHUNKS + evaluations)
    assert seen.got == {"collect": [1] * EPOCHS, "update_epoch": [1] * EPOCHS}
    assert seen.largest == SAMPLES
    large = [[shape for shape in epoch if len(shape) > 3] for epoch in seen.pulled]
    # Pictures, once a chunk, and no trajectory, whoever asks NumPy for it.
    assert [len(epoch) for epoch in large] == [CHUNKS] * EPOCHS
    assert {len(shape) for epoch in large for shape in epoch} == {4}
