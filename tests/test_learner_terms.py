"""Each term of the loss and its gradient against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_runs import (
    REFERENCE,
    SHAPE,
    TRAINED,
    batch,
    data_loss_by_hand,
    finite_differences,
    gradient,
    kl_by_hand,
    objective,
    params,
    policy_loss_by_hand,
    updated,
)

from ddrl_jax.interfaces import Cond, DataSource
from ddrl_jax.learner import data_loss
from ddrl_jax.rollout import initial_noise

ON_ROLLOUT = {"policy.weight": 0.0, "data_term.levels": "rollout"}


@pytest.fixture(scope="module")
def samples():
    return batch()


def close(found, expected, tolerance=2e-5):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, err_msg=name)
        assert np.abs(value).max() > 20 * tolerance  # something to be right about


# ---- policy term


@pytest.mark.parametrize("term", ["reinforce", "clipped"])
def test_policy_gradient_is_the_slope_of_the_log_probs(term, samples):
    state, metrics = updated(objective({"policy.term": term}), (samples,))
    expected = finite_differences(lambda p: policy_loss_by_hand(p, samples))
    close(gradient(state), expected)
    norm = np.sqrt(sum((g**2).sum() for g in expected.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert float(metrics["policy/ratio_max_deviation"]) < 1e-5


def test_policy_weight_scales_the_gradient(samples):
    one, _ = updated(objective(), (samples,))
    two, _ = updated(objective({"policy.weight": 2.5}), (samples,))
    close(gradient(two), jax.tree.map(lambda g: 2.5 * g, gradient(one)))


def test_a_moved_ratio_is_clipped(samples):
    far = samples._replace(old_log_prob=samples.old_log_prob - 1.0)  # ratio e
    state, metrics = updated(objective(), (far,))
    good = np.asarray(samples.advantages) > 0
    assert float(metrics["policy/clip_fraction"]) == 1.0
    assert float(metrics["policy/ratio_max_deviation"]) == pytest.approx(np.e - 1, 1e-3)
    # Samples that would be pushed further up give nothing, the others e times A.
    kept = np.where(good, 0.0, np.e * np.asarray(samples.advantages))
    rest = samples._replace(advantages=jnp.asarray(kept, jnp.float32))
    expected = finite_differences(lambda p: policy_loss_by_hand(p, rest))
    close(gradient(state), expected, 1e-4)


def test_exact_old_log_probs_are_the_current_ones(samples):
    far = samples._replace(old_log_prob=samples.old_log_prob - 1.0)
    state, metrics = updated(objective({"policy.old_log_prob": "exact"}), (far,))
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    assert "policy/rollout_gap" not in updated(objective(), (far,))[1]
    far = far._replace(old_log_prob=far.old_log_prob.at[0, 0].add(-2.0))
    state, metrics = updated(objective({"policy.old_log_prob": "exact"}), (far,))
    # the largest distance to the rollout's, and the ratio does not tell of it
    assert float(metrics["policy/rollout_gap"]) == pytest.approx(3.0, abs=1e-4)
    close(
        gradient(state), finite_differences(lambda p: policy_loss_by_hand(p, samples))
    )


# ---- KL to the reference


def test_kl_of_the_starting_policy_is_exactly_0(samples):
    edits = {"policy.kl_weight": 1.0}
    copy = (jax.tree.map(jnp.copy, params()), {})
    with_kl, metrics = updated(objective(edits), (samples,), reference=copy)
    without, _ = updated(objective(), (samples,))
    assert float(metrics["policy/kl"]) == 0.0
    close(gradient(with_kl), gradient(without))


def test_kl_and_its_gradient_by_hand(samples):
    reference = (jax.tree.map(jnp.asarray, REFERENCE), {})
    edits = {"policy.kl_weight": 0.5}
    state, metrics = updated(objective(edits), (samples,), reference=reference)
    value = kl_by_hand(params(), samples)
    np.testing.assert_allclose(metrics["policy/kl"], value, rtol=1e-4)
    expected = finite_differences(
        lambda p: policy_loss_by_hand(p, samples) + 0.5 * kl_by_hand(p, samples)
    )
    close(gradient(state), expected)


def test_kl_is_a_sum_where_log_probs_are(samples):
    reference = (jax.tree.map(jnp.asarray, REFERENCE), {})
    edits = {"policy.kl_weight": 0.5, "policy.reduction": "sum"}
    _, metrics = updated(objective(edits), (samples,), reference=reference)
    elements = np.prod(samples.trajectory.x_t.shape[2:])
    value = elements * kl_by_hand(params(), samples)
    np.testing.assert_allclose(metrics["policy/kl"], value, rtol=1e-4)


# ---- data term at the rollout's levels


@pytest.mark.parametrize(
    ("every_step", "indices"), [(True, TRAINED), (False, TRAINED[:1])]
)
def test_data_term_on_the_rollouts_noise_and_levels(every_step, indices, samples):
    edits = ON_ROLLOUT | {"data_term.every_step": every_step, "data_term.weight": 0.5}
    state, metrics = updated(objective(edits), (samples,))
    value = data_loss_by_hand(params(), samples, indices)
    np.testing.assert_allclose(metrics["data/loss"], value, rtol=1e-4)
    expected = finite_differences(
        lambda p: 0.5 * data_loss_by_hand(p, samples, indices)
    )
    close(gradient(state), expected)


def test_more_trained_steps_do_not_weigh_more(samples):
    # All steps at one level: then their mean is each of them.
    t = samples.trajectory
    same = samples._replace(trajectory=t._replace(time=jnp.full_like(t.time, 0.6)))
    edits = ON_ROLLOUT | {"data_term.weight": 0.5}
    once, _ = updated(objective(edits), (same,))
    often, _ = updated(objective(edits | {"data_term.every_step": True}), (same,))
    close(gradient(often), gradient(once), 1e-6)


# ---- data term with a draw of its own: what the network is asked


def asked(edits, count=4096, latents=None):
    """(loss, z, time, emb, x0) of one eager data loss on `count` samples of 1s."""
    seen = []

    def network(tree, frozen, z, time, cond):
        seen.append((np.asarray(z), np.asarray(time), np.asarray(cond.emb)))
        return z * 0.0 + tree["w"]

    pictures = latents or (lambda records, keys: jnp.ones((records.shape[0], *SHAPE)))
    loss = objective(
        {"data_term.weight": 1.0} | edits, DataSource(("x",), pictures), network
    )
    keys = jax.random.split(jax.random.key(1), count)
    data_keys = jax.random.split(jax.random.key(2), count)
    cond = Cond(jnp.full((count, 1), 3.0))
    records, time = jnp.zeros(count, jnp.int32), jnp.full(count, 0.25)
    value, _ = data_loss(
        loss, params(), {}, (keys, data_keys, records, cond, time, None)
    )
    return float(value), *seen[0], keys


def test_own_draw_is_unit_noise_at_uniform_times():
    _, z, time, _, keys = asked({"data_term.time": "uniform"})
    assert time.min() >= 0.0 and time.max() < 1.0
    assert time.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * 4096))
    assert time.var() == pytest.approx(1 / 12, rel=0.05)
    late = time > 0.1  # eps = (z - (1 - t)) / t loses digits near 0
    eps = ((z - (1 - time)[:, None, None]) / time[:, None, None])[late]
    assert eps.mean() == pytest.approx(0.0, abs=4 / np.sqrt(eps.size))
    assert eps.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * eps.size))
    assert abs(np.corrcoef(time[late], eps[:, 0, 0])[0, 1]) < 0.07
    rollouts = np.asarray(initial_noise(keys, SHAPE))[late]
    assert abs(np.corrcoef(rollouts.ravel(), eps.ravel())[0, 1]) < 0.05


def test_own_draw_at_logit_normal_times():
    time = asked({"data_term.time": "logit_normal"})[2].astype(np.float64)
    logit = np.log(time / (1 - time))
    assert logit.mean() == pytest.approx(0.0, abs=4 / 64)
    assert logit.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * 4096))


def test_rollout_levels_use_its_noise_and_time():
    _, z, time, _, keys = asked({"data_term.levels": "rollout"}, count=16)
    np.testing.assert_array_equal(time, 0.25)
    noise = np.asarray(initial_noise(keys, SHAPE))
    np.testing.assert_allclose(z, 0.75 * 1.0 + 0.25 * noise, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_text_is_dropped_at_its_rate(rate):
    _, z, _, emb, _ = asked({"data_term.text_dropout": rate})
    assert set(np.unique(emb)) <= {0.0, 3.0}  # the empty prompt, or the caption
    dropped = (emb[:, 0] == 0.0).mean()
    assert dropped == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 4096))
    if 0 < rate < 1:  # which ones has nothing to do with the noise
        assert abs(np.corrcoef(emb[:, 0], z[:, 0, 0])[0, 1]) < 0.07


def test_records_and_keys_reach_the_source():
    def latents(records, keys):
        assert records.shape == keys.shape
        scale = jax.vmap(lambda k: jax.random.uniform(k))(keys)
        return jnp.ones((records.shape[0], *SHAPE)) * scale[:, None, None]

    _, z, time, _, keys = asked(
        {"data_term.levels": "rollout"}, count=16, latents=latents
    )
    x0 = (z - 0.25 * np.asarray(initial_noise(keys, SHAPE))) / 0.75
    assert np.ptp(x0, axis=(1, 2)).max() < 1e-5  # one value a picture ...
    assert np.unique(x0[:, 0, 0].round(4)).size == 16  # ... and another for each key


def test_every_step_draws_anew_where_the_levels_are_its_own(samples):
    edits = {"policy.weight": 0.0, "data_term.weight": 1.0}
    _, once = updated(objective(edits), (samples,))
    _, often = updated(objective(edits | {"data_term.every_step": True}), (samples,))
    # A mean over the same draws three times would be the same loss.
    assert abs(float(once["data/loss"]) - float(often["data/loss"])) > 1e-3
