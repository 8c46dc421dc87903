"""One epoch of experience: rollouts on device, rewards on threads, advantages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.distributed import summed, whole_scores
from ddrl_jax.draws import draw_chunks, draw_trained_steps, prompts_of
from ddrl_jax.errors import UserError
from ddrl_jax.finite import broken, finite_rows, leave_out, stand_ins
from ddrl_jax.interfaces import Prompts, Rollout, Scores
from ddrl_jax.learner import Minibatch, TrainState
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.program import Program
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rewards.registry import counters
from ddrl_jax.sharding import Held, place_batch, take_rows, to_host
from ddrl_jax.terms import WEIGHTED


class Collected(NamedTuple):
    """What an epoch's updates work on."""

    prompts: Prompts
    chunks: list[Minibatch]
    tracker: PerPromptTracker
    metrics: dict[str, float]
    samples: np.ndarray | None = None  # numbers of those in the chunks; None: all


def collect(
    program: Program,
    state: TrainState,
    epoch: int,
    pool: RewardPool,
    tracker: PerPromptTracker,
    timer: Timer,
    stop: Preemption,
) -> Collected | None:
    """Samples the epoch's prompts and judges them while the next chunk samples.

    Returns:
      The chunks with trajectories and advantages, or None where a stop was asked for.
    """
    config = program.config
    prompts = prompts_of(program, epoch)
    chunks = draw_chunks(program, prompts, epoch, 0)
    told, asked = _skipped(program), counters(pool.rewards)
    if not config.policy.weight:
        return Collected(prompts, chunks, tracker, told)
    with timer("rollout"):
        sampled = _sample(program, state, epoch, prompts, chunks, pool, stop, timer)
    if sampled is None:
        return None
    chunks, handles, rows, finite = sampled
    with timer("reward"):
        found = pool.collect(handles, rows)
        scores = whole_scores(found, rows, len(prompts.index))
    if not finite.any():  # it is not the judges that failed
        raise broken(finite)
    scores = leave_out(scores, finite, config.rewards.on_failure)
    chunks = _without_nan(program, chunks, finite)
    advantages, tracker = program.advantages(
        scores.values, scores.valid, prompts.group, prompts.index, tracker
    )
    metrics = told | _reward_metrics(dict(config.rewards.weights), scores)
    if not finite.all():
        metrics["reward/not_finite"] = float(np.sum(~finite))
    counted = counters(pool.rewards).items()
    metrics |= summed({name: n - asked.get(name, 0.0) for name, n in counted})
    metrics |= _rollout_gap(config.policy, chunks)
    samples = None
    if config.policy.term == "sparse_rwr":
        x0 = tuple(chunk.x0 for chunk in chunks)
        samples, advantages, x0 = program.select(advantages, x0)
        samples = to_host(samples)
        fresh = draw_chunks(program, prompts, epoch, 0, samples)
        pairs = zip(fresh, _split(program, x0, len(fresh)), strict=True)
        chunks = [chunk._replace(x0=part) for chunk, part in pairs]
    chunks = [
        chunk._replace(advantages=part)
        for chunk, part in zip(
            chunks, _split(program, advantages, len(chunks)), strict=True
        )
    ]
    return Collected(prompts, chunks, tracker, metrics, samples)


def _sample(program, state, epoch, prompts, chunks, pool, stop, timer):
    """Rolls out every chunk; its pictures go to the judges as soon as they exist.

    Returns:
      The chunks, the calls for the rows this process holds, these rows, and of all
      samples whether they are finite; or None.
    """
    config, size = program.config, program.chunk
    trained = draw_trained_steps(config, program.kernel, epoch, len(prompts.index))
    filled, handles, held, finite = [], [], [], []
    weights = program.sampling(state.params, program.frozen)
    for number, chunk in enumerate(chunks):
        if stop.agree():
            return None
        rows = slice(number * size, (number + 1) * size)
        steps = place_batch(
            program.mesh, np.ascontiguousarray(trained[:, rows]), axis=1
        )
        found = program.rollout(*weights, chunk.keys, chunk.cond, steps)
        images = Held(place_batch(program.mesh, found.images))
        own = number * size + images.rows
        if len(own):
            images.copy_to_host_async()
            with timer("reward"):  # it waits where the judges are behind
                handles.append(pool.submit(images, [prompts.text[i] for i in own]))
        held.append(own)
        finite.append(finite_rows(found.x0))
        filled.append(_filled(program, state, chunk, found))
    # The judges of earlier chunks are at work meanwhile; the last pictures are waited
    # for here, so that the clock books this time on the rollout.
    jax.block_until_ready(found.images)
    return filled, handles, np.concatenate(held), np.concatenate(to_host(finite))


