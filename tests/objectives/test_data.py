"""The data term against its definitions in float64 NumPy, and the RWR weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.objectives.data import (
    denoising_loss,
    heaviest,
    rwr_weights,
    sparse_rwr_count,
    sparse_rwr_weights,
)

WEIGHTINGS = ("velocity", "edm", "eps")


def sample(seed, b=6, x=(3, 2)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(b, *x)), jnp.float32) for _ in range(3)]


def test_losses_equal_their_definitions_in_x0_and_eps():
    prediction, x0, eps = sample(0)
    time = np.linspace(0.05, 0.95, 6)
    v, clean, noise = (np.asarray(a, np.float64) for a in (prediction, x0, eps))
    t = time[:, None, None]
    state = (1 - t) * clean + t * noise
    x0_hat, eps_hat = state - t * v, state + (1 - t) * v
    sigma = t / (1 - t)
    expected = {
        "velocity": (v - (noise - clean)) ** 2,
        "edm": (sigma**2 + 1) / sigma**2 * (clean - x0_hat) ** 2,
        "eps": (noise - eps_hat) ** 2,
    }
    for weighting in WEIGHTINGS:
        loss = denoising_loss(
            prediction, x0, eps, jnp.asarray(time, jnp.float32), weighting
        )
        mean = expected[weighting].mean((1, 2))
        np.testing.assert_allclose(loss, mean, rtol=1e-4, err_msg=weighting)


def test_by_hand():
    prediction, x0, eps = jnp.array([[1.0]]), jnp.array([[0.5]]), jnp.array([[-1.0]])
    # v* = -1.5, so (v - v*)^2 = 6.25; t = 1/4 gives 10/16 for edm and 9/16 for eps.
    time = jnp.array([0.25])
    by_weighting = {"velocity": 6.25, "edm": 6.25 * 10 / 16, "eps": 6.25 * 9 / 16}
    for weighting, expected in by_weighting.items():
        loss = denoising_loss(prediction, x0, eps, time, weighting)
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_both_ends_of_time_are_finite_with_their_limits(weighting):
    prediction, x0, eps = sample(1, b=2)
    time = jnp.array([0.0, 1.0])
    velocity = denoising_loss(prediction, x0, eps, time, "velocity")
    weight = {"velocity": [1, 1], "edm": [1, 1], "eps": [1, 0]}[weighting]
    loss = denoising_loss(prediction, x0, eps, time, weighting)
    np.testing.assert_allclose(loss, np.array(weight) * np.asarray(velocity))
    slope = jax.grad(lambda p: denoising_loss(p, x0, eps, time, weighting).sum())(
        prediction
    )
    assert np.isfinite(slope).all()


def test_the_edm_weight_of_a_velocity_error_lies_between_one_half_and_one():
    time = jnp.linspace(0.0, 1.0, 101)
    zero, one = jnp.zeros((101, 1)), jnp.ones((101, 1))
    weight = denoising_loss(one, zero, zero, time, "edm")
    assert np.argmin(weight) == 50
    np.testing.assert_allclose([weight.min(), weight.max()], [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_true_velocity_has_no_loss(weighting):
    _, x0, eps = sample(2)
    time = jnp.linspace(0.0, 1.0, 6)
    np.testing.assert_array_equal(
        denoising_loss(eps - x0, x0, eps, time, weighting), 0.0
    )


def test_half_precision_networks_give_float32_losses():
    prediction, x0, eps = sample(3)
    half = prediction.astype(jnp.bfloat16)
    loss = denoising_loss(half, x0, eps, jnp.full((6,), 0.5), "velocity")
    exact = denoising_loss(
        half.astype(jnp.float32), x0, eps, jnp.full((6,), 0.5), "velocity"
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, exact)


def test_an_unknown_weighting_is_refused_with_the_known_ones():
    prediction, x0, eps = sample(4)
    with pytest.raises(UserError, match="velocity, edm, eps"):
        denoising_loss(prediction, x0, eps, jnp.zeros(6), "x0")


def test_rwr_weights_are_a_softmax_of_mean_one():
    rewards = np.array([1.0, 2.0, 4.0, 4.0], np.float32)
    powers = np.exp(0.2 * rewards.astype(np.float64))
    np.testing.assert_allclose(
        rwr_weights(rewards, 0.2), 4 * powers / powers.sum(), rtol=1e-6
    )


def test_rwr_weights_ignore_an_offset_and_survive_large_rewards():
    rewards = np.array([-3.0, 0.0, 1.0], np.float32)
    np.testing.assert_allclose(
        rwr_weights(rewards + 1e4, 5), rwr_weights(rewards, 5), rtol=1e-4
    )
    np.testing.assert_array_equal(rwr_weights(rewards, 0.0), np.ones(3))


def test_weights_of_a_table_of_groups_are_those_of_each_group():
    rewards = np.random.default_rng(5).normal(size=(4, 10)).astype(np.float32)
    for weigh in (lambda r: rwr_weights(r, 2.0), lambda r: sparse_rwr_weights(r, 0.7)):
        np.testing.assert_array_equal(
            weigh(rewards), np.stack(list(map(weigh, rewards)))
        )
        np.testing.assert_allclose(weigh(rewards).mean(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 11, 101])
@pytest.mark.parametrize("percent", [0, 10, 55, 70, 90, 95, 100])
def test_sparse_rwr_keeps_what_reaches_the_interpolated_percentile(size, percent):
    # Integers: the interpolation of NumPy in float64 is exact enough to compare.
    rewards = np.random.default_rng(size).integers(0, 40, size)
    kept = rewards >= np.percentile(rewards.astype(np.float64), percent) - 1e-9
    weights = sparse_rwr_weights(rewards.astype(np.float32), percent)
    np.testing.assert_allclose(weights, kept * size / kept.sum(), rtol=1e-6)


def test_percentile_may_be_a_fraction_or_a_percentage():
    rewards = np.arange(20, dtype=np.float32)
    np.testing.assert_array_equal(
        sparse_rwr_weights(rewards, 0.9), sparse_rwr_weights(rewards, 90)
    )
    assert np.count_nonzero(sparse_rwr_weights(rewards, 0.9)) == 2


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 100])
def test_the_percentile_is_that_of_the_samples_with_a_reward(percent):
    """Sets of 0 to 32 rewards of 32, in one jitted table as training has it."""
    random = np.random.default_rng(percent)
    rewards = random.permutation(33 * 32).reshape(33, 32).astype(np.float32)
    valid = random.permuted(np.arange(32) < np.arange(33)[:, None], axis=1)
    weigh = jax.jit(lambda r, v: sparse_rwr_weights(r, percent, v))
    found = weigh(np.where(valid, rewards, np.nan), valid)
    np.testing.assert_array_equal(found[0], 0.0)
    for row, own, there in zip(found[1:], rewards[1:], valid[1:], strict=True):
        threshold = np.percentile(own[there].astype(np.float64), percent) - 1e-9
        kept = there & (own >= threshold)
        np.testing.assert_allclose(row, kept * 32 / kept.sum(), rtol=1e-6)
    whole = sparse_rwr_weights(rewards[32], percent)
    np.testing.assert_array_equal(found[32], whole)


def test_the_softmax_is_over_the_samples_with_a_reward():
    rewards, valid = np.array([3.0, np.nan, 1.0, np.inf]), np.array([1, 0, 1, 0], bool)
    none = np.zeros(4, bool)
    found = rwr_weights(np.stack([rewards, rewards]), 2.0, np.stack([valid, none]))
    powers = np.exp([6.0, 2.0])
    np.testing.assert_allclose(found[0, [0, 2]], 4 * powers / powers.sum(), rtol=1e-6)
    np.testing.assert_array_equal(found[0, [1, 3]], 0.0)
    np.testing.assert_array_equal(found[1], 0.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e-30, 12345.678])
@pytest.mark.parametrize("size", [2, 11])
def test_a_set_of_ties_is_kept_whole(value, size):
    weights = sparse_rwr_weights(np.full(size, value, np.float32), 0.9)
    np.testing.assert_array_equal(weights, 1.0)


@pytest.mark.parametrize("percentile", [-0.1, 1.0, 100.5, float("nan")])
def test_an_impossible_or_ambiguous_percentile_is_refused(percentile):
    with pytest.raises(UserError, match="percentile"):
        sparse_rwr_weights(np.zeros(3, np.float32), percentile)


@pytest.mark.parametrize("beta", [-1.0, float("inf"), float("nan")])
def test_an_impossible_inverse_temperature_is_refused(beta):
    with pytest.raises(UserError, match="inverse temperature"):
        rwr_weights(np.zeros(3, np.float32), beta)


@pytest.mark.parametrize(
    "weigh", [lambda r: rwr_weights(r, 0.2), lambda r: sparse_rwr_weights(r, 0.9)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_rewards_are_refused_or_poison_their_set(weigh, bad):
    rewards = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(UserError, match="1 of 3"):
        weigh(rewards)
    if np.isnan(bad):
        assert np.isnan(jax.jit(weigh)(rewards)).all()


def test_the_heaviest_rows_keep_the_mean_of_the_whole():
    weights = jnp.asarray([[0.0, 2.0, 0.0, 2.0], [4.0, 0.0, 0.0, 0.0]], jnp.float32)
    losses = np.arange(1.0, 9.0)
    for count, rows in ((3, [1, 4, 3]), (5, [1, 4, 3, 5, 0])):
        found, kept = heaviest(weights, count)
        np.testing.assert_array_equal(found, rows)
        mean = np.mean(np.asarray(kept) * losses[found])
        assert mean == pytest.approx((2 * 2 + 2 * 4 + 4 * 5) / 8)


def test_the_next_rows_fill_up_the_room_and_weigh_nothing():
    weights = jnp.asarray([[0.0, 2.0, 0.5, 1.5], [4.0, 0.0, 0.0, 0.0]], jnp.float32)
    _, kept = heaviest(weights, 3)
    rows, found = heaviest(weights, 3, 5)
    np.testing.assert_array_equal(rows, [1, 4, 3, 5, 2])
    np.testing.assert_allclose(found[:3], kept * 5 / 3, rtol=1e-6)
    np.testing.assert_array_equal(found[3:], 0.0)


def test_of_ties_that_do_not_fit_the_first_take_the_weight_of_all():
    weights = jnp.asarray([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 4.0, 0.0]], jnp.float32)
    rows, kept = heaviest(weights, 2)
    np.testing.assert_array_equal(rows, [0, 6])
    np.testing.assert_allclose(kept, [1.0, 1.0])  # times 2 / 8
    rows, kept = heaviest(jnp.zeros((1, 3)), 2)
    np.testing.assert_array_equal(kept, 0.0)


@pytest.mark.parametrize("size", [1, 2, 11, 101])
@pytest.mark.parametrize("percentile", [0.0, 0.1, 0.55, 0.9, 90, 95])
def test_the_number_that_is_kept_is_known_before(size, percentile):
    rewards = np.random.default_rng(size).permutation(size).astype(np.float32)
    kept = np.count_nonzero(sparse_rwr_weights(rewards, percentile))
    assert sparse_rwr_count(size, percentile) == kept
