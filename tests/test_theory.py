"""What the objectives optimise, against finite differences and closed forms.

The toys of the second half, and their closed forms in float64, are those of the figure
in the README (benchmarks/theory_toy.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import theory_toy as toys
from configs.base import get_config
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.objectives.policy import clipped_surrogate, reinforce

# --- the gradient of a three-step policy -------------------------------------------
# One latent element and a velocity that is affine in the state: then the final state
# is Gaussian, E[cos(x0 - 1)] has a closed form, and no sample is needed for it.

STEPS, CHUNKS, PER_CHUNK = 3, 64, 4096
THETA = np.array([0.5, -0.3, 0.4], np.float32)
EDM = {"churn": 1.0, "sigma_max": 3.0, "sigma_min": 0.3}
KERNELS = {
    "ddim": {"eta": 1.0},
    "flow_grpo": {"noise_level": 0.7, "last_step": "stochastic"},
    "dance": {"eta": 0.6, "last_step": "stochastic"},
    "cps": {"noise_level": 0.8},
    "edm": EDM,
    "edm_stored": EDM,
}


def make(name):
    """The kernel, and whether what it remembers is held constant."""
    kind = "edm" if name.startswith("edm") else name
    sampler = get_config().sampler
    sampler.update({"kernel": kind, "steps": STEPS} | KERNELS[name])
    return make_kernel(sampler), name == "edm_stored"


def affine(theta, z, time):
    return theta[0] * z + (theta[1] * time)[:, None] + theta[2]


def follow(kernel, theta, choose):
    """The states and the log-prob of the chain in which `choose` picks each state.

    A step without noise is part of the environment: its weights stay at THETA, those
    of the prediction it remembers included. `edm_stored` treats what any step
    remembers like this: it is what replaying a stored trajectory does.
    """
    kernel, stored = kernel
    total, memory, fixed_memory = 0.0, None, None
    x = kernel.init_scale * choose(0, None)
    for i, (level, noisy) in enumerate(
        zip(kernel.levels, kernel.stochastic, strict=True)
    ):
        t, s = (jnp.full(x.shape[:1], value, jnp.float32) for value in level)
        free, fixed = (
            affine(weights, *kernel.to_network(x, t))
            for weights in (theta, jnp.asarray(THETA))
        )
        remembered = memory if noisy and not stored else fixed_memory
        step = kernel.step(x, free if noisy else fixed, t, s, remembered)
        if kernel.remember is not None:
            memory, fixed_memory = (kernel.remember(x, v, t) for v in (free, fixed))
        x = choose(i + 1, step)
        if noisy:
            total = total + step.log_prob(x, "sum")
    return x, total


def from_noise(noise):
    """Draws each state; noise [b, STEPS + 1]."""

    def choose(i, step):
        drawn = noise[:, i : i + 1]
        if step is None:
            return drawn
        std = jnp.broadcast_to(step.std, drawn.shape[:1])
        return step.mean + std[:, None] * drawn

    return choose


def recorded(kernel, theta, noise):
    """States, rewards and log-probs that `noise` leads to, as plain numbers."""
    states = []

    def choose(i, step):
        states.append(from_noise(noise)(i, step))
        return states[-1]

    x0, log_prob = follow(kernel, theta, choose)
    reward = jnp.cos(x0[:, 0] - 1)
    return jax.lax.stop_gradient((states, reward, log_prob))


def expected_reward(kernel, theta):
    """E[cos(x0 - 1)] = exp(-var / 2) cos(mean - 1); x0 is affine in the noises."""
    basis = jnp.concatenate([jnp.zeros((1, STEPS + 1)), jnp.eye(STEPS + 1)])
    x0 = follow(kernel, theta, from_noise(basis))[0][:, 0]
    variance = jnp.sum(jnp.square(x0[1:] - x0[0]))
    return jnp.exp(-0.5 * variance) * jnp.cos(x0[0] - 1.0)


def finite_difference(kernel, h=0.02):
    shifts = jnp.eye(3) * h
    at = jax.jit(jax.vmap(lambda theta: expected_reward(kernel, theta)))
    return (at(THETA + shifts) - at(THETA - shifts)) / (2 * h)


@functools.cache
def sampled_gradients(name):
    """Ascent direction of each term over independent chunks, {term: [CHUNKS, 3]}."""
    kernel, theta = make(name), jnp.asarray(THETA)
    away = theta + jnp.array([0.05, -0.05, 0.05])  # an older policy
    noise = jax.random.normal(jax.random.key(0), (CHUNKS, PER_CHUNK, STEPS + 1))

    def log_prob_at(theta, states):
        return follow(kernel, theta, lambda i, step: states[i])[1]

    def terms(noise):
        states, reward, old = recorded(kernel, theta, noise)
        before, earlier_reward, earlier = recorded(kernel, away, noise)
        baseline = expected_reward(kernel, theta)
        losses = {
            "reinforce": lambda th: reinforce(
                log_prob_at(th, states), reward - baseline
            )[0],
            "clipped": lambda th: clipped_surrogate(
                log_prob_at(th, states), old, reward - baseline, 1e-4
            )[0],
            "off-policy": lambda th: clipped_surrogate(
                log_prob_at(th, before), earlier, earlier_reward - baseline, np.inf
            )[0],
        }
        return {term: -jax.grad(loss)(theta) for term, loss in losses.items()}

    return jax.tree.map(np.asarray, jax.jit(lambda n: jax.lax.map(terms, n))(noise))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("term", ["reinforce", "clipped", "off-policy"])
def test_policy_gradient_equals_the_finite_difference_of_the_reward(name, term):
    truth = np.asarray(finite_difference(make(name)))
    gradients = sampled_gradients(name)[term]
    error = gradients.std(0, ddof=1) / np.sqrt(CHUNKS)
    assert np.all(np.abs(gradients.mean(0) - truth) < 5 * error + 1e-4)
    # The error bar is small enough for a factor or a sign to show.
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(truth)


# --- the optimum of DDRL and its variants, with exact expectations -------------------


@functools.cache
def discrete_optima():
    return toys.train_exactly(toys.discrete())


def stationary(q, slope):
    """At an optimum over densities every cell has the same slope of the objective."""
    np.testing.assert_allclose(slope, slope @ q, atol=1e-8)


def test_the_closed_forms_are_stationary_densities():
    p, reference, r, beta = toys.discrete()[1:]
    for arm in toys.ARMS:
        np.testing.assert_allclose(toys.optimum(toys.discrete(), arm).sum(), 1.0)
    q = toys.optimum(toys.discrete(), "exact")
    z = beta * np.log(np.sum(p * np.exp(r / beta)))
    stationary(q, -np.exp(-(r - z) / beta) + p / q)
    q = toys.optimum(toys.discrete(), "data_mean")
    stationary(q, -np.exp(-(r - p @ r) / beta) + p / q)
    q = toys.optimum(toys.discrete(), "group_mean")
    stationary(q, -np.exp(-(r - q @ r) / beta) + p / q)
    q = toys.optimum(toys.discrete(), "linear")
    stationary(q, r / beta + p / q)
    q = toys.optimum(toys.discrete(), "kl")
    stationary(q, r / beta - np.log(q / reference))


def test_ddrl_with_exact_z_converges_to_the_tilted_data():
    p, _, r, beta = toys.discrete()[1:]
    boltzmann = p * np.exp(r / beta)
    boltzmann /= boltzmann.sum()
    np.testing.assert_allclose(discrete_optima()["exact"], boltzmann, atol=1e-5)


@pytest.mark.parametrize("arm", ["data_mean", "group_mean", "linear", "kl"])
def test_the_variants_converge_to_their_own_optimum_and_not_to_the_tilted_data(arm):
    toy = toys.discrete()
    reached = discrete_optima()[arm]
    np.testing.assert_allclose(reached, toys.optimum(toy, arm), atol=1e-5)
    assert np.abs(reached - toys.optimum(toy, "exact")).max() > 0.02


def test_a_centre_below_z_saturates_the_tilt_and_one_above_it_steepens_it():
    p, _, r, beta = toys.discrete()[1:]
    order = np.argsort(r)
    tilts = {arm: (discrete_optima()[arm] / p)[order] for arm in toys.ARMS}
    for arm in ("exact", "data_mean", "group_mean", "linear"):
        assert np.all(np.diff(tilts[arm]) > 0), arm  # all are monotone in the reward
    slope = {arm: np.diff(np.log(tilt)) for arm, tilt in tilts.items()}
    # log tilt of the exact optimum is r / beta: the same slope everywhere.
    np.testing.assert_allclose(slope["exact"], np.diff(r[order]) / beta, atol=1e-3)
    # E_p[r] <= Z by Jensen, but E_q[r] = Z + beta KL(q || p) >= Z on policy.
    assert np.all(slope["data_mean"] < slope["exact"])
    assert np.all(slope["group_mean"] > slope["exact"])
    assert (
        slope["data_mean"][-1] / slope["exact"][-1]
        < slope["data_mean"][0] / (slope["exact"][0])
    )


def test_reverse_kl_tilts_its_reference_and_forgets_the_data():
    _, reference, r, beta = toys.discrete()[1:]
    boltzmann = reference * np.exp(r / beta)
    boltzmann /= boltzmann.sum()
    np.testing.assert_allclose(discrete_optima()["kl"], boltzmann, atol=1e-5)


def test_without_a_regulariser_everything_collapses_onto_the_best_cell():
    best = np.argmax(toys.discrete().reward)
    assert discrete_optima()["none"][best] > 0.999


# --- the same by stochastic gradients, on samples of a Gaussian mixture --------------


@functools.cache
def mixture_densities():
    return toys.train_on_samples(toys.gaussian_mixture())


def variation(p, q):
    return 0.5 * np.abs(p - q).sum()


@pytest.mark.parametrize("arm", ["exact", "data_mean", "group_mean", "linear", "kl"])
def test_sampled_training_finds_the_optimum_of_its_objective(arm):
    mixture, reached = toys.gaussian_mixture(), mixture_densities()[arm]
    assert variation(reached, toys.optimum(mixture, arm)) < 0.04
    others = [other for other in toys.ARMS if other != arm]
    gaps = [variation(reached, toys.optimum(mixture, other)) for other in others]
    assert min(gaps) > 0.05  # the optima are far enough apart to be told from noise


def test_ddrl_keeps_both_modes_and_no_regulariser_hacks():
    mixture = toys.gaussian_mixture()
    hacked = mixture_densities()["none"]
    assert hacked.max() > 0.999
    assert mixture.x[np.argmax(hacked)] > 2.5  # beyond the modes at -1.5 and 1.3
    kept, tilted = mixture_densities()["exact"], toys.optimum(mixture, "exact")
    left = mixture.x < 0
    np.testing.assert_allclose(kept[left].sum(), tilted[left].sum(), atol=0.02)
    assert kept[mixture.x > 2.5].sum() < 0.05
