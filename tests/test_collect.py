"""An epoch of experience: which picture is judged by which prompt, and what is told."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import perturbed_state, same_bits, tiny_program

from ddrl_jax.collect import collect
from ddrl_jax.draws import draw_trained_steps
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Scores
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.pool import RewardPool


def brightness(images, prompts):
    """A reward that says which picture and which prompt it was given."""
    assert len(images) == len(prompts) == 4
    return images.mean((1, 2, 3)) + 1000.0 * np.asarray([len(p) for p in prompts])


@pytest.fixture(scope="module")
def run():
    program = tiny_program({"rewards.weights": {"brightness": 1.0}})
    return program, perturbed_state(program)


def epoch(program, state, number=0, stop=None):
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    with RewardPool({"brightness": brightness}, 2, 60.0, "error") as pool:
        return collect(
            program, state, number, pool, tracker, Timer(), stop or Preemption()
        )


def test_an_epoch(run):
    program, state = run
    found = epoch(program, state)
    assert len(found.chunks) == 2 and list(found.prompts.group) == [0] * 4 + [1] * 4
    steps = np.flatnonzero(program.kernel.stochastic)
    rewards = []
    for number, chunk in enumerate(found.chunks):
        rows = slice(4 * number, 4 * number + 4)
        np.testing.assert_array_equal(chunk.trajectory.index[:, 0], steps)
        assert same_bits(chunk.old_log_prob, chunk.trajectory.log_prob)
        trained = chunk.trajectory.index
        images, _, _ = program.rollout(
            state.params, program.frozen, chunk.keys, chunk.cond, trained
        )
        rewards.append(brightness(np.asarray(images), found.prompts.text[rows]))
        assert np.ptp(np.asarray(chunk.advantages)) > 0
    rewards = np.concatenate(rewards)
    advantages = np.concatenate([c.advantages for c in found.chunks])
    order = np.argsort(rewards[:4]), np.argsort(rewards[4:])
    assert (np.argsort(advantages[:4]) == order[0]).all()
    assert (np.argsort(advantages[4:]) == order[1]).all()
    assert found.metrics["reward/brightness/mean"] == pytest.approx(
        rewards.mean(), rel=1e-6
    )


class Judged(RewardPool):
    """A pool whose scores are already known."""

    def __init__(self, scores):
        self.scores, self.rewards = scores, {}

    def submit(self, images, prompts):
        return len(prompts)

    def collect(self, handles, numbers=None):
        assert handles == [4, 4]
        return self.scores


def scored(run, values, valid):
    program, state = run
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    scores = Scores({"brightness": np.asarray(values, np.float32)}, np.asarray(valid))
    return collect(program, state, 0, Judged(scores), tracker, Timer(), Preemption())


def test_metrics_are_of_the_valid_samples(run):
    values = np.asarray([1, np.nan, 3, 6, 10, 10, np.nan, 14])
    found = scored(run, values, np.isfinite(values))
    advantages = np.concatenate([c.advantages for c in found.chunks])
    np.testing.assert_array_equal(advantages[[1, 6]], 0.0)
    assert found.metrics["reward/valid"] == 0.75
    assert found.metrics["reward/brightness/mean"] == pytest.approx(44 / 6)
    assert found.metrics["reward/mean"] == pytest.approx(44 / 6)
    assert found.metrics["reward/brightness/std"] == pytest.approx(np.nanstd(values))


def test_the_mean_reward_is_the_weighted_sum_that_is_trained(run):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.rewards.weights = {"brightness": 2.0, "other": 0.5}
    values = np.arange(8, dtype=np.float32)
    scores = Scores(
        {"brightness": values, "other": 10.0 * values + 1.0}, np.ones(8, bool)
    )
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    rest = (Judged(scores), tracker, Timer(), Preemption())
    found = collect(program._replace(config=config), state, 0, *rest)
    assert found is not None
    assert found.metrics["reward/other/mean"] == 36.0
    assert found.metrics["reward/mean"] == 2.0 * 3.5 + 0.5 * 36.0


def test_each_sample_keeps_the_steps_it_drew(run):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.policy.update(train_steps=2, per_sample_steps=True)
    found = epoch(program._replace(config=config), state)
    steps = draw_trained_steps(config, program.kernel, 0, 8)
    assert (steps[:, :4] != steps[:, 4:]).any()
    kept = [chunk.trajectory.index for chunk in found.chunks]
    np.testing.assert_array_equal(np.concatenate(kept, axis=1), steps)


def test_an_epoch_without_any_reward(run):
    with pytest.raises(UserError, match="no sample of the epoch has a reward"):
        scored(run, np.full(8, np.nan), np.zeros(8, bool))


def test_the_same_epoch_twice_and_another_one(run):
    program, state = run
    one, same, other = (epoch(program, state, n) for n in (0, 0, 1))
    assert same_bits(one.chunks, same.chunks) and one.metrics == same.metrics
    assert one.prompts.text != other.prompts.text
    assert not same_bits(one.chunks[0].trajectory, other.chunks[0].trajectory)


def test_old_log_probs_may_be_recomputed(run):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.policy.old_log_prob = "recompute"
    marked = program._replace(
        config=config, recompute=lambda *a: program.recompute(*a) + 1.0
    )
    found = epoch(marked, state)
    # the ratio is 1 to the recomputed ones, so this alone tells of the distance
    assert found.metrics["policy/rollout_gap"] == pytest.approx(1.0, abs=1e-6)
    assert "policy/rollout_gap" not in epoch(program, state).metrics
    for chunk in found.chunks:
        np.testing.assert_allclose(
            chunk.old_log_prob, chunk.trajectory.log_prob + 1.0, atol=1e-6
        )


def test_an_epoch_that_is_asked_to_stop_is_dropped(run):
    stop = Preemption()
    stop.requested = True
    assert epoch(*run, stop=stop) is None


def test_without_a_policy_term_nothing_is_sampled(run):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.policy.weight = 0.0
    refuse = lambda *_: pytest.fail("sampled")  # noqa: E731
    found = epoch(program._replace(config=config, rollout=refuse), state)
    assert [c.trajectory for c in found.chunks] == [None, None]
    assert found.metrics == {} and jnp.shape(found.chunks[0].keys) == (4,)
    assert jax.tree.leaves(found.chunks[0].advantages) == []


class Counting:
    """A reward that counts what it was asked, from the start of the process."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images, prompts):
        self.asked += 1
        return np.zeros(len(prompts))

    def counters(self):
        return {"requests": self.asked}


