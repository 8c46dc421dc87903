"""Advantages against NumPy loops in float64 and against DDPO's own data structure."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.objectives.advantages import (
    PerPromptTracker,
    batch_normalized,
    clip_advantages,
    combine,
    group_normalized,
)

TINY = np.finfo(np.float32).eps


def make_groups(seed, groups=7, size=6, valid=0.7):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(groups), size)).astype(np.int32)
    rewards = rng.normal(3.0, 2.0, ids.size).astype(np.float32)
    return rewards, ids, rng.random(ids.size) < valid


def group_loop(rewards, ids, mask, std, epsilon):
    """The definition, one group after the other, in float64."""
    rewards, out = rewards.astype(np.float64), np.zeros(ids.size)
    for group in np.unique(ids):
        members = (ids == group) & mask
        if members.sum() < 2:
            continue
        centered = rewards[members] - rewards[members].mean()
        scale = {
            "group": rewards[members].std() + epsilon,
            "global": rewards[mask].std() + epsilon,
            "none": 1.0,
        }[std]
        out[members] = centered / scale
    return out


def test_group_by_hand():
    rewards = np.array([1.0, 10.0, 2.0, 10.0, 3.0, 40.0], np.float32)
    ids = np.array([0, 1, 0, 1, 0, 1], np.int32)
    a, b = np.sqrt(1.5), 1 / np.sqrt(2)
    np.testing.assert_allclose(
        group_normalized(rewards, ids, epsilon=0.0),
        [-a, -b, 0.0, -b, a, 2 * b],
        rtol=1e-6,
        atol=1e-7,
    )
    centred = group_normalized(rewards, ids, std="none", epsilon=0.0)
    np.testing.assert_array_equal(centred, [-1.0, -10.0, 0.0, -10.0, 1.0, 20.0])


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.5])
def test_groups_equal_a_numpy_loop(std, epsilon):
    for seed in range(4):
        rewards, ids, mask = make_groups(seed)
        advantages = group_normalized(
            rewards, ids, mask, num_groups=7, std=std, epsilon=epsilon
        )
        expected = group_loop(rewards, ids, mask, std, epsilon)
        np.testing.assert_allclose(advantages, expected, atol=2e-6)


def test_advantages_of_a_group_sum_to_zero_with_unit_population_std():
    rewards, ids, _ = make_groups(5)
    advantages = np.asarray(group_normalized(rewards, ids, epsilon=0.0))
    for group in range(7):
        np.testing.assert_allclose(advantages[ids == group].sum(), 0.0, atol=2e-6)
        np.testing.assert_allclose(advantages[ids == group].std(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("names", [[10, 20, 7], [0, 7, 6], [-3, 4, 2**31 - 1]])
def test_group_ids_may_be_any_numbers(names):
    """Prompt numbers as they are; a sum over segments would lose those beyond b."""
    rewards = np.array([1.0, 10.0, 2.0, 10.0, 3.0, 40.0], np.float32)
    ids = np.array([0, 1, 0, 1, 2, 1], np.int32)
    named = np.array(names, np.int32)[ids]
    expected = group_loop(rewards, ids, np.ones(6, bool), "group", 1e-4)
    np.testing.assert_allclose(group_normalized(rewards, named), expected, atol=2e-6)
    compiled = jax.jit(group_normalized)(rewards, named)
    np.testing.assert_allclose(compiled, expected, atol=2e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.77, 1e7 + 3, 3e-38])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_equal_rewards_give_exactly_zero(value, size, epsilon):
    rewards = np.full(size, value, np.float32)
    ids = np.zeros(size, np.int32)
    for std in ("group", "global", "none"):
        advantages = group_normalized(rewards, ids, std=std, epsilon=epsilon)
        np.testing.assert_array_equal(advantages, 0.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rounding_dust_is_not_a_difference_but_the_next_size_up_is(scale):
    ids = np.zeros(4, np.int32)
    dusty = (scale * (1.1 + TINY * np.arange(4))).astype(np.float32)
    assert np.ptp(dusty) > 0
    assert np.all(group_normalized(dusty, ids, epsilon=1e-12) == 0.0)
    real = (scale * (1.1 + 8 * TINY * np.arange(4))).astype(np.float32)
    spread = np.ptp(np.asarray(group_normalized(real, ids, epsilon=1e-12)))
    assert spread > 1.0


def test_a_large_common_offset_costs_no_accuracy():
    small = np.array([0.0, 1.0, 3.0, 4.0, 8.0, 8.5, 2.0], np.float32)
    ids = np.zeros(7, np.int32)
    np.testing.assert_allclose(
        group_normalized(small + np.float32(2**20), ids),
        group_normalized(small, ids),
        rtol=1e-6,
    )


def test_single_members_and_wholly_masked_groups_get_exactly_zero():
    rewards = np.array([5.0, 1.0, 2.0, 9.0, 8.0], np.float32)
    ids = np.array([0, 1, 1, 2, 2], np.int32)
    mask = np.array([True, False, False, True, False])
    for std in ("group", "global", "none"):
        advantages = group_normalized(rewards, ids, mask, std=std, epsilon=0.0)
        np.testing.assert_array_equal(advantages, 0.0)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_masked_rewards_change_nothing_whatever_they_are(std):
    rewards, ids, mask = make_groups(6)
    poisoned = np.where(mask, rewards, np.nan).astype(np.float32)
    poisoned[np.flatnonzero(~mask)[0]] = np.inf
    alone = np.zeros(ids.size, np.float32)
    alone[mask] = group_normalized(rewards[mask], ids[mask], std=std)
    advantages = group_normalized(poisoned, ids, mask, std=std)
    np.testing.assert_allclose(advantages, alone, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(advantages)[~mask], 0.0)


def test_a_nan_that_is_not_masked_is_seen():
    rewards = np.array([1.0, np.nan, 2.0], np.float32)
    advantages = group_normalized(rewards, np.zeros(3, np.int32))
    assert np.isnan(advantages).any()


def test_sample_order_does_not_matter():
    rewards, ids, mask = make_groups(7)
    order = np.random.default_rng(8).permutation(ids.size)
    np.testing.assert_allclose(
        group_normalized(rewards[order], ids[order], mask[order]),
        np.asarray(group_normalized(rewards, ids, mask))[order],
        atol=1e-6,
    )


def test_clip_bounds_the_magnitude_and_zero_means_none():
    outlier = np.array([0.0] * 63 + [1.0], np.float32)
    ids = np.zeros(64, np.int32)
    unclipped = group_normalized(outlier, ids, epsilon=0.0)
    np.testing.assert_allclose(unclipped[-1], np.sqrt(63), rtol=1e-5)
    assert group_normalized(outlier, ids, epsilon=0.0, clip=5)[-1] == 5.0
    assert batch_normalized(outlier, clip=5)[-1] == 5.0
    np.testing.assert_array_equal(
        clip_advantages(jnp.array([-9.0, 0.5, 9.0]), 2.0), [-2.0, 0.5, 2.0]
    )


def test_integer_rewards_are_not_truncated():
    rewards = np.array([0, 1], np.int32)
    advantages = group_normalized(rewards, np.zeros(2, np.int32), std="none")
    np.testing.assert_array_equal(advantages, [-0.5, 0.5])


def test_groups_compile_and_agree():
    rewards, ids, mask = make_groups(9)
    compiled = jax.jit(lambda *a: group_normalized(*a, num_groups=7))
    np.testing.assert_allclose(
        compiled(rewards, ids, mask), group_normalized(rewards, ids, mask), atol=1e-6
    )


def test_an_unknown_std_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="group, global, none"):
        group_normalized(np.ones(2, np.float32), np.zeros(2, np.int32), std="batch")


def test_batch_normalisation_is_the_z_score_of_valid_rewards():
    rewards, _, mask = make_groups(10)
    exact = rewards.astype(np.float64)
    expected = (exact - exact[mask].mean()) / exact[mask].std() * mask
    np.testing.assert_allclose(batch_normalized(rewards, mask), expected, atol=2e-6)


def test_normalised_rewards_are_averaged_by_weight():
    advantages = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([0.5, 2.0])}
    np.testing.assert_allclose(
        combine(advantages, {"b": 3.0, "a": 1}), [0.625, 1.25], rtol=1e-6
    )
    mean = combine(advantages, {"a": 0.2, "b": 0.2})
    np.testing.assert_allclose(mean, [0.75, 0.5], rtol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, -7.0])
def test_a_negative_weight_turns_its_reward_round(weight):
    advantages = {"a": jnp.array([1.0, -1.0])}
    np.testing.assert_allclose(combine(advantages, {"a": weight}), [-1.0, 1.0])
    against = combine(advantages | {"b": jnp.array([3.0, 3.0])}, {"a": -1.0, "b": 1.0})
    np.testing.assert_allclose(against, [1.0, 2.0])


@pytest.mark.parametrize("weights", [{}, {"a": 1.0, "b": 1.0}, {"b": 1.0}, {"a": 0.0}])
def test_every_reward_needs_one_weight(weights):
    with pytest.raises(UserError, match="rewards.weights"):
        combine({"a": jnp.zeros(2)}, weights)
    with pytest.raises(UserError, match="other than 0"):
        combine({}, {})


def deque_update(store, size, prompts, rewards, mask, min_count):
    """DDPO's tracker as it is described: a deque a prompt, global fallback."""
    out = np.zeros(len(prompts))
    everyone = rewards[mask].astype(np.float64)
    for prompt in np.unique(prompts[mask]):
        members = (prompts == prompt) & mask
        kept = store.setdefault(prompt, deque(maxlen=size))
        kept.extend(rewards[members].astype(np.float64))
        basis = everyone if len(kept) < min_count else np.array(kept)
        out[members] = (rewards[members] - basis.mean()) / (basis.std() + 1e-6)
    return out


