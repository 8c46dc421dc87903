"""Every prediction from every other one, in flow, VP and VE coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.prediction import NAMES, convert

# Per sample: two flow, two VP, two VE states.
ALPHA = np.array([0.9, 0.3, 0.8, 0.6, 1.0, 1.0], np.float32)
SIGMA = np.array([0.1, 0.7, 0.6, 0.8, 0.5, 4.0], np.float32)
RNG = np.random.default_rng(0)
X0, EPS = (RNG.normal(size=(6, 2, 2)).astype(np.float32) for _ in range(2))


def quantities(x0, eps, alpha, sigma):
    return {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "velocity": eps - x0,
        "score": -eps / sigma,
    }


TRUE = quantities(X0, EPS, ALPHA[:, None, None], SIGMA[:, None, None])
STATE = jnp.asarray(ALPHA[:, None, None] * X0 + SIGMA[:, None, None] * EPS)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_table_and_round_trip(source, target):
    given = jnp.asarray(TRUE[source])
    there = convert(given, STATE, source, target, ALPHA, SIGMA)
    back = convert(there, STATE, target, source, ALPHA, SIGMA)
    # float32 through a division by sigma >= 0.1 or alpha >= 0.3, squared for the score.
    np.testing.assert_allclose(there, TRUE[target], atol=1e-4)
    np.testing.assert_allclose(back, TRUE[source], atol=1e-4)
    if source == target:
        np.testing.assert_array_equal(there, given)


def test_names_are_the_five():
    assert set(NAMES) == {"eps", "x0", "v", "velocity", "score"}


def test_by_hand():
    # x0 = 2, eps = -1, alpha = 0.6, sigma = 0.8: x = 0.4.
    hand = {"eps": -1.0, "x0": 2.0, "v": -2.2, "velocity": -3.0, "score": 1.25}
    x = jnp.array([[0.4]])
    for name, value in hand.items():
        found = convert(jnp.array([[-2.2]]), x, "v", name, 0.6, 0.8)
        np.testing.assert_allclose(found, [[value]], rtol=1e-6)


def test_pure_noise_and_pure_data():
    x, p = jnp.array([[0.5]]), jnp.array([[0.25]])
    # sigma = 1, alpha = 0: x is eps; velocity and v still tell x0, eps does not.
    np.testing.assert_array_equal(convert(p, x, "velocity", "x0", 0.0, 1.0), [[0.25]])
    np.testing.assert_array_equal(convert(p, x, "velocity", "eps", 0.0, 1.0), [[0.5]])
    np.testing.assert_array_equal(convert(p, x, "v", "x0", 0.0, 1.0), [[-0.25]])
    np.testing.assert_array_equal(convert(p, x, "eps", "score", 0.0, 1.0), [[-0.25]])
    assert not np.isfinite(convert(p, x, "eps", "x0", 0.0, 1.0)).any()
    # sigma = 0: x is x0; velocity still tells eps.
    np.testing.assert_array_equal(convert(p, x, "velocity", "x0", 1.0, 0.0), [[0.5]])
    np.testing.assert_array_equal(convert(p, x, "velocity", "eps", 1.0, 0.0), [[0.75]])


def test_gradient_is_finite_where_the_value_is():
    x, p = jnp.array([[0.5]]), jnp.array([[0.25]])

    def total(p):
        targets = ("x0", "eps", "v", "score")
        return sum(convert(p, x, "velocity", y, 0.0, 1.0).sum() for y in targets)

    # x0 + eps + v - eps / sigma at alpha 0, sigma 1: d/dp of -p + 0 + p - 0.
    np.testing.assert_array_equal(jax.grad(total)(p), [[0.0]])


def test_result_is_float32_for_a_bfloat16_network():
    low = jnp.asarray(TRUE["velocity"], jnp.bfloat16)
    assert convert(low, STATE, "velocity", "x0", ALPHA, SIGMA).dtype == jnp.float32


@pytest.mark.parametrize("names", [("epsilon", "x0"), ("x0", "noise")])
def test_unknown_name(names):
    with pytest.raises(ValueError, match="got '(epsilon|noise)', wanted one of"):
        convert(STATE, STATE, *names, ALPHA, SIGMA)
