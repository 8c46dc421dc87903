"""The optimum of DDRL with a real (if tiny) flow policy, by the program's own parts.

A one-dimensional velocity network is fitted to a Gaussian mixture, then post-trained
by rollout, replay and the objectives, once with the data term and once without. The
data term here carries the weights of the variational bound, so that it is the forward
KL of the policy's transitions: the objective of the theorem, up to the step count.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.base import get_config
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.interfaces import Cond
from ddrl_jax.objectives.data import denoising_loss
from ddrl_jax.objectives.policy import reinforce, reward_transform
from ddrl_jax.rollout import make_score, replay, rollout, step_times

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

MEANS, STDS, WEIGHTS = np.array([[-1.5, 1.3], [0.45, 0.45], [0.7, 0.3]])
BETA, STEPS, WIDTH, BATCH = 2.0, 20, 48, 256
EDGES = np.linspace(-4.0, 4.0, 41)


def mixture_bins(means, weights):
    x = np.linspace(-4.0, 4.0, 4001)
    pdf = sum(
        w / s * np.exp(-0.5 * ((x - m) / s) ** 2)
        for m, s, w in zip(means, STDS, weights, strict=True)
    )
    mass = np.histogram(x, EDGES, weights=pdf)[0]
    return mass / mass.sum()


def tilted_mixture():
    """p exp(x / beta) / Z of a Gaussian mixture is one again; also returns Z."""
    gain = np.exp(MEANS / BETA + 0.5 * (STDS / BETA) ** 2)
    z = BETA * np.log(WEIGHTS @ gain)
    return MEANS + STDS**2 / BETA, WEIGHTS * gain / (WEIGHTS @ gain), z


def kernel():
    sampler = get_config().sampler
    sampler.update(
        kernel="flow_grpo", steps=STEPS, noise_level=0.7, last_step="stochastic"
    )
    return make_kernel(sampler)


def bound_weights():
    """move^2 / (2 std^2): the KL of a transition for a velocity error of 1, [n]."""
    steps, one = kernel(), jnp.ones((STEPS, 1))
    t, s = jnp.asarray(steps.levels.T, jnp.float32)
    moved = steps.step(0 * one, one, t, s, None)
    return moved.mean[:, 0] ** 2 / (2 * moved.std**2)


def init(key):
    sizes = [(4, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    keys = jax.random.split(key, len(sizes))
    return [
        {"w": jax.random.normal(k, size) / np.sqrt(size[0]), "b": jnp.zeros(size[1])}
        for k, size in zip(keys, sizes, strict=True)
    ]


def network(params):
    def policy(z, time, cond):
        angle = 2 * jnp.pi * time[:, None]
        h = jnp.concatenate([z, time[:, None], jnp.cos(angle), jnp.sin(angle)], 1)
        for layer in params[:-1]:
            h = jax.nn.silu(h @ layer["w"] + layer["b"])
        return h @ params[-1]["w"] + params[-1]["b"]

    return policy


def draw_data(key, b):
    side, noise = jax.random.split(key)
    right = (jax.random.uniform(side, (b,)) < WEIGHTS[1]).astype(jnp.int32)
    mean, std = (jnp.asarray(a, jnp.float32)[right] for a in (MEANS, STDS))
    return (mean + std * jax.random.normal(noise, (b,)))[:, None]


def data_bound(params, key):
    """sum_i w_i E (v - v*)^2 over the noise levels of the sampler."""
    data_key, noise_key = jax.random.split(key)
    x0 = jnp.tile(draw_data(data_key, BATCH), (STEPS, 1))
    eps = jax.random.normal(noise_key, x0.shape)
    time = jnp.repeat(jnp.asarray(kernel().levels[:, 0], jnp.float32), BATCH)
    z = (1 - time[:, None]) * x0 + time[:, None] * eps
    each = denoising_loss(network(params)(z, time, None), x0, eps, time, "velocity")
    return jnp.sum(each * jnp.repeat(bound_weights(), BATCH)) / BATCH


def sample(params, key, b):
    trained = jnp.broadcast_to(jnp.arange(STEPS)[:, None], (STEPS, b))
    x0, trajectory = rollout(
        network(params),
        kernel(),
        make_score("gaussian", "sum"),
        jax.random.split(key, b),
        Cond(jnp.zeros((b, 1))),
        (1,),
        jnp.asarray(step_times(kernel(), b)),
        trained,
    )
    return x0[:, 0], jax.lax.stop_gradient(trajectory)


def post_train_loss(params, regularised, key):
    """DDRL with the exact Z, or the plain policy gradient where regularised is 0."""
    own_key, data_key = jax.random.split(key)
    reward, trajectory = sample(params, own_key, BATCH)
    _, _, z = tilted_mixture()
    reward = jax.lax.stop_gradient(reward)
    ddrl = reward_transform((reward - z) / BETA, "neg_exp_centered")
    advantages = jnp.where(regularised > 0, ddrl, (reward - reward.mean()) / BETA)
    cond, score = Cond(jnp.zeros((BATCH, 1))), make_score("gaussian", "sum")
    log_prob = replay(network(params), kernel(), score, trajectory, cond).sum(0)
    loss, _ = reinforce(log_prob, advantages)
    return loss + regularised * data_bound(params, data_key)


def fit(loss, params, key, steps, rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def body(carry, step_key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, step_key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(body, (params, optimizer.init(params)), keys)[0][0]


@functools.cache
def densities():
    """Histograms of the base policy, of DDRL and of no regulariser, in one program."""

    @jax.jit
    def run(key):
        start, base_key, post_key, draw_key = jax.random.split(key, 4)
        base = fit(data_bound, init(start), base_key, 1500, 5e-3)

        def arm(regularised):
            loss = lambda p, k: post_train_loss(p, regularised, k)  # noqa: E731
            return fit(loss, base, post_key, 800, 2e-3)

        arms = jax.vmap(arm)(jnp.array([1.0, 0.0]))
        draws = jax.vmap(lambda p: sample(p, draw_key, 8192)[0])(arms)
        return jnp.stack([sample(base, draw_key, 8192)[0], *draws])

    samples = np.clip(np.asarray(run(jax.random.key(0))), -3.99, 3.99)
    found = [np.histogram(each, EDGES)[0] / each.size for each in samples]
    return dict(zip(("base", "ddrl", "none"), found, strict=True))


def variation(p, q):
    return 0.5 * np.abs(p - q).sum()


def test_the_base_policy_samples_its_data():
    assert variation(densities()["base"], mixture_bins(MEANS, WEIGHTS)) < 0.1


def test_ddrl_of_a_flow_policy_samples_the_tilted_mixture():
    means, weights, _ = tilted_mixture()
    tilted, data = mixture_bins(means, weights), mixture_bins(MEANS, WEIGHTS)
    reached = densities()["ddrl"]
    # 0.10 with 8 steps of the sampler and 0.07 with 20: the bound gets tighter.
    assert variation(reached, tilted) < 0.1
    assert variation(reached, data) > 0.25
    right = reached[EDGES[:-1] >= 0].sum()
    np.testing.assert_allclose(right, weights[1], atol=0.09)


def test_the_same_policy_without_the_data_term_leaves_the_data():
    reached = densities()["none"]
    assert variation(reached, mixture_bins(MEANS, WEIGHTS)) > 0.9
    assert reached[EDGES[:-1] >= 2.5].sum() > 0.9
