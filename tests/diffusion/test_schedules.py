"""Grids against published values; processes and their inverses."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion import schedules
from ddrl_jax.diffusion.schedules import FLOW, VE, VP


def test_alpha_bars_of_stable_diffusion():
    # Measured from the SD 1.x scheduler configuration.
    published = {
        981: 0.005775496,
        961: 0.007281722,
        501: 0.274998844,
        481: 0.302295446,
        41: 0.960872650,
        21: 0.980380654,
        1: 0.998296022,
        0: 0.999149978,
    }
    alpha_bars = schedules.sd_alpha_bars()
    assert alpha_bars.shape == (1000,) and alpha_bars.dtype == np.float64
    # The published ones are products in float32: 1000 roundings of 6e-8.
    for timestep, value in published.items():
        np.testing.assert_allclose(alpha_bars[timestep], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "first"), [(10, 901), (20, 951), (30, 958), (50, 981), (100, 991)]
)
def test_ddim_timesteps(steps, first):
    timesteps = schedules.ddim_timesteps(steps)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (first, 1, steps)
    assert (np.diff(timesteps) == -(1000 // steps)).all()


def test_ddim_levels_end_at_alpha_bar_0():
    levels, alpha_bars = schedules.ddim_levels(50), schedules.sd_alpha_bars()
    np.testing.assert_array_equal(levels[0], alpha_bars[[981, 961]])
    np.testing.assert_array_equal(levels[-2:, 0], alpha_bars[[21, 1]])
    np.testing.assert_array_equal(levels[-2:, 1], alpha_bars[[1, 0]])


def test_timestep_is_the_inverse_of_the_schedule():
    alpha_bars = schedules.sd_alpha_bars()
    found = schedules.sd_timestep(jnp.asarray(alpha_bars, jnp.float32))
    np.testing.assert_array_equal(found, np.arange(1000))
    between = schedules.sd_timestep(0.75 * alpha_bars[500] + 0.25 * alpha_bars[501])
    np.testing.assert_allclose(between, 500.25, atol=1e-3)
    np.testing.assert_array_equal(
        schedules.sd_timestep(jnp.array([0.0, 1.0])), [999, 0]
    )


def test_flow_sigmas():
    np.testing.assert_array_equal(schedules.flow_sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    # shift 3: 3 s / (1 + 2 s)
    np.testing.assert_allclose(schedules.flow_sigmas(4, 3.0), [1, 0.9, 0.75, 0.5, 0])


def test_time_shift_and_its_inverse():
    time = np.linspace(0, 1, 11)
    shifted = schedules.shift_time(time, 3.0)
    assert (shifted[1:-1] > time[1:-1]).all()
    np.testing.assert_allclose(schedules.unshift_time(shifted, 3.0), time, atol=1e-15)


def test_karras_sigmas_are_those_of_the_ddrl_release():
    sigmas = schedules.karras_sigmas(20, 200.0, 0.01)
    assert sigmas.shape == (21,) and sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas[[0, -1]], [200.0, 0.01], rtol=1e-12)
    # sigma_{i+1} at i = 0, 4, 8, 12, 16, 18 (printed to three digits).
    published = [152.7, 46.0, 10.8, 1.74, 0.146, 0.0275]
    np.testing.assert_allclose(sigmas[[1, 5, 9, 13, 17, 19]], published, rtol=4e-3)


PROCESSES = {
    "flow": (FLOW, np.array([0.001, 0.3, 0.9, 1.0], np.float32)),
    "vp": (VP, np.array([0.005, 0.3, 0.9, 0.999], np.float32)),
    "ve": (VE, np.array([0.01, 0.5, 3.0, 200.0], np.float32)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_has_an_inverse_and_a_flow_twin(name):
    process, level = PROCESSES[name]
    alpha, sigma = process.scales(jnp.asarray(level))
    np.testing.assert_allclose(process.level(alpha, sigma), level, rtol=1e-5)

    rng = np.random.default_rng(0)
    x0, eps = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    x = jnp.asarray(np.asarray(alpha)[:, None] * x0 + np.asarray(sigma)[:, None] * eps)
    z, time = schedules.to_flow(x, alpha, sigma)
    expected = (1 - np.asarray(time))[:, None] * x0 + np.asarray(time)[:, None] * eps
    np.testing.assert_allclose(z, expected, atol=3e-6)
    np.testing.assert_allclose(schedules.from_flow(z, alpha, sigma), x, rtol=1e-5)
    np.testing.assert_allclose(
        process.level(*FLOW.scales(time)), level, rtol=2e-4
    )  # 1 - time in float32 at sigma 200
    y, alpha_bar = schedules.to_vp(x, alpha, sigma)
    a, s = np.sqrt(np.asarray(alpha_bar)), np.sqrt(1 - np.asarray(alpha_bar))
    # sqrt(1 - alpha_bar) in float32 is good to 3e-5 at sigma 0.001, times eps.
    np.testing.assert_allclose(y, a[:, None] * x0 + s[:, None] * eps, atol=2e-4)


def test_edm_to_flow_by_hand():
    # sigma = 3: c_in = 1/4, c_noise = 3/4 (DDRL release).
    z, time = schedules.to_flow(jnp.array([[8.0]]), 1.0, 3.0)
    assert (float(z[0, 0]), float(time)) == (2.0, 0.75)
