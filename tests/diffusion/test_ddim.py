"""The DDIM transition against DDPO's fixture and against DDPM's posterior."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.ddim import ddim_step
from ddrl_jax.diffusion.prediction import convert
from ddrl_jax.diffusion.schedules import sd_alpha_bars

ALPHA_BARS = sd_alpha_bars()
# DDPO's fixture: 2 latents of 4 x 8 x 8, numbered row by row; SD 1.x, 50 steps.
K = np.arange(512, dtype=np.float64)
X, EPS, NEXT = (
    jnp.asarray(values.reshape(2, 4, 8, 8), jnp.float32)
    for values in (
        np.sin(0.37 * K + 0.1),
        np.cos(0.53 * K - 0.2),
        0.98 * np.sin(0.37 * K + 0.1) + 0.01 * np.sin(1.7 * K),
    )
)


def levels(*timesteps):
    t = np.array(timesteps)
    return ALPHA_BARS[t], ALPHA_BARS[np.maximum(t - 20, 0)]


@pytest.mark.parametrize(
    ("timesteps", "eta", "expected"),
    [
        ((981, 981), 1.0, (-0.22410321, -0.21738842)),
        ((501, 1), 1.0, (0.2514138, 2.4288502)),
        ((501, 1), 0.5, (0.87896652, 2.0426628)),
    ],
)
def test_ddpo_fixture(timesteps, eta, expected):
    log_prob = ddim_step(X, EPS, *levels(*timesteps), eta).log_prob(NEXT)
    # The reference is float64; 1 - abar at timestep 1 is good to 3e-5 in float32.
    np.testing.assert_allclose(log_prob, expected, atol=4e-5)


def test_ddpo_fixture_for_a_network_that_predicts_x0():
    t, s = levels(501, 481)
    eps = convert(EPS, X, "x0", "eps", np.sqrt(t), np.sqrt(1 - t))
    log_prob = ddim_step(X, eps, t, s, 1.0).log_prob(NEXT)
    np.testing.assert_allclose(log_prob, (0.2767754, 0.3004268), atol=2e-5)


@pytest.mark.parametrize(
    ("timestep", "std"),
    [(981, 0.454463), (501, 0.294785), (41, 0.099887), (21, 0.039480), (1, 0.020648)],
)
def test_std_of_stable_diffusion(timestep, std):
    found = ddim_step(X, EPS, *levels(timestep, timestep), 1.0).std
    np.testing.assert_allclose(found, [std, std], rtol=3e-5)


def test_eta_1_is_the_posterior_of_ddpm():
    # q(x_s | x_t, x0) of Ho et al. (2020), equation 7, for the step abar_t -> abar_s.
    t, s = 0.3, 0.55
    x, eps = np.asarray(X, float), np.asarray(EPS, float)
    x0 = (x - np.sqrt(1 - t) * eps) / np.sqrt(t)
    alpha = t / s
    mean = np.sqrt(s) * (1 - alpha) / (1 - t) * x0
    mean += np.sqrt(alpha) * (1 - s) / (1 - t) * x
    std = np.sqrt((1 - s) / (1 - t) * (1 - alpha))
    step = ddim_step(X, EPS, t, s, 1.0)
    np.testing.assert_allclose(step.mean, mean, atol=2e-6)
    np.testing.assert_allclose(step.std, std, rtol=1e-6)


def test_eta_0_is_the_deterministic_sampler():
    t, s = levels(501, 41)
    step = ddim_step(X, EPS, t, s, 0.0)
    t, s = t[:, None, None, None], s[:, None, None, None]
    x, eps = np.asarray(X, float), np.asarray(EPS, float)
    expected = np.sqrt(s / t) * (x - np.sqrt(1 - t) * eps) + np.sqrt(1 - s) * eps
    np.testing.assert_allclose(step.mean, expected, atol=3e-6)
    np.testing.assert_array_equal(step.std, np.zeros(2))


def test_the_step_to_alpha_bar_1_gives_x0():
    step = ddim_step(X, EPS, 0.25, 1.0, 1.0)
    expected = (np.asarray(X, float) - np.sqrt(0.75) * np.asarray(EPS, float)) / 0.5
    np.testing.assert_allclose(step.mean, expected, atol=2e-6)
    assert float(step.std) == 0.0


def test_no_root_of_a_negative_number_near_the_data():
    # 1 - abar_s - std^2 is a difference of equal numbers here; unclamped and not NaN.
    near_one = 1.0 - np.geomspace(6e-8, 1e-3, 400, dtype=np.float32)
    t = np.concatenate([near_one * np.float32(f) for f in (0.5, 0.99, 0.99999)])
    s = np.concatenate([near_one] * 3)
    step = ddim_step(jnp.ones((1200, 1)), jnp.ones((1200, 1)), t, s, 1.0)
    assert np.isfinite(step.mean).all() and np.isfinite(step.std).all()


def test_levels_per_sample():
    t, s = levels(501, 41)
    both = ddim_step(X, EPS, t, s, 1.0)
    for i in range(2):
        one = ddim_step(X[i : i + 1], EPS[i : i + 1], t[i], s[i], 1.0)
        np.testing.assert_allclose(both.mean[i : i + 1], one.mean, rtol=1e-6)
        np.testing.assert_allclose(both.std[i], one.std, rtol=1e-6)
