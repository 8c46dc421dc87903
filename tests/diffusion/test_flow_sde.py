"""The three flow transitions against the published formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.flow_sde import cps_step, dance_step, flow_grpo_step

RNG = np.random.default_rng(0)
X, V = (RNG.normal(size=(4, 2, 3)) for _ in range(2))
JX, JV = jnp.asarray(X, jnp.float32), jnp.asarray(V, jnp.float32)
T = np.array([1.0, 0.9, 0.5, 0.1])
S = np.array([0.9, 0.8, 0.45, 0.0])


def wide(level):
    return np.asarray(level)[:, None, None]


def flow_grpo_golden(a, sigma_max):
    sigma, dt = wide(T), wide(S - T)
    std_t = a * np.sqrt(sigma / (1 - np.where(sigma == 1, sigma_max, sigma)))
    mean = X * (1 + std_t**2 / (2 * sigma) * dt)
    mean = mean + V * (1 + std_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, (std_t * np.sqrt(-dt))[:, 0, 0]


def dance_golden(eta):
    sigma, dt = wide(T), wide(S - T)
    x0 = X - sigma * V
    score = -(X - (1 - sigma) * x0) / sigma**2
    return X + dt * V - 0.5 * eta**2 * score * dt, eta * np.sqrt(T - S)


def cps_golden(a):
    sigma, sigma_s = wide(T), wide(S)
    std = sigma_s * np.sin(a * np.pi / 2)
    x0, eps = X - sigma * V, X + (1 - sigma) * V
    return (1 - sigma_s) * x0 + np.sqrt(sigma_s**2 - std**2) * eps, std[:, 0, 0]


@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("kernel", ["flow_grpo", "dance", "cps"])
def test_published_formula(kernel, amount):
    step, golden = {
        "flow_grpo": (flow_grpo_step(JX, JV, T, S, amount, 0.9), flow_grpo_golden),
        "dance": (dance_step(JX, JV, T, S, amount), dance_golden),
        "cps": (cps_step(JX, JV, T, S, amount), cps_golden),
    }[kernel]
    args = (amount, 0.9) if kernel == "flow_grpo" else (amount,)
    mean, std = golden(*args)
    np.testing.assert_allclose(step.mean, mean, atol=3e-6)
    np.testing.assert_allclose(step.std, std, rtol=3e-6)


def test_flow_grpo_by_hand():
    # sigma = 1/2 -> 1/4, a = 1: g = 1, dt = -1/4; x = v = 1:
    # mean = (1 - 1/4) + (1 + 1/2)(-1/4) = 3/8, std = 1/2.
    one = jnp.ones((1, 1))
    step = flow_grpo_step(one, one, 0.5, 0.25, 1.0, 0.9)
    assert (float(step.mean[0, 0]), float(step.std)) == (0.375, 0.5)


def test_flow_grpo_at_pure_noise_uses_the_second_sigma_of_the_grid():
    # Only in 1 - sigma: g^2 = a^2 * 1 / (1 - 0.9) = 4.9 and std = sqrt(4.9 * 0.1).
    step = flow_grpo_step(JX, JV, T, S, 0.7, 0.9)
    np.testing.assert_allclose(step.std[0], np.sqrt(0.49), rtol=1e-6)
    other = flow_grpo_step(JX, JV, T, S, 0.7, 0.99)
    np.testing.assert_allclose(other.std[0], np.sqrt(4.9), rtol=1e-6)
    np.testing.assert_array_equal(other.std[1:], step.std[1:])


def test_dance_is_the_flow_sde_with_a_constant_coefficient():
    # Flow-GRPO's g is eta where a = eta sqrt((1 - sigma) / sigma).
    t, s = np.array([0.99, 0.9, 0.5, 0.1]), S
    dance = dance_step(JX, JV, t, s, 0.3)
    same = flow_grpo_step(JX, JV, t, s, 0.3 * np.sqrt((1 - t) / t), 0.9)
    np.testing.assert_allclose(dance.mean, same.mean, atol=3e-6)
    np.testing.assert_allclose(dance.std, same.std, rtol=3e-6)


def test_cps_keeps_the_coefficients_of_the_flow():
    # A state of known x0 and eps: the mean holds (1 - sigma') x0, and the variances of
    # kept and fresh noise add up to sigma'^2.
    x0, eps = RNG.normal(size=(4, 1)), np.array([[1.0], [-1.0], [2.0], [-2.0]])
    x = jnp.asarray((1 - T[:, None]) * x0 + T[:, None] * eps, jnp.float32)
    step = cps_step(x, jnp.asarray(eps - x0, jnp.float32), T, S, 0.6)
    kept = (np.asarray(step.mean) - (1 - S[:, None]) * x0) / eps
    np.testing.assert_allclose(kept[:, 0] ** 2 + step.std**2, S**2, atol=3e-6)


STEPS = {
    "flow_grpo": lambda x, v, t, s, a: flow_grpo_step(x, v, t, s, a, 0.9),
    "dance": dance_step,
    "cps": cps_step,
}


@pytest.mark.parametrize("kernel", STEPS)
def test_no_noise_is_the_euler_step_of_the_ode(kernel):
    step = STEPS[kernel](JX, JV, T, S, 0.0)
    np.testing.assert_allclose(step.mean, X + wide(S - T) * V, atol=1e-6)
    np.testing.assert_array_equal(step.std, np.zeros(4))


@pytest.mark.parametrize("kernel", STEPS)
def test_no_nan_at_either_end_in_value_or_gradient(kernel):
    # Sample 0 starts at sigma = 1, sample 3 ends at sigma = 0. The gradient with
    # respect to the levels is taken as well: a masked 1 / 0 would show as NaN there.
    def total(x, v, t, s):
        step = STEPS[kernel](x, v, t, s, 0.7)
        return (step.mean**2).sum() + (step.std**2).sum()

    arguments = (JX, JV, jnp.asarray(T, jnp.float32), jnp.asarray(S, jnp.float32))
    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*arguments)
    assert np.isfinite(value)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_last_step():
    t, s = jnp.array([0.1]), jnp.array([0.0])
    x, v = JX[:1], JV[:1]
    assert float(cps_step(x, v, t, s, 0.7).std[0]) == 0.0
    # The SDE steps keep their noise at sigma' = 0; without it they end at x0.
    np.testing.assert_allclose(dance_step(x, v, t, s, 0.3).std, [0.3 * 0.1**0.5], 1e-6)
    still = flow_grpo_step(x, v, t, s, 0.0, 0.9)
    np.testing.assert_allclose(still.mean, X[:1] - 0.1 * V[:1], atol=1e-6)
    assert float(still.std[0]) == 0.0


@pytest.mark.parametrize("kernel", STEPS)
def test_states_are_float32_for_a_bfloat16_network(kernel):
    low = JV.astype(jnp.bfloat16)
    step = STEPS[kernel](JX, low, T, S, 0.7)
    assert step.mean.dtype == step.std.dtype == jnp.float32
    exact = STEPS[kernel](JX, low.astype(jnp.float32), T, S, 0.7)
    np.testing.assert_array_equal(step.mean, exact.mean)