def test_counters_are_those_of_the_epoch(run):
    program, state = run
    judge = Counting()
    judge.asked = 100  # by an evaluation
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    with RewardPool({"brightness": judge}, 2, 60.0, "error") as pool:
        rest = (pool, tracker, Timer(), Preemption())
        found = [collect(program, state, number, *rest) for number in range(2)]
    assert [f.metrics["reward/brightness/requests"] for f in found] == [2.0, 2.0]
    assert judge.asked == 104


def test_a_chunk_is_judged_while_the_next_one_is_sampled(run):
    """The first judge is not done before the second rollout is asked for."""
    program, state = run
    sampled, begun = threading.Semaphore(0), []

    def rollout(*inputs):
        begun.append(inputs)
        if len(begun) == 2:
            sampled.release()
        return program.rollout(*inputs)

    def waiting(images, prompts):
        assert sampled.acquire(timeout=60.0)
        sampled.release()
        return images.mean((1, 2, 3))

    tracker = PerPromptTracker.init(len(program.prompts), 16)
    with RewardPool({"brightness": waiting}, 1, 120.0, "error") as pool:
        rest = (pool, tracker, Timer(), Preemption())
        found = collect(program._replace(rollout=rollout), state, 0, *rest)
    assert found is not None and found.metrics["reward/valid"] == 1.0


class Behind(Judged):
    """A pool that takes no more until a judge is done."""

    def submit(self, images, prompts):
        time.sleep(0.3)
        return len(prompts)


def test_waiting_for_judges_that_are_behind_is_time_of_the_reward(run):
    program, state = run
    scores = Scores({"brightness": np.zeros(8, np.float32)}, np.ones(8, bool))
    tracker, timer = PerPromptTracker.init(len(program.prompts), 16), Timer()
    collect(program, state, 0, Behind(scores), tracker, timer, Preemption())
    assert timer.epoch()["time/reward"] > 0.55