def test_the_tracker_fixture_of_ddpo():
    tracker = PerPromptTracker.init(3, 16)
    prompts = np.array([0, 0, 1, 1, 0, 2], np.int32)  # a a b b a c
    rewards = np.arange(1.0, 7.0, dtype=np.float32)
    advantages, _ = tracker.update(prompts, rewards, min_count=4)
    half = np.array([0.29276985, 0.87830955, 1.46384919])
    np.testing.assert_allclose(advantages, [*-half[::-1], *half], rtol=1e-6)
    equal, _ = tracker.update(prompts, np.full(6, 0.1, np.float32), min_count=4)
    np.testing.assert_array_equal(equal, 0.0)


@pytest.mark.parametrize(("size", "min_count"), [(4, 4), (8, 3), (5, 1)])
def test_tracker_equals_a_deque_over_many_epochs(size, min_count):
    rng = np.random.default_rng(size)
    tracker, store = PerPromptTracker.init(6, size), {}
    update = jax.jit(PerPromptTracker.update, static_argnames=("min_count",))
    skew = np.array([0.5, 0.2, 0.15, 0.1, 0.05, 0.0])  # more of one than a ring holds
    for _ in range(25):
        prompts = rng.choice(6, 24, p=skew).astype(np.int32)
        rewards = rng.normal(prompts, 1.0).astype(np.float32)
        mask = rng.random(24) < 0.8
        expected = deque_update(store, size, prompts, rewards, mask, min_count)
        given = np.where(mask, rewards, np.nan).astype(np.float32)
        advantages, tracker = update(tracker, prompts, given, mask, min_count=min_count)
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)
        held = [len(store.get(prompt, ())) for prompt in range(6)]
        np.testing.assert_array_equal(tracker.count, held)
    for prompt, kept in store.items():
        ring = np.roll(tracker.buffer[prompt], -int(tracker.position[prompt]))
        np.testing.assert_array_equal(ring[size - len(kept) :], np.float32(kept))