def _filled(program: Program, state: TrainState, chunk: Minibatch, found: Rollout):
    """The chunk with what its policy term needs: its samples, or transitions."""
    policy = program.config.policy
    if policy.term in WEIGHTED:
        return chunk._replace(x0=found.x0)
    kept = found.trajectory
    chunk = chunk._replace(trajectory=kept, old_log_prob=kept.log_prob)
    if policy.old_log_prob == "recompute":
        old = program.recompute(state.params, program.frozen, _with_zeros(chunk))
        chunk = chunk._replace(old_log_prob=old)
    return chunk


def _without_nan(
    program: Program, chunks: list[Minibatch], finite: np.ndarray
) -> list[Minibatch]:
    """Other samples in place of those that are not finite.

    Their advantage is 0 and they add nothing, as NaN times 0 would.
    """
    if finite.all() or not finite.any():
        return chunks
    rows, size, mesh = stand_ins(finite, program.chunk), program.chunk, program.mesh
    by_step = [(chunk.trajectory, chunk.old_log_prob) for chunk in chunks]
    each = [(chunk.cond, chunk.x0) for chunk in chunks]
    found = list(chunks)
    for number in np.unique(np.flatnonzero(~finite) // size):
        part = rows[number * size : (number + 1) * size]
        trajectory, old = take_rows(mesh, by_step, part, axis=1)
        cond, x0 = take_rows(mesh, each, part)
        found[number] = chunks[number]._replace(
            trajectory=trajectory, old_log_prob=old, cond=cond, x0=x0
        )
    return found


def _rollout_gap(policy, chunks: list[Minibatch]) -> dict[str, float]:
    """Where the old log-probs are recomputed, their largest distance to the rollout's.

    The ratio is 1 whatever that is, so nothing else would tell of it. Where they are
    "exact", the update measures it.
    """
    if policy.old_log_prob != "recompute" or policy.term in WEIGHTED:
        return {}
    pairs = [(c.trajectory, c.old_log_prob) for c in chunks]
    gaps = [_gap(found.log_prob, old) for found, old in pairs if found is not None]
    return {"policy/rollout_gap": float(np.max(jax.device_get(gaps)))}


@jax.jit
def _gap(rolled_out: jax.Array, recomputed: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(rolled_out - recomputed))


def _skipped(program: Program) -> dict[str, float]:
    """Records of the data that were no use, where data.on_bad "skip" left some out."""
    count = program.source.skipped if program.source else 0
    return {"data/skipped": float(count)} if count else {}


def _reward_metrics(weights: dict, scores: Scores) -> dict[str, float]:
    valid, out = scores.valid, {"reward/valid": float(np.mean(scores.valid))}
    if not valid.any():
        raise UserError(
            "no sample of the epoch has a reward",
            got=f"{len(valid)} failures of {', '.join(weights)}",
            wanted="at least one valid reward",
            way_out="repair the reward; config.rewards.on_failure='error' shows the "
            "first failure",
        )
    total = np.zeros(len(valid), np.float64)
    for name, weight in weights.items():
        values = scores.values[name]
        if missing := int(np.isnan(values).sum()):  # only with on_failure "mask"
            out[f"reward/{name}/missing"] = float(missing)
        total += weight * np.where(valid, values, 0.0)
        out[f"reward/{name}/mean"] = float(np.mean(values[valid]))
        out[f"reward/{name}/std"] = float(np.std(values[valid]))
    return out | {"reward/mean": float(np.mean(total[valid]))}


def _split(program: Program, advantages: jax.Array, chunks: int) -> list[jax.Array]:
    return [place_batch(program.mesh, part) for part in jnp.split(advantages, chunks)]


def _with_zeros(chunk: Minibatch) -> Minibatch:
    """Fills the one field that scoring does not read."""
    return chunk._replace(advantages=jnp.zeros(chunk.keys.shape, jnp.float32))
