"""The diffusion loss of networks on Stable Diffusion's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.schedules import sd_alpha_bar, sd_alpha_bars, sd_timestep
from ddrl_jax.errors import UserError
from ddrl_jax.objectives.data import denoising_loss, noised, prediction_loss

RNG = np.random.default_rng(5)
X0, EPS, ERROR = (RNG.normal(size=(4, 3, 2)) for _ in range(3))
TIME = np.asarray([0.0, 250.0, 700.0, 999.0])
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
ALPHA = np.sqrt(ALPHA_BAR)[TIME.astype(int)][:, None, None]
SIGMA = np.sqrt(1 - ALPHA_BAR)[TIME.astype(int)][:, None, None]
TARGETS = {"eps": EPS, "x0": X0, "v": ALPHA * EPS - SIGMA * X0}


def f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def test_every_timestep_has_its_level_and_back():
    timesteps = np.arange(1000, dtype=np.float32)
    np.testing.assert_allclose(sd_alpha_bar(timesteps), sd_alpha_bars(), rtol=1e-6)
    found = jax.jit(sd_timestep)(jnp.asarray(sd_alpha_bars(), jnp.float32))
    np.testing.assert_array_equal(found, timesteps)
    between = sd_timestep(jnp.float32(0.5 * (ALPHA_BAR[400] + ALPHA_BAR[401])))
    np.testing.assert_allclose(between, 400.5, atol=2e-3)


@pytest.mark.parametrize("source", ["eps", "x0", "v"])
def test_the_state_is_that_of_ddpm(source):
    found = noised(*f32(X0, EPS, TIME), source)
    np.testing.assert_allclose(found, ALPHA * X0 + SIGMA * EPS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["eps", "x0", "v"])
@pytest.mark.parametrize("weighting", ["eps", "velocity", "edm"])
def test_the_same_guess_has_the_same_loss_however_it_is_told(source, weighting):
    """A guess of x0 told as eps, x0 or v; the flow loss told the velocity is the
    oracle."""
    guess = X0 + 0.1 * ERROR
    state = ALPHA * X0 + SIGMA * EPS
    eps = (state - ALPHA * guess) / SIGMA
    told = {"eps": eps, "x0": guess, "v": ALPHA * eps - SIGMA * guess}[source]
    tau = (SIGMA / (ALPHA + SIGMA))[:, 0, 0]
    want = denoising_loss(*f32(eps - guess, X0, EPS, tau), weighting)
    found = prediction_loss(*f32(told, X0, EPS, TIME), weighting, source)
    np.testing.assert_allclose(found, want, rtol=5e-3)  # float32 differences at t = 0
    np.testing.assert_allclose(found[1:], want[1:], rtol=2e-5)


def test_the_ddpm_loss_by_hand():
    found = prediction_loss(*f32(EPS + 0.5, X0, EPS, TIME), "eps", "eps")
    np.testing.assert_allclose(found, np.full(4, 0.25), rtol=1e-5)


def test_flow_networks_keep_their_own_loss():
    t = np.asarray([0.1, 0.5, 0.8, 0.99])
    z = noised(*f32(X0, EPS, t))
    wide = t[:, None, None]
    np.testing.assert_allclose(z, (1 - wide) * X0 + wide * EPS, rtol=1e-5, atol=1e-6)
    inputs = f32(EPS - X0 + 0.3, X0, EPS, t)
    np.testing.assert_array_equal(
        prediction_loss(*inputs, "edm"), denoising_loss(*inputs, "edm")
    )


def test_an_unknown_weighting_is_named():
    with pytest.raises(UserError, match="'snr'"):
        prediction_loss(*f32(EPS, X0, EPS, TIME), "snr", "eps")