def test_own_statistics_start_exactly_at_min_count():
    tracker = PerPromptTracker.init(2, 4)
    prompts = np.array([0, 0, 0, 1, 1], np.int32)
    rewards = np.array([1.0, 2.0, 3.0, 10.0, 20.0], np.float32)
    advantages, _ = tracker.update(prompts, rewards, min_count=3)
    np.testing.assert_allclose(advantages[:3], [-np.sqrt(1.5), 0, np.sqrt(1.5)], 1e-5)
    everyone = (rewards[3:] - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(advantages[3:], everyone, rtol=1e-5)


def test_of_too_many_rewards_in_one_epoch_the_last_stay():
    tracker = PerPromptTracker.init(1, 3)
    prompts = np.zeros(5, np.int32)
    rewards = np.array([100.0, 100.0, 1.0, 2.0, 3.0], np.float32)
    advantages, tracker = tracker.update(prompts, rewards, min_count=3)
    np.testing.assert_array_equal(np.sort(tracker.buffer[0]), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(advantages, (rewards - 2) / np.sqrt(2 / 3), rtol=1e-5)


def test_a_reward_pushed_out_by_equal_ones_still_differs_from_them():
    tracker = PerPromptTracker.init(1, 2)
    rewards = np.array([0.5, 0.1, 0.1], np.float32)
    advantages, _ = tracker.update(np.zeros(3, np.int32), rewards, min_count=2)
    np.testing.assert_allclose(advantages, [0.4 / 1e-6, 0.0, 0.0], rtol=1e-5)


def test_a_restored_tracker_goes_on_to_the_bit():
    rng = np.random.default_rng(0)

    def epoch(tracker):
        prompts = rng.integers(0, 3, 8).astype(np.int32)
        return tracker.update(
            prompts, rng.normal(size=8).astype(np.float32), min_count=2
        )

    tracker = PerPromptTracker.init(3, 5)
    for _ in range(4):
        _, tracker = epoch(tracker)
    position = rng.bit_generator.state
    uninterrupted = [epoch(tracker) for _ in range(1)][0]
    leaves, structure = jax.tree.flatten(tracker)
    saved = [np.array(leaf).tobytes() for leaf in leaves]
    kinds = [(leaf.dtype, leaf.shape) for leaf in leaves]
    restored = jax.tree.unflatten(
        structure,
        [
            np.frombuffer(raw, dtype).reshape(shape)
            for raw, (dtype, shape) in zip(saved, kinds, strict=True)
        ],
    )
    rng.bit_generator.state = position
    resumed = epoch(jax.tree.map(jnp.asarray, restored))
    jax.tree.map(np.testing.assert_array_equal, uninterrupted, resumed)


def test_an_epoch_without_valid_rewards_changes_nothing():
    prompts = np.array([0, 1, 0], np.int32)
    _, before = PerPromptTracker.init(2, 4).update(
        prompts, np.ones(3, np.float32), min_count=1
    )
    advantages, after = before.update(
        prompts, np.full(3, np.nan, np.float32), np.zeros(3, bool), min_count=1
    )
    np.testing.assert_array_equal(advantages, 0.0)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_impossible_trackers_are_refused():
    with pytest.raises(UserError, match="0 prompts"):
        PerPromptTracker.init(0, 4)
    with pytest.raises(UserError, match="advantages.tracker_size"):
        PerPromptTracker.init(2, 0)
    with pytest.raises(UserError, match="advantages.tracker_min"):
        PerPromptTracker.init(1, 4).update(
            np.zeros(1, np.int32), np.zeros(1, np.float32), min_count=5
        )
