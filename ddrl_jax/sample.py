"""--mode=sample: a captioned data set of samples of the policy itself."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.data.samples import refuse_existing, write_samples
from ddrl_jax.distributed import is_main
from ddrl_jax.errors import UserError
from ddrl_jax.evaluate import chunks_of, make_sampler
from ddrl_jax.finite import SHOWN
from ddrl_jax.learner import TrainState
from ddrl_jax.lock import Lock
from ddrl_jax.matmul_precision import in_matmul_precision
from ddrl_jax.program import Program, build
from ddrl_jax.resume import start
from ddrl_jax.sharding import to_host
from ddrl_jax.sources import without_data
from ddrl_jax.workdir import open_workdir, tell_differences

SAMPLE_STREAM = 3_000_017  # folded into the seed: noise of its own


@in_matmul_precision
def sample_mode(config: Any, workdir: str) -> None:
    """Writes config.sample.per_prompt samples of every prompt as a TFDS data set.

    The policy is the newest checkpoint of WORKDIR, or the starting weights where it
    has none; solver, steps and guidance are those of config.sample, and the prompts may
    be others than the run's, which is told. The data of the run need not be there, but
    for prompts.source "data". The set can anchor DDRL: config.data.source="samples",
    data.path=FOLDER.

    Args:
      config: the whole configuration.
      workdir: folder of a run; created if it is not there.

    Raises:
      UserError: the output folder exists already, or a sample is not finite.
    """
    with open_workdir(workdir, config, mode="sample") as home:
        tell_differences(home, config, ())  # of a run that has begun: other prompts
        output = Path(config.sample.output or home.root / "dataset")
        # Before a lock and folders above it are made, and anything is built.
        refuse_existing(output)
        with _held(output):
            program = build(without_data(config, "sample"))
            checkpoints = Checkpoints(home.checkpoints, 0, 1, read_only=True)
            state = start(program, checkpoints).state
            drawn = _draw(program, state)
            if not is_main():  # helps to draw, and process 0 writes
                deque(drawn, maxlen=0)
                return
            count = write_samples(output, drawn)
    print(f"{count} samples of {len(program.prompts)} prompts: {output}", flush=True)


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Keeps off a run of another workdir that is to write to the same place."""
    if not is_main():
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(output.with_name(f".{output.name}.lock"))
    except UserError as error:
        raise UserError(
            f"another run is writing the data set {output}",
            got=error.got,
            wanted="one run a data set",
            way_out="wait for it, stop it, or set another --config.sample.output",
        ) from error
    try:
        # Whom the lock waited for has written it: to build for minutes is of no use.
        refuse_existing(output)
        yield
    finally:
        lock.close()


def _draw(
    program: Program, state: TrainState
) -> Iterator[tuple[np.ndarray, tuple[str, ...]]]:
    """Pictures and prompts, a chunk at a time."""
    config = program.config
    index = np.repeat(
        np.arange(len(program.prompts), dtype=np.int32), config.sample.per_prompt
    )
    solver = config.sample.solver
    if solver == "auto":
        solver = "euler" if program.pipeline.prediction == "velocity" else "ddim"
    sample = make_sampler(program, config.sample, solver)
    root = jax.random.fold_in(jax.random.key(config.seed), SAMPLE_STREAM)
    size, done = program.chunk, 0
    shown = config.log.progress and is_main() and sys.stderr.isatty()
    parts, total = chunks_of(program, root, index), -(-len(index) // size)
    for part in tqdm(parts, total=total, disable=not shown, unit="batch"):
        rows = index[done : done + size]
        images, finite = to_host(sample(state.average, program.frozen, *part))
        if not finite[: len(rows)].all():  # a data set of black pictures is none
            raise _not_finite(program, rows[~finite[: len(rows)]])
        yield images[: len(rows)], tuple(program.prompts[i] for i in rows)
        done += size


def _not_finite(program: Program, rows: np.ndarray) -> UserError:
    prompts = ", ".join(repr(program.prompts[i]) for i in rows[:SHOWN])
    return UserError(
        "samples are NaN or infinite and have no picture",
        got=f"{len(rows)} of a batch, of the prompts {prompts}",
        wanted="finite latents",
        way_out="try a lower --config.sample.guidance_scale or more "
        "--config.sample.steps; nothing is written",
    )
