"""Rewards become advantages: per reward, weighted, tempered, transformed, clipped."""

import jax
import numpy as np
import pytest
from edited_config import configured

from ddrl_jax.learner import make_advantages
from ddrl_jax.objectives.advantages import PerPromptTracker

GROUP = np.asarray([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
INDEX = np.asarray([2, 2, 2, 2, 0, 0, 0, 0], np.int32)
REWARDS = np.asarray([1, 2, 3, 6, 10, 10, 14, 14], np.float32)
ALL = np.ones(8, bool)
TRACKER = PerPromptTracker.init(3, 16)


def judged(values, valid=ALL, tracker=TRACKER, group=GROUP, **edits):
    names = {name: 1.0 for name in values}
    # "advantages__clip" and the like: a key of the configuration
    edits = {k.replace("__", "."): v for k, v in edits.items()}
    config = configured(
        {
            "prompts.per_epoch": 2,
            "prompts.group_size": 4,
            "rewards.weights": names,
            "advantages.epsilon": 0.0,
            "advantages.clip": 0.0,
        }
        | edits
    )
    values = {n: np.asarray(v, np.float32) for n, v in values.items()}
    found, tracker = jax.jit(make_advantages(config))(
        values, valid, group, INDEX, tracker
    )
    return np.asarray(found), tracker


def standard(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean()) / x.std()


def by_group(x):
    return np.concatenate([standard(x[:4]), standard(x[4:])])


def test_groups_are_normalised_on_their_own():
    value, tracker = judged({"r": REWARDS})
    np.testing.assert_allclose(value, by_group(REWARDS), atol=1e-6)
    assert value.dtype == np.float32 and not tracker.count.any()


def test_the_batch_as_one_group():
    value, _ = judged({"r": REWARDS}, advantages__kind="batch")
    np.testing.assert_allclose(value, standard(REWARDS), atol=1e-6)


def test_two_rewards_are_normalised_then_averaged_by_weight():
    other = REWARDS[::-1] * 1000.0  # other units do not drown the first
    value, _ = judged({"r": REWARDS, "s": other}, rewards__weights={"r": 3.0, "s": 1.0})
    expected = 0.75 * by_group(REWARDS) + 0.25 * by_group(other)
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_temperature_transform_and_clip_in_that_order():
    value, _ = judged(
        {"r": REWARDS},
        policy__beta=0.5,
        policy__transform="neg_exp",
        advantages__clip=3.0,
    )
    expected = np.maximum(-np.exp(-by_group(REWARDS) / 0.5), -3.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert (expected == -3.0).any() and (expected > -3.0).any()


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_the_centre_is_that_of_what_is_normalised_over(kind):
    whole = {"advantages__kind": kind, "policy__transform": "neg_exp_centered"}
    value, _ = judged({"r": REWARDS}, **whole)
    raised = -np.exp(-(standard(REWARDS) if kind == "batch" else by_group(REWARDS)))
    shape = (1, 8) if kind == "batch" else (2, 4)
    centre = np.repeat(raised.reshape(shape).mean(1), shape[1])
    np.testing.assert_allclose(value, raised - centre, atol=1e-5)


def test_samples_without_a_group_have_advantages_after_centring():
    alone = {"prompts__per_epoch": 8, "prompts__group_size": 1}
    edits = {"advantages__kind": "batch", "policy__transform": "neg_exp_centered"}
    value, _ = judged({"r": REWARDS}, group=np.arange(8), **edits, **alone)
    assert np.abs(value).min() > 0


def test_a_failed_sample_leaves_its_group():
    valid = ALL.copy()
    valid[[1, 6]] = False
    rewards = np.where(valid, REWARDS, np.nan)
    value, _ = judged({"r": rewards}, valid)
    np.testing.assert_array_equal(value[~valid], 0.0)
    np.testing.assert_allclose(value[[0, 2, 3]], standard([1, 3, 6]), atol=1e-6)
    np.testing.assert_allclose(value[[4, 5, 7]], standard([10, 10, 14]), atol=1e-6)


def test_running_statistics_of_each_prompt():
    edits = {"advantages__kind": "tracker", "advantages__tracker_min": 4}
    first, tracker = judged({"r": REWARDS}, **edits)
    np.testing.assert_allclose(first, by_group(REWARDS), atol=1e-4)
    np.testing.assert_array_equal(tracker.count, [4, 0, 4])
    second, tracker = judged({"r": REWARDS + 1.0}, tracker=tracker, **edits)
    history = np.concatenate([REWARDS[:4], REWARDS[:4] + 1.0])
    expected = (REWARDS[:4] + 1.0 - history.mean()) / history.std()
    np.testing.assert_allclose(second[:4], expected, atol=1e-4)
    np.testing.assert_array_equal(tracker.count, [8, 0, 8])


def test_the_tracker_keeps_the_weighted_sum_of_the_rewards():
    edits = {"advantages__kind": "tracker", "advantages__tracker_min": 4}
    other = REWARDS[::-1]
    value, tracker = judged(
        {"r": REWARDS, "s": other}, rewards__weights={"r": 3.0, "s": -0.5}, **edits
    )
    total = 3.0 * REWARDS - 0.5 * other
    np.testing.assert_allclose(value, by_group(total), atol=1e-4)
    np.testing.assert_allclose(tracker.buffer[2, :4], total[:4], rtol=1e-6)


def test_the_epsilon_of_the_config_is_used():
    for kind in ("group", "batch", "tracker"):
        edits = {"advantages__kind": kind, "advantages__tracker_min": 1}
        wide, _ = judged({"r": REWARDS}, advantages__epsilon=1e3, **edits)
        assert 0 < np.abs(wide).max() < 0.01, kind
