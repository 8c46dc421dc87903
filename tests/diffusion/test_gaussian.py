"""Densities against hand values, and noise that belongs to its sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.diffusion.gaussian import (
    Gaussian,
    log,
    reduce_latent,
    rounded,
    squared_error_log_prob,
)

X = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
MEAN = np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32)
STD = np.array([0.5, 1.0, 3.0], np.float32)
GAUSSIAN = Gaussian(jnp.asarray(MEAN), jnp.asarray(STD))


def test_log_prob_by_hand():
    # One standard deviation off: -1/2 - log std - log(2 pi)/2.
    gaussian = Gaussian(jnp.zeros((2, 3)), jnp.array([1.0, 2.0]))
    x = jnp.array([[1.0, 1.0, 1.0], [2.0, -2.0, 2.0]])
    expected = np.array([-1.4189385332, -1.4189385332 - 0.6931471806])
    np.testing.assert_allclose(gaussian.log_prob(x), expected, rtol=1e-6)
    np.testing.assert_allclose(gaussian.log_prob(x, "sum"), 3 * expected, rtol=1e-6)


def test_log_prob_takes_one_std_for_all():
    same = Gaussian(GAUSSIAN.mean, jnp.full(3, 0.7)).log_prob(jnp.asarray(X))
    np.testing.assert_array_equal(
        Gaussian(GAUSSIAN.mean, jnp.float32(0.7)).log_prob(jnp.asarray(X)), same
    )


def test_log_prob_is_float32_for_a_bfloat16_mean():
    low = Gaussian(jnp.ones((2, 3), jnp.bfloat16), jnp.ones(2, jnp.bfloat16))
    log_prob = low.log_prob(jnp.full((2, 3), 1.001, jnp.float32))
    assert log_prob.dtype == jnp.float32
    expected = -0.5e-6 - 0.9189385332  # 0.001 would be lost in bfloat16
    np.testing.assert_allclose(log_prob, expected, rtol=2e-7)


@pytest.mark.parametrize(("reduction", "elements"), [("mean", 8), ("sum", 1)])
def test_score_gradient(reduction, elements):
    def total(mean):
        return Gaussian(mean, GAUSSIAN.std).log_prob(jnp.asarray(X), reduction).sum()

    expected = (X - MEAN) / STD[:, None, None] ** 2 / elements
    np.testing.assert_allclose(jax.grad(total)(GAUSSIAN.mean), expected, rtol=1e-5)


def test_no_density_is_made_up_where_there_is_no_noise():
    still = Gaussian(jnp.zeros((1, 2)), jnp.zeros(1))
    assert not np.isfinite(still.log_prob(jnp.zeros((1, 2)))).any()
    assert not np.isfinite(still.log_prob(jnp.ones((1, 2)))).any()


def test_kl_by_hand():
    # log 2 + (1 + 1) / (2 * 4) - 1/2
    one, two = Gaussian(jnp.zeros((1, 5)), jnp.ones(1)), Gaussian(jnp.ones((1, 5)), 2.0)
    np.testing.assert_allclose(one.kl(two), [0.4431471806], rtol=1e-6)
    np.testing.assert_allclose(one.kl(two, "sum"), [5 * 0.4431471806], rtol=1e-6)


def test_kl_is_the_expected_log_ratio():
    # E[log p - log q] in closed form, NumPy float64, element by element.
    other_mean, other_std = X.astype(float), np.array([1.5, 0.4, 2.0])[:, None, None]
    std = STD.astype(float)[:, None, None]
    entropy = -np.log(std) - 0.5
    cross = -np.log(other_std) - (std**2 + (MEAN - other_mean) ** 2) / other_std**2 / 2
    other = Gaussian(jnp.asarray(X), jnp.array([1.5, 0.4, 2.0]))
    expected = (entropy - cross).mean((1, 2))
    np.testing.assert_allclose(GAUSSIAN.kl(other), expected, rtol=1e-5)


def test_kl_to_itself_is_exactly_zero():
    np.testing.assert_array_equal(GAUSSIAN.kl(GAUSSIAN), np.zeros(3))
    np.testing.assert_array_equal(GAUSSIAN.kl(GAUSSIAN, "sum"), np.zeros(3))


def test_noise_belongs_to_the_sample():
    keys = jax.random.split(jax.random.key(0), 3)
    whole = GAUSSIAN.sample(keys)
    turned = Gaussian(GAUSSIAN.mean[::-1], GAUSSIAN.std[::-1]).sample(keys[::-1])
    alone = Gaussian(GAUSSIAN.mean[1:2], GAUSSIAN.std[1:2]).sample(keys[1:2])
    np.testing.assert_array_equal(turned[::-1], whole)
    np.testing.assert_array_equal(alone, whole[1:2])


def test_typed_and_raw_keys_agree():
    keys = jax.random.split(jax.random.key(3), 3)
    raw = jax.random.key_data(keys)
    np.testing.assert_array_equal(GAUSSIAN.sample(keys), GAUSSIAN.sample(raw))
    np.testing.assert_array_equal(GAUSSIAN.sample(keys[0]), GAUSSIAN.sample(raw[0]))


@pytest.mark.parametrize("one_key", [True, False])
def test_samples_have_the_mean_and_std(one_key):
    wide = Gaussian(jnp.full((2, 20_000), 3.0), jnp.array([0.5, 2.0]))
    key = jax.random.key(1)
    x = np.asarray(wide.sample(key if one_key else jax.random.split(key, 2)))
    # 4 standard errors of a mean and of a std of 20,000 draws.
    std = np.array([0.5, 2.0])
    assert (abs(x.mean(1) - 3.0) < 4 * std / 20_000**0.5).all()
    assert (abs(x.std(1) - std) < 4 * std / 40_000**0.5).all()
    assert abs(np.corrcoef(x)[0, 1]) < 4 / 20_000**0.5


def test_std_zero_gives_the_mean_to_the_bit():
    still = Gaussian(GAUSSIAN.mean, jnp.zeros(3))
    np.testing.assert_array_equal(still.sample(jax.random.key(0)), MEAN)


def test_squared_error_by_hand():
    gaussian = Gaussian(jnp.array([[1.0, 2.0]]), jnp.array([5.0]))
    x = jnp.array([[2.0, 4.0]])
    np.testing.assert_array_equal(squared_error_log_prob(gaussian, x), [-2.5])
    np.testing.assert_array_equal(squared_error_log_prob(gaussian, x, "sum"), [-5.0])


def test_squared_error_has_twice_the_variance_times_the_gradient():
    x = jnp.asarray(X)
    score = jax.grad(lambda m: Gaussian(m, GAUSSIAN.std).log_prob(x).sum())
    error = jax.grad(
        lambda m: squared_error_log_prob(Gaussian(m, GAUSSIAN.std), x).sum()
    )
    expected = 2.0 * STD[:, None, None] ** 2 * np.asarray(score(GAUSSIAN.mean))
    np.testing.assert_allclose(error(GAUSSIAN.mean), expected, rtol=1e-5)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'median'.*policy.reduction"):
        GAUSSIAN.log_prob(jnp.asarray(X), "median")


def test_the_rounding_fence_is_the_identity():
    x = jnp.array([0.0, -0.0, 1e-38, -3.5, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(jax.jit(rounded)(x), x)
    # Not a number stays visible as not finite, and the gradient passes untouched.
    assert not np.isfinite(rounded(jnp.array([jnp.nan]))).any()
    gradient = jax.grad(lambda x: (3.0 * rounded(x)).sum())(x)
    np.testing.assert_array_equal(gradient, np.full(6, 3.0))


@pytest.mark.optimised
@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_a_sum_is_the_same_bits_in_a_loop_and_outside(n):
    """XLA may compile a loop as one function, and matrix products differently there."""

    def body(x, _):
        return jnp.sin(3.0 * x), (x, reduce_latent(x, "sum"))

    start = jax.random.normal(jax.random.key(7), (4, n))
    _, (states, sums) = jax.lax.scan(body, start, None, length=20)
    alone = jax.jit(lambda x: reduce_latent(x, "sum"))
    np.testing.assert_array_equal(np.stack([alone(x) for x in states]), sums)
    exact = np.asarray(states, np.float64).sum(axis=2)
    np.testing.assert_allclose(sums, exact, rtol=1e-5, atol=1e-5)


def test_the_logarithm_is_that_of_double_precision():
    random = np.random.default_rng(4)
    spread, near = (
        np.exp(random.uniform(-80, 80, 10_000)),
        random.uniform(0.4, 2.2, 10_000),
    )
    x = jnp.asarray(np.concatenate([spread, near, 1 + 1e-3 * near]), jnp.float32)
    exact = np.log(np.asarray(x, np.float64))
    off = np.abs(np.asarray(jax.jit(log)(x), np.float64) - exact)
    assert (off / np.spacing(np.abs(exact).astype(np.float32))).max() < 4
    odd = jnp.array([0.0, -1.0, jnp.inf, jnp.nan, 1.0, 2.0])
    expected = [-np.inf, np.nan, np.inf, np.nan, 0.0, np.log(2.0)]
    np.testing.assert_allclose(log(odd), expected, rtol=1e-7)
    np.testing.assert_array_equal(jax.vmap(jax.grad(log))(x), 1 / x)


@pytest.mark.optimised
def test_a_logarithm_has_the_bits_of_its_operations():
    x = jnp.exp(jax.random.uniform(jax.random.key(6), 1003, minval=-9, maxval=9))
    with jax.disable_jit():
        expected = log(x)
    np.testing.assert_array_equal(jax.jit(log)(x), expected)
