"""Rollout and replay with networks simple enough to follow by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from ddrl_jax.diffusion.gaussian import Gaussian
from ddrl_jax.diffusion.kernels import KERNELS, make_kernel
from ddrl_jax.diffusion.solvers import solve
from ddrl_jax.interfaces import Cond, Transition
from ddrl_jax.rollout import (
    guided,
    initial_noise,
    make_score,
    replay,
    replay_step,
    rollout,
    step_times,
)

STEPS, BATCH, SHAPE = 5, 4, (3, 2)
SCORE = make_score("gaussian", "mean")
KEYS = jax.random.split(jax.random.key(11), BATCH)
COND = Cond(jnp.asarray([[0.5], [-0.25], [0.75], [1.0]]))
QUIET = {"eta": 0.0, "noise_level": 0.0, "churn": 0.0}


def policy(z, time, cond):
    return 0.3 * z + time[:, None, None] * cond.emb[:, :, None]


def other_policy(z, time, cond):
    return 0.4 * policy(z, time, cond)


def make(name="flow_grpo", **changes):
    sampler = get_config().sampler
    sampler.update(kernel=name, steps=STEPS, **changes)
    return make_kernel(sampler)


def run(kernel, trained=None, rows=slice(None), network=policy, score=SCORE):
    """A jitted rollout of some of the four samples; by default all steps are kept."""
    keys, cond = KEYS[rows], jax.tree.map(lambda c: c[rows], COND)
    count = keys.shape[0]
    if trained is None:
        trained = np.repeat(np.arange(STEPS)[:, None], count, 1)
    go = jax.jit(
        lambda k, c, times, t: rollout(network, kernel, score, k, c, SHAPE, times, t)
    )
    return go(keys, cond, step_times(kernel, count), jnp.asarray(trained, jnp.int32))


def transitions(kept):
    """The kept steps with a leading axis of steps."""
    return Transition(kept.x_t, kept.x_s, kept.time, kept.memory)


def fresh_noise(step):
    """The noise of each sample at a step: its key folded with step + 1."""
    return np.stack(
        [jax.random.normal(jax.random.fold_in(k, step + 1), SHAPE) for k in KEYS]
    ).astype(np.float64)


# ---- golden: the Flow-GRPO sampler once more, in float64 NumPy


def flow_grpo_by_hand(noise_level):
    """x0, states, log-probs of the whole batch; the last step has no noise."""
    sigmas = np.linspace(1.0, 0.0, STEPS + 1)
    x = np.stack([jax.random.normal(jax.random.fold_in(k, 0), SHAPE) for k in KEYS])
    x = x.astype(np.float64)
    states, log_probs = [x], []
    for i in range(STEPS):
        sigma, following = sigmas[i], sigmas[i + 1]
        dt = following - sigma
        v = 0.3 * x + sigma * np.asarray(COND.emb, np.float64)[:, :, None]
        a = noise_level if i < STEPS - 1 else 0.0
        g = a * np.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        drift = v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)
        std = g * np.sqrt(-dt)
        noise = fresh_noise(i)
        x = x + drift * dt + std * noise
        states.append(x)
        density = -0.5 * noise**2 - np.log(std or 1.0) - 0.5 * np.log(2 * np.pi)
        log_probs.append(density.mean((1, 2)) if std else np.zeros(BATCH))
    return states, np.stack(log_probs)


def test_flow_grpo_by_hand():
    x0, kept = run(make(noise_level=0.7))
    states, log_probs = flow_grpo_by_hand(0.7)
    np.testing.assert_allclose(x0, states[-1], atol=1e-5)
    np.testing.assert_allclose(kept.x_t, np.stack(states[:-1]), atol=1e-5)
    np.testing.assert_allclose(kept.x_s, np.stack(states[1:]), atol=1e-5)
    np.testing.assert_allclose(kept.log_prob, log_probs, atol=1e-5)
    assert kept.log_prob.dtype == kept.x_t.dtype == np.float32


# ---- the chain


@pytest.mark.parametrize("name", KERNELS)
def test_starts_at_the_initial_noise_and_hands_each_state_on(name):
    kernel = make(name)
    x0, kept = run(kernel)
    start = [jax.random.normal(jax.random.fold_in(k, 0), SHAPE) for k in KEYS]
    np.testing.assert_array_equal(initial_noise(KEYS, SHAPE), np.stack(start))
    np.testing.assert_allclose(
        kept.x_t[0], kernel.init_scale * np.stack(start), rtol=1e-6
    )
    np.testing.assert_array_equal(kept.x_t[1:], kept.x_s[:-1])
    np.testing.assert_array_equal(kept.x_s[-1], x0)
    levels = np.repeat(kernel.levels[:, None], BATCH, 1)
    np.testing.assert_array_equal(kept.time, levels.astype(np.float32))
    np.testing.assert_array_equal(kept.index, np.indices((STEPS, BATCH))[0])


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps", "edm"])
def test_a_step_without_noise_is_its_mean_and_scores_0(name):
    kernel = make(name)
    x0, kept = run(kernel)
    step = replay_step(policy, kernel, kept.at(jnp.asarray(STEPS - 1)), COND)
    assert not kernel.stochastic[-1]
    np.testing.assert_array_equal(step.std, 0.0)
    np.testing.assert_allclose(x0, step.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kept.log_prob[-1], 0.0)
    assert np.all(np.asarray(kept.log_prob[:-1]) != 0.0)


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps"])
def test_without_noise_the_flow_samplers_are_the_euler_solver(name):
    kernel = make(name, **QUIET, shift=2.0)
    x0, _ = run(kernel)
    times = np.append(kernel.levels[:, 0], 0.0)
    expected = solve(lambda z, t: policy(z, t, COND), initial_noise(KEYS, SHAPE), times)
    np.testing.assert_allclose(x0, expected, atol=2e-6)
    noisy, _ = run(make(name, shift=2.0))
    assert np.abs(noisy - expected).max() > 0.05


def test_ddim_without_noise_is_its_mean_at_every_step():
    kernel = make("ddim", eta=0.0)
    _, kept = run(kernel)
    step = jax.vmap(lambda item: replay_step(policy, kernel, item, COND))(
        transitions(kept)
    )
    assert not kernel.stochastic.any()
    np.testing.assert_allclose(kept.x_s, step.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept.log_prob, 0.0)


# ---- what is kept


SOME = [[0, 1, 0, 2], [3, 2, 1, 3]]
MORE = [[0, 1, 0, 1], [3, 2, 1, 2], [4, 4, 3, 4]]


@pytest.mark.parametrize("name", ["flow_grpo", "edm"])
@pytest.mark.parametrize(("trained", "stored"), [(SOME, 4), (MORE, STEPS + 1)])
def test_keeps_the_steps_each_sample_asks_for(name, trained, stored):
    kernel, trained = make(name), np.array(trained)
    x0, everything = run(kernel)
    same_x0, kept = run(kernel, trained)
    np.testing.assert_array_equal(x0, same_x0)
    assert len(kept.states) == stored and len(everything.states) == STEPS + 1
    parts = lambda k: (transitions(k), k.log_prob, k.index)  # noqa: E731
    picked = jax.tree.map(
        lambda a: np.asarray(a)[trained, np.arange(4)], parts(everything)
    )
    for found, expected in zip(
        jax.tree.leaves(parts(kept)), jax.tree.leaves(picked), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    one = kept.at(jnp.asarray(1))
    for found, expected in zip(
        jax.tree.leaves(one), jax.tree.leaves(transitions(kept)), strict=True
    ):
        np.testing.assert_array_equal(found, expected[1])


def test_may_keep_nothing():
    x0, kept = run(make(), np.zeros((0, BATCH), np.int32))
    np.testing.assert_array_equal(x0, run(make())[0])
    assert kept.x_t.shape == (0, BATCH, *SHAPE) and kept.log_prob.shape == (0, BATCH)


# ---- noise belongs to the sample


@pytest.mark.parametrize("rows", [[2, 0, 3, 1], [3], [1, 2]])
def test_a_sample_does_not_depend_on_its_neighbours(rows):
    kernel = make()
    x0, kept = run(kernel)
    part, kept_part = run(kernel, rows=np.array(rows))
    np.testing.assert_array_equal(part, x0[np.array(rows)])
    np.testing.assert_array_equal(kept_part.x_s, kept.x_s[:, np.array(rows)])


def test_samples_and_steps_have_noise_of_their_own():
    _, kept = run(make())
    step = jax.vmap(lambda item: replay_step(policy, make(), item, COND))(
        transitions(kept)
    )
    z = (kept.x_s - step.mean)[:-1] / np.asarray(step.std)[:-1, :, None, None]
    noise = np.stack([fresh_noise(i) for i in range(STEPS - 1)])
    np.testing.assert_allclose(z, noise, atol=1e-4)
    assert np.unique(noise).size == noise.size


# ---- replay


@pytest.mark.parametrize("name", KERNELS)
def test_replay_gives_the_stored_log_probs(name):
    kernel = make(name)
    _, kept = run(kernel)
    again = jax.jit(lambda k, c: replay(policy, kernel, SCORE, k, c))(kept, COND)
    np.testing.assert_allclose(again, kept.log_prob, atol=1e-6)
    other = replay(other_policy, kernel, SCORE, kept, COND)
    changed = np.abs(other - kept.log_prob)[kernel.stochastic]
    assert np.median(changed) > 1e-3


# ---- memory of a two-step sampler


def test_edm_hands_on_its_x0_and_level():
    kernel = make("edm", sigma_max=10.0, sigma_min=0.1)
    _, kept = run(kernel)
    np.testing.assert_array_equal(kept.memory.level[0], np.inf)
    np.testing.assert_array_equal(kept.memory.x0[0], 0.0)
    np.testing.assert_array_equal(kept.memory.level[1:], kept.time[:-1, :, 0])
    # The network's own coordinates: z = x / (1 + sigma), time = sigma / (1 + sigma).
    sigma = np.asarray(kept.time[:-1, :, 0], np.float64)[..., None, None]
    z, time = np.asarray(kept.x_t[:-1], np.float64) / (1 + sigma), sigma / (1 + sigma)
    v = 0.3 * z + time * np.asarray(COND.emb, np.float64)[None, :, :, None]
    np.testing.assert_allclose(kept.memory.x0[1:], z - time * v, atol=1e-5)


def test_one_step_samplers_keep_no_memory():
    assert run(make("dance"))[1].memory is None


# ---- guidance

UNCOND = Cond(jnp.asarray([[2.0]]))
Z, TIME = jnp.ones((BATCH, *SHAPE)), jnp.linspace(0.2, 0.8, BATCH)


def test_guidance_of_1_is_the_network_itself():
    assert guided(policy, UNCOND, 1.0) is policy


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_by_hand(scale):
    found = guided(policy, UNCOND, scale)(Z, TIME, COND)
    t, emb = np.asarray(TIME)[:, None, None], np.asarray(COND.emb)[:, :, None]
    without, with_prompt = 0.3 + t * 2.0, 0.3 + t * emb
    expected = without + scale * (with_prompt - without)
    np.testing.assert_allclose(found, np.broadcast_to(expected, Z.shape), rtol=1e-5)


def test_guidance_has_a_gradient_through_both_branches():
    def total(theta):
        network = lambda z, time, cond: theta * cond.emb[:, :, None] + 0.0 * z  # noqa: E731
        return jnp.mean(guided(network, UNCOND, 3.0)(Z, TIME, COND))

    # d/dtheta of u + 3 (c - u) is 3 c - 2 u; the mean of the four c is 0.5.
    np.testing.assert_allclose(jax.grad(total)(1.0), 3 * 0.5 - 2 * 2.0, rtol=1e-6)


def test_guidance_calls_the_network_once():
    calls = []

    def network(z, time, cond):
        calls.append(z.shape)
        return z

    guided(network, UNCOND, 2.0)(Z, TIME, COND)
    assert calls == [(2 * BATCH, *SHAPE)]


# ---- scores


def test_squared_error_leaves_the_std_out():
    step = Gaussian(jnp.zeros((2, 3)), jnp.asarray([0.5, 2.0]))
    x = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    mean = make_score("squared_error", "mean")(step, x)
    np.testing.assert_allclose(mean, [-14 / 3, -14 / 3], rtol=1e-6)
    total = make_score("squared_error", "sum")(step, x)
    np.testing.assert_allclose(total, [-14.0, -14.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "squared_error"])
def test_a_step_without_noise_has_no_score_and_a_finite_gradient(kind):
    score = make_score(kind, "mean")

    def total(mean, x):
        return jnp.sum(score(Gaussian(mean, jnp.asarray([0.0, 1.0])), x))

    x = jnp.ones((2, 3))
    values = score(Gaussian(jnp.zeros((2, 3)), jnp.asarray([0.0, 1.0])), x)
    assert values[0] == 0.0 and values[1] != 0.0
    gradient = jax.grad(total)(jnp.zeros((2, 3)), x)
    np.testing.assert_array_equal(gradient[0], 0.0)
    assert np.isfinite(gradient[1]).all() and np.all(gradient[1] != 0)
