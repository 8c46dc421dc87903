"""How much of the chips' peak a run uses: FLOPs of its own jitted functions over time.

    mfu_stage = model FLOPs of the stage / (seconds of the stage, devices, peak)
    mfu = the same of rollout and update together

Model FLOPs are those of matrix products and convolutions, without what jax.checkpoint
computes a second time (PaLM, 2204.02311, appendix B) and without what several devices
do alike; the peak is that of bfloat16 whatever the dtype of the network. Rewards and
evaluation count nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ddrl_jax.chips import detect
from ddrl_jax.draws import draw_trained_steps
from ddrl_jax.flops import Count, count
from ddrl_jax.learner import Minibatch
from ddrl_jax.program import Program
from ddrl_jax.resume import samples_per_epoch


class Work(NamedTuple):
    """What one epoch multiplies on all devices together."""

    rollout: Count
    update: Count


def epoch_work(program: Program, chunks: list[Minibatch]) -> Work:
    """Traces the program's own functions at the shapes of an epoch; compiles nothing.

    Args:
      program: the run.
      chunks: of an epoch's updates, with their trajectories. Sparse RWR rolls out more
        than it fits.
    """
    train = program.config.train
    per_update = len(chunks) // train.minibatches
    state = program.abstract_state()
    part = tuple(chunks[:per_update])
    update = count(program.update, state, program.frozen, program.reference, part)
    updates = train.minibatches * train.inner_epochs
    if not program.config.policy.weight:
        return Work(Count(), update.times(updates))
    calls = samples_per_epoch(program.config) // program.chunk
    rollout = _chunk_rollout(program, chunks[0]).times(calls)
    return Work(rollout, update.times(updates))


def _chunk_rollout(program: Program, chunk: Minibatch) -> Count:
    config, size = program.config, chunk.keys.shape[0]
    params = program.abstract_state().params
    steps = draw_trained_steps(config, program.kernel, 0, size)
    found = count(
        program.rollout, params, program.frozen, chunk.keys, chunk.cond, steps
    )
    if config.policy.old_log_prob == "recompute":
        again = chunk._replace(advantages=jnp.zeros(size, jnp.float32))
        found = found.plus(count(program.recompute, params, program.frozen, again))
    return found


class Utilization:
    """The metrics mfu and perf/* of each epoch; counts once, at the first one.

    mfu, perf/mfu_rollout and perf/mfu_update are written where the peak is known, from
    config.log.peak_flops or from the chip; perf/tflops, per device, always.

    Args:
      program: the run.
    """

    def __init__(self, program: Program):
        self._program = program
        self._work: Work | None = None
        chip = detect()
        self._peak = program.config.log.peak_flops or (chip.flops if chip else 0.0)

    def __call__(
        self, chunks: list[Minibatch], times: dict[str, float]
    ) -> dict[str, float]:
        """Returns mfu and perf/* of an epoch.

        Args:
          chunks: of the epoch; only their shapes are used.
          times: with time/rollout and time/update, in seconds.
        """
        if self._work is None:
            self._work = epoch_work(self._program, chunks)
        return rates(self._work, times, self._program.mesh.size, self._peak)


def rates(
    work: Work, times: dict[str, float], devices: int, peak: float
) -> dict[str, float]:
    """Returns perf/tflops, and mfu and perf/mfu_STAGE where `peak` is not 0.

    A stage whose count is not known, for a while loop of unknown length, has none.

    Args:
      work: of an epoch, on all devices.
      times: with time/STAGE in seconds.
      devices: that share the work.
      peak: FLOP/s of a device; 0 where it is not known.
    """
    found, flops, seconds = {}, 0.0, 0.0
    for stage, part in work._asdict().items():
        if part.loops:
            return {}
        spent = times[f"time/{stage}"]
        if not part.flops or not spent:
            continue
        own = part.model_flops / devices
        flops, seconds = flops + own, seconds + spent
        if peak:
            found[f"perf/mfu_{stage}"] = own / spent / peak
    if not seconds:
        return found
    whole = {"mfu": flops / seconds / peak} if peak else {}
    return whole | found | {"perf/tflops": flops / seconds / 1e12}
