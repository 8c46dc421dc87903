"""The evaluation solvers on flows whose solution is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.schedules import flow_sigmas
from ddrl_jax.diffusion.solvers import solve

MEAN, SPREAD = 0.4, 0.5
Z = jnp.array([[-1.5], [0.3], [2.0]])


def velocity(z, time):
    """E[eps - x0 | z] of data N(MEAN, SPREAD^2), exactly."""
    assert time.shape == z.shape[:1]
    t = time[:, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    away = z - (1 - t) * MEAN
    return t / variance * away - MEAN - (1 - t) * SPREAD**2 / variance * away


def error(steps, method):
    found = np.asarray(solve(velocity, Z, flow_sigmas(steps), method))
    return np.abs(found - (MEAN + SPREAD * np.asarray(Z))).max()


@pytest.mark.parametrize(
    ("method", "low", "high"), [("euler", 1.8, 2.2), ("heun", 3.5, 4.5)]
)
def test_order_of_accuracy(method, low, high):
    # The exact map carries N(0, 1) to the data: z -> MEAN + SPREAD z.
    errors = [error(n, method) for n in (16, 32)]
    assert low < errors[0] / errors[1] < high
    # Euler's std is short by 1.4 / n of itself here: 0.045 at 32 steps and z = 2.
    assert errors[1] < (0.05 if method == "euler" else 0.002)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_straight_line_is_exact_in_one_step(method):
    def constant(z, time):
        return jnp.full_like(z, 0.25).astype(jnp.bfloat16)

    found = solve(constant, Z, np.array([1.0, 0.0]), method)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, Z - 0.25)


def test_unknown_method():
    with pytest.raises(ValueError, match="'rk4'.*evaluate.solver"):
        solve(velocity, Z, flow_sigmas(2), "rk4")
