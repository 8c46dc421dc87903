"""The learner around a network of three numbers, and the same losses in NumPy.

    v(z, time, cond) = w z + time cond b

Small enough that every gradient can be checked by finite differences in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from edited_config import configured

from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.interfaces import Cond, DataSource
from ddrl_jax.learner import Minibatch, Objective, init_state, make_update
from ddrl_jax.rollout import guided, make_score, rollout, step_times

SHAPE, STEPS, TRAINED = (3, 2), 5, (0, 1, 3)
NOISE_LEVEL = 0.7
RNG = np.random.default_rng(8)
EMB = RNG.normal(size=(8, 1)).astype(np.float32)
ADVANTAGES = np.asarray([1.0, -0.5, 2.0, 0.25, -1.0, 0.75, -2.0, 1.5], np.float32)
PICTURES = RNG.normal(size=(8, *SHAPE)).astype(np.float32)
PARAMS = {"w": np.float32(0.3), "b": np.asarray([0.8, -0.4], np.float32)}
REFERENCE = {"w": np.float32(0.1), "b": np.asarray([0.5, 0.1], np.float32)}
SOURCE = DataSource(("x",), lambda records, keys: jnp.asarray(PICTURES)[records])


def apply(params, frozen, z, time, cond):
    del frozen
    t = time.reshape(-1, 1, 1)
    return params["w"] * z + t * cond.emb[:, :, None] * params["b"]


def objective(
    edits: dict[str, Any] | None = None,
    source: DataSource | None = SOURCE,
    network: Callable = apply,
) -> Objective:
    """The loss of a flow_grpo run with some keys of the configuration changed."""
    c = configured(
        {
            "sampler.steps": STEPS,
            "sampler.noise_level": NOISE_LEVEL,
            "policy.clip_range": 0.2,
            "data_term.text_dropout": 0.0,
        }
        | (edits or {})
    )
    uncond = Cond(jnp.zeros((1, 1)))
    return Objective(
        apply=network,
        guide=lambda policy: guided(policy, uncond, c.sampler.guidance_scale),
        kernel=make_kernel(c.sampler),
        score=make_score(c.policy.log_prob, c.policy.reduction),
        policy=c.policy,
        data=c.data_term,
        source=source,
        uncond=uncond,
        latent_shape=SHAPE,
    )


def params() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, PARAMS)


def batch(rows: slice = slice(0, 8)) -> Minibatch:
    """Samples of the policy PARAMS, three steps of each kept, with their data."""
    loss = objective()
    keys = jax.random.split(jax.random.key(21), 8)[rows]
    data_keys = jax.random.split(jax.random.key(22), 8)[rows]
    cond, count = Cond(jnp.asarray(EMB[rows])), keys.shape[0]
    trained = jnp.asarray(np.repeat(np.asarray(TRAINED)[:, None], count, 1), jnp.int32)
    policy = lambda z, time, c: apply(params(), {}, z, time, c)  # noqa: E731
    go = jax.jit(
        lambda keys, cond, times: rollout(
            policy, loss.kernel, loss.score, keys, cond, SHAPE, times, trained
        )
    )
    _, trajectory = go(keys, cond, step_times(loss.kernel, count))
    return Minibatch(
        keys=keys,
        data_keys=data_keys,
        cond=cond,
        records=jnp.arange(8, dtype=jnp.int32)[rows],
        data_cond=cond,
        trajectory=trajectory,
        old_log_prob=trajectory.log_prob,
        advantages=jnp.asarray(ADVANTAGES[rows]),
    )


def updated(
    loss: Objective,
    chunks: tuple[Minibatch, ...],
    tx: optax.GradientTransformation | None = None,
    ema: float = 0.0,
    start: Any = None,
    reference: Any = None,
):
    """(state, metrics) after one jitted update; by default p - gradient."""
    tx = tx or optax.sgd(1.0)
    state = init_state(params(), tx, ema) if start is None else start
    return jax.jit(make_update(loss, tx, ema))(state, {}, reference, chunks)


# ---- the same losses in float64 NumPy


def velocity(p: dict, z: np.ndarray, time: np.ndarray) -> np.ndarray:
    return p["w"] * z + time[:, None, None] * EMB[: len(z), :, None] * p["b"]


def transition(p: dict, x: np.ndarray, sigma: float, following: float):
    """Mean and std of one Flow-GRPO step (Liu et al. 2025, equation 9)."""
    x, dt = np.asarray(x, np.float64), following - sigma
    v = velocity(p, x, np.full(len(x), sigma))
    top = 1.0 - 1.0 / STEPS  # stands in for sigma where sigma is 1
    g2 = NOISE_LEVEL**2 * sigma / (1.0 - (top if sigma == 1.0 else sigma))
    drift = v + g2 / (2.0 * sigma) * (x + (1.0 - sigma) * v)
    return x + drift * dt, np.sqrt(-g2 * dt)


def stored(b: Minibatch):
    """(x_t, x_s, sigma_t, sigma_s) of each trained step."""
    t = b.trajectory
    for k, index in enumerate(TRAINED):
        yield t.x_t[k], t.x_s[k], 1 - index / STEPS, 1 - (index + 1) / STEPS


def policy_loss_by_hand(p: dict, b: Minibatch) -> float:
    """-mean over steps and samples of A log p."""
    terms = []
    for x_t, x_s, sigma, following in stored(b):
        mean, std = transition(p, x_t, sigma, following)
        z = (np.asarray(x_s, np.float64) - mean) / std
        log_prob = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).mean((1, 2))
        terms.append(-(log_prob * np.asarray(b.advantages, np.float64)).mean())
    return float(np.mean(terms))


def kl_by_hand(p: dict, b: Minibatch) -> float:
    """mean of (mu - mu_reference)^2 / (2 std^2)."""
    terms = []
    for x_t, _, sigma, following in stored(b):
        mean, std = transition(p, x_t, sigma, following)
        other, _ = transition(REFERENCE, x_t, sigma, following)
        terms.append(((mean - other) ** 2).mean() / (2 * std**2))
    return float(np.mean(terms))


def data_loss_by_hand(p: dict, b: Minibatch, indices: tuple[int, ...]) -> float:
    """Velocity loss at the levels of the rollout's steps and its initial noise."""
    eps = np.stack(
        [jax.random.normal(jax.random.fold_in(k, 0), SHAPE) for k in b.keys]
    ).astype(np.float64)
    x0 = PICTURES[np.asarray(b.records)].astype(np.float64)
    terms = []
    for index in indices:
        t = 1 - index / STEPS
        v = velocity(p, (1 - t) * x0 + t * eps, np.full(len(x0), t))
        terms.append(((v - (eps - x0)) ** 2).mean())
    return float(np.mean(terms))


def finite_differences(loss: Callable[[dict], float]) -> dict[str, np.ndarray]:
    """Central differences of a loss at PARAMS."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)
    out = {}
    for name, value in p.items():
        flat, slopes = np.atleast_1d(value), []
        for i in range(flat.size):
            ends = []
            for sign in (1.0, -1.0):
                moved = flat.copy()
                moved[i] += sign * 1e-5
                ends.append(loss(p | {name: moved.reshape(value.shape)}))
            slopes.append((ends[0] - ends[1]) / 2e-5)
        out[name] = np.asarray(slopes).reshape(value.shape)
    return out


def gradient(state: Any) -> dict[str, np.ndarray]:
    """The gradient that a step of SGD with rate 1 from PARAMS has taken."""
    return jax.tree.map(lambda a, b: np.asarray(a - b), PARAMS, state.params)
