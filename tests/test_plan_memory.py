"""Planned bytes of everything that stays on a device against the arrays of a run."""

import jax
import pytest
from tiny_runs import tiny_program

from ddrl_jax.collect import collect
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.plan.lowered import Compiled, compile_phase, describe
from ddrl_jax.plan.memory import own, peak, resident
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.pool import RewardPool

EDITS = {
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "prompts.per_epoch": 4,
    "prompts.group_size": 8,
    "train.microbatch": 1,
    "train.minibatches": 2,
    "policy.kl_weight": 0.1,
    "policy.old_log_prob": "recompute",
    "rollout.layout": "replicated",
    "rollout.dtype": "bfloat16",
    "rewards.weights": {"brightness": 1.0},
}


def live_bytes(tree) -> int:
    """Of the arrays of a tree on the first device, each buffer once."""
    device = jax.devices()[0]
    arrays = {id(a): a for a in jax.tree.leaves(tree)}.values()
    shards = [s for a in arrays for s in a.addressable_shards if s.device == device]
    return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize("lora", [0, 2])
def test_what_stays_is_what_a_run_keeps_between_its_phases(lora):
    """All four chunks of the two minibatches, the reference, and the rollout's copy."""
    program = tiny_program(EDITS | {"lora.rank": lora})
    plan, state = describe(program.config), program.new_state()
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    judge = {"brightness": lambda images, prompts: images.mean((1, 2, 3))}
    with RewardPool(judge, 2, 60.0, "error") as pool:
        epoch = collect(program, state, 0, pool, tracker, Timer(), Preemption())
    assert epoch is not None and len(epoch.chunks) == 4
    rows = resident(plan)
    reference = program.reference[0]
    live = {
        "parameters": live_bytes(state.params),
        "frozen base": live_bytes(program.frozen),
        "reference policy": live_bytes(reference),
        "optimizer": live_bytes(state.opt_state),
        "average of the weights": live_bytes(state.ema),
        "trajectories of the epoch": live_bytes(epoch.chunks),
        "prompt embeddings": live_bytes(program.cond_table),
        "autoencoder": 0,
        "text encoder": 0,
        "judges": 0,
    }
    assert rows == live
    copied = live_bytes(program.sampling(state.params, program.frozen))
    found = Compiled(plan.phases[0], 0, 0, 0, *(None,) * 3)
    times = 4 * 2 * program.config.sampler.steps + 4 * len(epoch.chunks[0].old_log_prob)
    assert own(plan, found)["weights of the rollout"] == copied + times
    assert copied > rows["parameters"]


def test_the_peak_is_what_stays_and_the_phases_own_part():
    plan = describe(tiny_program(EDITS).config)
    found = compile_phase(plan.phases[-1], plan.mesh)
    stays = sum(resident(plan).values())
    assert peak(plan, found) == stays + found.outputs + found.temporaries
    # An update's arguments lack the other minibatch's chunks and the prompts.
    others = resident(plan)["trajectories of the epoch"] / 2
    assert peak(plan, found) > found.arguments + found.temporaries + others
