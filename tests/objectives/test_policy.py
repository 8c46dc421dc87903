"""Policy terms against hand-worked numbers, NumPy, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.objectives.policy import (
    MAX_EXPONENT,
    clipped_surrogate,
    ratio_metrics,
    reinforce,
    reward_transform,
    step_kl,
)

# The worked example of PPO at DDPO's settings: advantages clipped at 5, clip 1e-4.
DDPO_ADVANTAGES = jnp.clip(jnp.array([2.0, -1.5, 0.5, -7.0]), -5.0, 5.0)
DDPO_LOG_RATIO = jnp.array([2e-4, 2e-4, -5e-5, -3e-4])


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_ppo_loss_and_gradient_of_the_ddpo_fixture():
    old = jnp.array([-0.3, 0.1, 0.0, 0.2])

    def surrogate(log_ratio, old):
        return clipped_surrogate(old + log_ratio, old, DDPO_ADVANTAGES, 1e-4)

    (loss, metrics), gradient = jax.value_and_grad(surrogate, has_aux=True)(
        DDPO_LOG_RATIO, jnp.zeros(4)
    )
    np.testing.assert_allclose(loss, 0.999906257344, rtol=1e-6)
    np.testing.assert_allclose(
        gradient, [0.0, 0.375075007501, -0.124993750156, 0.0], rtol=1e-6
    )
    np.testing.assert_allclose(metrics["approx_kl"], 2.156e-8, rtol=1e-3)
    assert metrics["clip_fraction"] == 0.75
    np.testing.assert_allclose(
        metrics["ratio_max_deviation"], 1 - np.exp(-3e-4), rtol=1e-3
    )
    # Only the difference of log-probs matters, up to their float32 rounding.
    np.testing.assert_allclose(surrogate(DDPO_LOG_RATIO, old)[0], loss, atol=1e-6)


@pytest.mark.parametrize("clip_range", [0.0, 1e-4, 0.2, float("inf")])
def test_surrogate_equals_an_elementwise_numpy_version(clip_range):
    log_prob, old, advantages = draws(0, 200), draws(1, 200), draws(2, 200)
    expected = 0.0
    triples = np.stack([log_prob, old, advantages], axis=1).astype(np.float64)
    for new, before, advantage in triples:
        ratio = np.exp(new - before)
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        expected -= min(advantage * ratio, advantage * bounded) / 200
    loss, _ = clipped_surrogate(log_prob, old, advantages, clip_range)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"),
    [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False)],
)
def test_the_clip_stops_only_updates_that_go_further_out(advantage, log_ratio, moves):
    slope = jax.grad(
        lambda x: clipped_surrogate(x, jnp.zeros(1), jnp.array([advantage]), 0.1)[0]
    )(jnp.array([log_ratio]))
    expected = -advantage * np.exp(log_ratio) if moves else 0.0
    np.testing.assert_allclose(slope, [expected], rtol=1e-6)


# 1e-9 is below the resolution of float32: the bounds are then 1 themselves.
@pytest.mark.parametrize("clip_range", [0.0, 1e-9, 1e-4, float("inf")])
def test_on_policy_gradient_is_reinforce(clip_range):
    states, actions, advantages = draws(3, 64, 5), draws(4, 64), draws(5, 64)

    def log_prob(weights):
        return -0.5 * jnp.square(actions - jnp.tanh(states @ weights))

    weights = draws(6, 5)
    old = log_prob(weights)
    score = jax.grad(lambda w: reinforce(log_prob(w), advantages)[0])(weights)
    surrogate = jax.grad(
        lambda w: clipped_surrogate(log_prob(w), old, advantages, clip_range)[0]
    )(weights)
    np.testing.assert_allclose(surrogate, score, rtol=1e-6, atol=1e-8)
    assert np.abs(score).max() > 1e-3


def test_unclipped_gradient_off_policy_is_importance_weighted():
    log_prob, old, advantages = draws(7, 9), draws(8, 9), draws(9, 9)
    gradient = jax.grad(
        lambda x: clipped_surrogate(x, old, advantages, float("inf"))[0]
    )(log_prob)
    expected = -advantages * np.exp(np.asarray(log_prob) - np.asarray(old)) / 9
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_equal_log_probs_deviate_by_exactly_zero():
    log_prob = 1e3 * draws(10, 4, 16)
    metrics = ratio_metrics(log_prob, log_prob, 1e-4)
    assert {name: float(value) for name, value in metrics.items()} == {
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "ratio_max_deviation": 0.0,
    }


def test_exact_mode_has_ratio_one_and_the_reinforce_gradient():
    log_prob, advantages = draws(11, 8), draws(12, 8)

    def exact(x):
        return clipped_surrogate(x, jax.lax.stop_gradient(x), advantages, 1e-4)

    gradient, metrics = jax.grad(exact, has_aux=True)(log_prob)
    assert metrics["ratio_max_deviation"] == 0.0
    np.testing.assert_allclose(gradient, -advantages / 8, rtol=1e-6)


def test_reinforce_by_hand():
    log_prob, advantages = jnp.array([-1.0, -2.0]), jnp.array([3.0, -0.5])
    loss, metrics = reinforce(log_prob, advantages)
    np.testing.assert_allclose(loss, -(3.0 * -1.0 + -0.5 * -2.0) / 2)
    assert metrics["log_prob"] == -1.5
    gradient = jax.grad(lambda x: reinforce(x, advantages)[0])(log_prob)
    np.testing.assert_allclose(gradient, [-1.5, 0.25])


@pytest.mark.parametrize("term", ["reinforce", "clipped"])
def test_no_gradient_flows_into_advantages_or_old_log_probs(term):
    def loss(advantages, old):
        if term == "reinforce":
            return reinforce(draws(13, 4) + old * 0.0, advantages)[0]
        return clipped_surrogate(draws(13, 4), old, advantages, 0.2)[0]

    gradients = jax.grad(loss, argnums=(0, 1))(draws(14, 4), draws(15, 4))
    np.testing.assert_array_equal(np.stack(gradients), 0.0)


@pytest.mark.parametrize("term", ["reinforce", "clipped"])
def test_masked_samples_add_exactly_nothing_whatever_they_hold(term):
    mask = jnp.array([True, False, True, False])
    log_prob = jnp.array([0.3, jnp.nan, -0.2, jnp.inf])
    advantages = jnp.array([1.0, jnp.nan, 2.0, 5.0])

    def loss(x):
        if term == "reinforce":
            return reinforce(x, advantages, mask)
        return clipped_surrogate(x, jnp.zeros(4), advantages, 0.01, mask)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(log_prob)
    kept = {"reinforce": -(0.3 - 0.4), "clipped": -(1.01 + 2 * np.exp(-0.2))}[term]
    np.testing.assert_allclose(value, kept / 4, rtol=1e-5)
    slopes = {"reinforce": (-1.0, -2.0), "clipped": (0.0, -2 * np.exp(-0.2))}[term]
    np.testing.assert_allclose(
        gradient, np.array([slopes[0], 0, slopes[1], 0]) / 4, rtol=1e-5
    )
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_metrics_count_valid_samples_only_and_survive_an_empty_mask():
    log_prob = jnp.array([0.0, 0.5, 0.0, 3.0])
    mask = jnp.array([True, True, False, False])
    metrics = ratio_metrics(log_prob, jnp.zeros(4), 0.1, mask)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 * 0.25 / 2)
    assert metrics["clip_fraction"] == 0.5
    np.testing.assert_allclose(
        metrics["ratio_max_deviation"], np.exp(0.5) - 1, rtol=1e-6
    )
    nobody = ratio_metrics(log_prob, jnp.zeros(4), 0.1, jnp.zeros(4, bool))
    assert [float(value) for value in nobody.values()] == [0.0, 0.0, 0.0]


def test_micro_batches_add_up_to_the_whole_batch():
    log_prob, old, advantages = 0.1 * draws(16, 12), 0.1 * draws(17, 12), draws(18, 12)
    mask = jnp.asarray(np.random.default_rng(19).random(12) < 0.5)
    whole = clipped_surrogate(log_prob, old, advantages, 0.1, mask)[0]
    parts = [
        clipped_surrogate(log_prob[i], old[i], advantages[i], 0.1, mask[i])[0]
        for i in np.arange(12).reshape(4, 3)
    ]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)


def test_an_overflowing_ratio_without_advantage_is_harmless_and_with_one_is_seen():
    log_prob = jnp.array([200.0, 0.0])

    def surrogate(x, advantages):
        return clipped_surrogate(x, jnp.zeros(2), jnp.array(advantages), 0.1)[0]

    gradient = jax.grad(surrogate)(log_prob, [0.0, 1.0])
    np.testing.assert_allclose(gradient, [0.0, -0.5])
    assert not np.isfinite(surrogate(log_prob, [-1.0, 1.0]))


def test_a_nan_advantage_of_a_valid_sample_is_not_hidden():
    advantages = jnp.array([1.0, jnp.nan])
    assert np.isnan(reinforce(jnp.zeros(2), advantages)[0])
    assert np.isnan(clipped_surrogate(jnp.zeros(2), jnp.zeros(2), advantages, 0.1)[0])


@pytest.mark.parametrize("clip_range", [-1e-4, float("nan")])
def test_an_impossible_clip_range_is_refused(clip_range):
    with pytest.raises(UserError, match="policy.clip_range"):
        clipped_surrogate(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), clip_range)


def test_losses_are_float32_for_half_precision_input():
    half = draws(20, 6).astype(jnp.bfloat16)
    for loss, metrics in (
        reinforce(half, half),
        clipped_surrogate(half, half, half, 1e-4),
    ):
        kinds = {value.dtype for value in (loss, *metrics.values())}
        assert kinds == {jnp.dtype("float32")}


def test_reward_transforms_by_hand():
    advantages = jnp.array([-1.0, 0.0, 2.0, 1.0])
    np.testing.assert_array_equal(reward_transform(advantages, "linear"), advantages)
    exponential = [-np.e, -1.0, -np.exp(-2.0), -np.exp(-1.0)]
    np.testing.assert_allclose(
        reward_transform(advantages, "neg_exp"), exponential, rtol=1e-6
    )
    ids = jnp.array([0, 0, 1, 1])
    means = np.repeat([(exponential[0] - 1) / 2, sum(exponential[2:]) / 2], 2)
    np.testing.assert_allclose(
        reward_transform(advantages, "neg_exp_centered", ids, None, 2),
        np.array(exponential) - means,
        rtol=1e-5,
    )


@pytest.mark.parametrize("names", [range(5), (40, 7, 31, 30, 99)])
def test_centred_transform_sums_to_zero_over_valid_members_of_shuffled_groups(names):
    rng = np.random.default_rng(21)
    ids = rng.permutation(np.repeat(names, 6)).reshape(3, 10)
    mask, advantages = rng.random((3, 10)) < 0.7, rng.normal(size=(3, 10))
    centred = reward_transform(
        jnp.asarray(advantages, jnp.float32),
        "neg_exp_centered",
        jnp.asarray(ids),
        jnp.asarray(mask),
    )
    for group in names:
        members = (ids == group) & mask
        values = -np.exp(-advantages[members])
        expected = values - values.mean() if values.size else values
        np.testing.assert_allclose(np.asarray(centred)[members], expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(centred)[~mask], 0.0)


@pytest.mark.parametrize("kind", ["linear", "neg_exp", "neg_exp_centered"])
def test_transforms_are_monotone_and_give_masked_samples_zero(kind):
    advantages = jnp.linspace(-5.0, 5.0, 11)
    assert np.all(np.diff(reward_transform(advantages, kind)) > 0)
    mask = jnp.arange(11) != 4
    poisoned = advantages.at[4].set(jnp.nan)
    transformed = reward_transform(poisoned, kind, mask=mask)
    assert transformed[4] == 0.0
    assert np.isfinite(transformed).all()


def test_to_first_order_the_centred_exponential_is_the_linear_advantage():
    # lambda(x) = -1 + x - x^2 / 2: halving x quarters the difference.
    small = jnp.array([-0.02, 0.005, 0.015])

    def error(x):
        return np.abs(reward_transform(x, "neg_exp_centered") - x).max()

    assert error(small) < 2e-4
    np.testing.assert_allclose(error(small) / error(small / 2), 4.0, rtol=0.02)


def test_the_exponential_stays_summable_at_its_bound():
    far = jnp.array([-1e6, -MAX_EXPONENT, 0.0])
    transformed = reward_transform(far, "neg_exp")
    assert transformed[0] == transformed[1] == -np.exp(np.float32(MAX_EXPONENT))
    assert np.isfinite(reward_transform(far, "neg_exp_centered")).all()


def test_an_unknown_transform_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="neg_exp_centered"):
        reward_transform(jnp.zeros(2), "exp")


def test_step_kl_equals_the_integral_of_its_definition():
    mean, reference, std = 0.4, -0.3, 0.8
    x = np.linspace(-12.0, 12.0, 200_001)
    log_p = -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    log_q = -0.5 * ((x - reference) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    integral = np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0])
    kl = step_kl(jnp.array([[mean]]), jnp.array([[reference]]), jnp.array([std]))
    np.testing.assert_allclose(kl, [integral], rtol=1e-5)


def test_step_kl_is_a_mean_over_latent_axes_with_one_std_a_sample():
    mean, reference = draws(22, 3, 4, 5), draws(23, 3, 4, 5)
    std = jnp.array([0.5, 1.0, 2.0])
    square = (np.asarray(mean) - np.asarray(reference)) ** 2
    expected = square.mean((1, 2)) / (2 * np.asarray(std) ** 2)
    np.testing.assert_allclose(step_kl(mean, reference, std), expected, rtol=1e-5)
    np.testing.assert_array_equal(step_kl(mean, mean, std), 0.0)
    total = step_kl(mean, reference, std, "sum")
    np.testing.assert_allclose(total, expected * 4 * 5, rtol=1e-5)


@pytest.mark.parametrize("log_prob", [0.3, -0.37, 0.9, -1.2])
@pytest.mark.parametrize("way", [-np.inf, np.inf])
def test_one_unit_in_the_last_place_is_a_deviation(log_prob, way):
    """Although exp of it rounds to a ratio of 1."""
    old = np.full(1, log_prob, np.float32)
    new = np.nextafter(old, np.float32(way))
    found = ratio_metrics(jnp.asarray(new), jnp.asarray(old), 1e-4)
    assert 0 < float(found["ratio_max_deviation"]) < 2e-7
