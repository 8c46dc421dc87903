"""On policy the ratio is 1, or the run does not begin, or ends after that update."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.draws import each_chunk, prompts_of
from ddrl_jax.errors import UserError
from ddrl_jax.learner import TrainState, accumulate, policy_items, policy_loss
from ddrl_jax.program import Program
from ddrl_jax.sharding import place_batch, to_host


def ratio_deviations(program: Program, state: TrainState) -> dict[str, np.ndarray]:
    """|ratio - 1| of each noisy step between rollout and replay, on one chunk.

    Args:
      program: the run.
      state: its weights.

    Returns:
      For "update" (inside value_and_grad) and, where the rollout's log-probabilities
      are trained on, "replay" (without gradients): the largest of each noisy step [n].
    """
    config, kernel = program.config, program.kernel
    # One chunk's data are fetched, not an epoch's.
    chunk = next(each_chunk(program, prompts_of(program, 0), 0, 0))
    steps = np.flatnonzero(kernel.stochastic).astype(np.int32)
    trained = np.repeat(steps[:, None], program.chunk, 1)
    sampled = program.rollout(
        *program.sampling(state.params, program.frozen),
        chunk.keys,
        chunk.cond,
        place_batch(program.mesh, trained, axis=1),
    )
    trajectory = sampled.trajectory
    ones = jnp.ones(chunk.keys.shape, jnp.float32)
    chunk = chunk._replace(
        trajectory=trajectory, old_log_prob=trajectory.log_prob, advantages=ones
    )
    replayed = program.recompute(state.params, program.frozen, chunk)
    if config.policy.old_log_prob != "rollout":  # what is trained on is the replay
        chunk = chunk._replace(old_log_prob=replayed)
        return {"update": _deviations_in_update(program, state, chunk)}
    plain = np.abs(np.expm1(to_host(replayed - trajectory.log_prob)))
    inside = _deviations_in_update(program, state, chunk)
    return {"replay": plain.max(axis=1), "update": inside}


def _deviations_in_update(program: Program, state: TrainState, chunk) -> np.ndarray:
    @jax.jit
    def scan(params, frozen, reference, chunk):
        def loss(p, item):
            return policy_loss(program.objective, p, frozen, reference, item)

        items = policy_items((chunk,))

        def body(total, index):
            one = items._replace(index=index[None])
            total, metrics = accumulate(loss, params, one, total)
            return total, metrics["ratio_max_deviation"]

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(body, zeros, items.index)

    _, deviation = scan(state.params, program.frozen, program.reference, chunk)
    return to_host(deviation)


def check_ratio(program: Program, state: TrainState) -> None:
    """Refuses to train where a step's ratio is off by more than the tolerance.

    Raises:
      UserError: names the worst step of the sampler.
    """
    steps = np.flatnonzero(program.kernel.stochastic)
    tolerance = program.config.policy.ratio_tolerance
    for where, deviation in ratio_deviations(program, state).items():
        worst = int(np.argmax(deviation))
        if deviation[worst] <= tolerance:  # False for NaN too
            continue
        raise UserError(
            f"step {steps[worst]} of {program.config.sampler.kernel}: the policy ratio "
            f"is not 1 before any update ({where})",
            got=f"|ratio - 1| = {deviation[worst]:.3g}",
            wanted=f"at most {tolerance:g} (config.policy.ratio_tolerance)",
            way_out="config.policy.old_log_prob='recompute', or with one update an "
            "epoch 'exact' (in another --workdir, if this one has epochs), or a larger "
            "tolerance, well below config.policy.clip_range",
        )


def check_update(config: Any, values: Mapping[str, float], epoch: int) -> None:
    """Stops the run where the ratio was not 1 in the first update of an epoch.

    NaN is no deviation here: such an update was skipped, and too many stop the run.

    Args:
      config: the whole configuration.
      values: metrics of the epoch's updates.
      epoch: from 1.

    Raises:
      UserError: names the epoch, the deviation and the tolerance.
    """
    tolerance = config.policy.ratio_tolerance
    deviation = values.get("policy/ratio_max_deviation", 0.0)
    if not deviation > tolerance:
        return
    raise UserError(
        f"epoch {epoch}: the policy ratio was not 1 in the first update",
        got=f"|ratio - 1| = {deviation:.3g}",
        wanted=f"at most {tolerance:g} (config.policy.ratio_tolerance)",
        way_out="the same command with a larger tolerance, well below "
        "config.policy.clip_range, goes on from the last checkpoint; "
        "config.policy.old_log_prob='recompute' needs another --workdir",
    )
