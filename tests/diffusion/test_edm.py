"""The churned second-order step: formula, exactness, order and its Euler limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.edm import churn_eta, churned_ab2_step, churned_levels
from ddrl_jax.diffusion.schedules import karras_sigmas

RNG = np.random.default_rng(0)
X, X0, BEFORE = (RNG.normal(size=(3, 2, 2)).astype(np.float32) for _ in range(3))
PREVIOUS = np.array([160.0, 5.0, 0.2])
HAT = np.array([120.8, 3.02, 0.0699])
NEXT = np.array([86.0, 1.74, 0.0275])
ETA = 1 / 21


def wide(level):
    return np.asarray(level)[:, None, None]


def test_formula_of_the_release():
    h = np.log(wide(HAT / NEXT))
    c2 = -np.log(wide(PREVIOUS / HAT)) / h
    phi1 = (1 - np.exp(-h)) / h
    phi2 = (1 - phi1) / h
    mean = np.exp(-h) * X + h * ((phi1 - phi2 / c2) * X0 + phi2 / c2 * BEFORE)
    step = churned_ab2_step(
        *map(jnp.asarray, (X, X0, BEFORE)), PREVIOUS, HAT, NEXT, ETA
    )
    np.testing.assert_allclose(step.mean, mean, atol=2e-5)
    # s_i of the release's 20 steps at i = 2, 12, 18: 26.9, 0.545, 0.0086.
    np.testing.assert_allclose(step.std, [26.9, 0.545, 0.0086], rtol=5e-3)


def test_euler_by_hand():
    # Half way in sigma: the mean of state and x0; eta = 1/4: std = sqrt(9/16) sigma_s.
    step = churned_ab2_step(
        jnp.array([[4.0]]), jnp.array([[2.0]]), None, None, 1.0, 0.5, 0.25
    )
    assert (float(step.mean[0, 0]), float(step.std)) == (3.0, 0.375)


def test_the_churn_lifts_the_next_state_to_its_level():
    # sigma_s^2 left by the solver plus the std^2 of the step is sigma_hat of the next.
    sigmas = karras_sigmas(20, 200.0, 0.01)
    levels = churned_levels(sigmas, ETA)
    zeros = jnp.zeros((19, 1))
    step = churned_ab2_step(
        zeros, zeros, None, None, levels[:-1, 0], levels[:-1, 1], ETA
    )
    total = np.sqrt(levels[:-1, 1] ** 2 + np.asarray(step.std, float) ** 2)
    np.testing.assert_allclose(total, levels[1:, 0], rtol=1e-5)
    np.testing.assert_allclose(levels[0], [200 * 22 / 21, 152.7], rtol=1e-3)


def test_exact_for_an_x0_that_is_affine_in_log_sigma():
    # dx/dlambda = x0 - x with lambda = -ln sigma and x0 = p + q lambda has the solution
    # x(lambda + h) = e^-h x + (1 - e^-h)(p + q lambda) + q (h - 1 + e^-h).
    p, q, x = 0.7, -1.3, 2.0
    previous, hat, after = 3.0, 2.0, 0.5
    x0, before = p - q * np.log(hat), p - q * np.log(previous)
    h = np.log(hat / after)
    expected = np.exp(-h) * x + (1 - np.exp(-h)) * x0 + q * (h - 1 + np.exp(-h))
    state, now, then = (jnp.full((1, 1), value) for value in (x, x0, before))
    step = churned_ab2_step(state, now, then, previous, hat, after, 0.0)
    np.testing.assert_allclose(step.mean, [[expected]], rtol=1e-6)
    assert float(step.std) == 0.0


def test_infinite_previous_level_is_the_euler_step():
    zeros = jnp.zeros_like(jnp.asarray(X))
    infinite = jnp.full(3, jnp.inf)

    @jax.jit
    def first(x, x0, previous, level):
        return churned_ab2_step(x, x0, previous, level, HAT, NEXT, ETA)

    euler = jax.jit(lambda x, x0: churned_ab2_step(x, x0, None, None, HAT, NEXT, ETA))
    step, plain = first(X, X0, zeros, infinite), euler(X, X0)
    np.testing.assert_allclose(step.mean, plain.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(step.std, plain.std)
    # The mixed batch of a per-sample schedule: one first step among later ones.
    mixed = first(X, X0, BEFORE, jnp.asarray(PREVIOUS, jnp.float32).at[1].set(jnp.inf))
    np.testing.assert_allclose(mixed.mean[1], plain.mean[1], rtol=1e-6, atol=1e-6)


def test_gradients_are_finite_at_the_infinite_level():
    def total(x, x0, previous, level, hat, after):
        step = churned_ab2_step(x, x0, previous, level, hat, after, ETA)
        return (step.mean**2).sum() + (step.std**2).sum()

    inputs = tuple(jnp.asarray(y, jnp.float32) for y in (X, X0, BEFORE))
    levels = tuple(jnp.asarray(y, jnp.float32) for y in (HAT, NEXT))
    gradients = jax.jit(jax.grad(total, tuple(range(6))))(
        *inputs, jnp.full(3, jnp.inf), *levels
    )
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def final_error(steps, second_order, mean=0.4, spread=0.5):
    """|x - exact| at sigma 0.05 from sigma 20, on data N(mean, spread^2), no churn."""
    sigmas = karras_sigmas(steps, 20.0, 0.05)

    def body(carry, pair):
        x, before, level = carry
        x0 = mean + spread**2 / (spread**2 + pair[0] ** 2) * (x - mean)
        step = churned_ab2_step(x, x0, before, level, pair[0], pair[1], 0.0)
        return (step.mean, x0, pair[0] if second_order else jnp.inf), None

    x = jnp.full((1, 1), 20.0)
    pairs = jnp.asarray(churned_levels(sigmas, 0.0), jnp.float32)
    start = (x, jnp.zeros_like(x), jnp.float32(jnp.inf))
    found = float(jax.lax.scan(body, start, pairs)[0][0][0, 0])
    scale = np.sqrt((spread**2 + 0.05**2) / (spread**2 + 20.0**2))
    return abs(found - (mean + scale * (20.0 - mean)))


@pytest.mark.parametrize(
    ("second_order", "low", "high"), [(True, 3.3, 5), (False, 1.7, 2.3)]
)
def test_order_of_accuracy(second_order, low, high):
    # Exact flow of Gaussian data: Euler halves its error with the step, AB2 quarters.
    errors = [final_error(n, second_order) for n in (20, 40, 80)]
    assert low < errors[0] / errors[1] < high
    assert low < errors[1] / errors[2] < high


def test_churn_of_the_release():
    assert churn_eta(1.0, 20) == 1 / 21
    assert churn_eta(100.0, 20) == pytest.approx(0.0954451150)  # sqrt(1.2) - 1
    assert churn_eta(0.0, 20) == 0.0
