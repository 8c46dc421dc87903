"""Rollout and its mirror, replay: two scans that share one transition.

The transition and its log-probability are the same function with the same shapes in
both, so that on policy the ratio of the two is exactly 1.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddrl_jax.diffusion.gaussian import Gaussian, rounded, squared_error_log_prob
from ddrl_jax.interfaces import (
    Cond,
    GaussianLike,
    Kernel,
    Memory,
    Trajectory,
    Transition,
)

Policy = Callable[[Array, Array, Cond], Array]  # (z, time, cond) -> prediction
Score = Callable[[GaussianLike, Array], Array]  # (step, next state) -> log_prob [b]


def guided(denoise: Policy, uncond: Cond, scale: float) -> Policy:
    """Classifier-free guidance: p_uncond + scale (p_cond - p_uncond), one 2b call.

    Args:
      denoise: the network.
      uncond: the empty prompt, batch 1.
      scale: 1 returns `denoise` itself. Gradients flow through both branches.
    """
    if scale == 1.0:
        return denoise

    def policy(z, time, cond):
        empty = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)
        both = jax.tree.map(_interleaved, empty, cond)
        out = denoise(_interleaved(z, z), _interleaved(time, time), both)
        pairs = out.reshape(-1, 2, *out.shape[1:])
        without, with_prompt = pairs[:, 0], pairs[:, 1]
        return without + rounded(scale * (with_prompt - without))

    return policy


def _interleaved(a: Array, b: Array) -> Array:
    """Rows a0, b0, a1, b1, ...: both of a sample are on the device that has it."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def make_score(log_prob: str, reduction: str) -> Score:
    """The log-probability of a row: "gaussian", or "squared_error" without the std.

    A step without noise has no density; it scores 0 and is never trained on.
    """

    def score(step: GaussianLike, x_s: Array) -> Array:
        noisy = step.std > 0
        safe = Gaussian(step.mean, jnp.where(noisy, step.std, 1.0))
        if log_prob == "gaussian":
            value = safe.log_prob(x_s, reduction)
        else:
            value = squared_error_log_prob(safe, x_s, reduction)
        return jnp.where(noisy, value, 0.0)

    return score


def transition(
    policy: Policy,
    kernel: Kernel,
    x: Float[Array, "b *x"],
    time: Float[Array, "b 2"],
    cond: Cond,
    memory: Memory | None,
) -> tuple[GaussianLike, Memory | None]:
    """The distribution of the next state, and what the kernel remembers of this step.

    Args:
      policy: the (guided) network.
      kernel: the sampler.
      x: current state, float32.
      time: (t, s) levels of each sample.
      cond: prompts.
      memory: of the step before, for multistep kernels.
    """
    t, s = rounded(time[:, 0]), rounded(time[:, 1])
    z, network_time = map(rounded, kernel.to_network(x, t))
    prediction = rounded(policy(z, network_time, cond).astype(jnp.float32))
    step = kernel.step(x, prediction, t, s, memory)
    if kernel.remember is None:
        return step, None
    return step, kernel.remember(x, prediction, t)


def step_times(kernel: Kernel, batch: int) -> Float[np.ndarray, "n b 2"]:
    """The (t, s) levels of every step, repeated for each sample, float32."""
    return np.repeat(kernel.levels[:, None].astype(np.float32), batch, axis=1)


def initial_noise(
    keys: Key[Array, " b"], latent_shape: tuple[int, ...]
) -> Float[Array, "b *x"]:
    """The unit Gaussian noise a sample starts from: key folded with 0."""
    draw = partial(jax.random.normal, shape=latent_shape, dtype=jnp.float32)
    return jax.vmap(lambda k: draw(jax.random.fold_in(k, 0)))(keys)


def rollout(
    policy: Policy,
    kernel: Kernel,
    score: Score,
    keys: Key[Array, " b"],
    cond: Cond,
    latent_shape: tuple[int, ...],
    times: Float[Array, "n b 2"],
    trained: Int[Array, "t b"],
) -> tuple[Float[Array, "b *x"], Trajectory]:
    """Samples x0 and keeps the trained transitions with their log-probabilities.

    Args:
      policy: (z, time, cond) -> prediction.
      kernel: the sampler.
      score: log-probability of a transition.
      keys: one a sample; step i draws from the key folded with i + 1.
      cond: prompts.
      latent_shape: the shape *x of a sample.
      times: `step_times` of the kernel. An argument of the compiled program, never a
        constant in it: folded constants round unlike the replay's arrays.
      trained: step indices to keep, for each sample its own; t may be 0.

    Returns:
      x0 and the Trajectory, float32.
    """
    x = kernel.init_scale * initial_noise(keys, latent_shape)
    memory = _no_memory(kernel, x)
    number, rows = _slots(trained, times.shape[0])
    states = jnp.zeros((number.shape[0], *x.shape), x.dtype)
    kept = _empty(trained, memory)

    def body(carry, item):
        x, memory, states, kept = carry
        index, time = item
        # Out of the carry, which is memory: what is read and what is kept are the same
        # bits, where a compiler may compute a fresh state twice and round it twice.
        states = _keep(states, x, number == index)
        step, remembered = transition(policy, kernel, x, time, cond, memory)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, index + 1))(keys)
        x_s = step.sample(step_keys)
        new = _Kept(score(step, x_s), time, memory)
        write = partial(_keep, here=trained == index)
        kept = jax.tree.map(write, kept, new)
        return (x_s, remembered, states, kept), None

    indices = jnp.arange(times.shape[0])
    carry, _ = jax.lax.scan(body, (x, memory, states, kept), (indices, times))
    x, _, states, kept = carry
    states = _keep(states, x, number == times.shape[0])
    found = Trajectory(states, rows, kept.log_prob, kept.time, trained, kept.memory)
    return x, found


def replay(
    policy: Policy, kernel: Kernel, score: Score, trajectory: Trajectory, cond: Cond
) -> Float[Array, "t b"]:
    """Log-probabilities of stored transitions under (other) weights.

    Args:
      policy: (z, time, cond) -> prediction.
      kernel: the sampler of the rollout.
      score: as in the rollout.
      trajectory: what `rollout` kept.
      cond: prompts.
    """

    def body(_, step):
        item = trajectory.at(step)
        return None, score(replay_step(policy, kernel, item, cond), item.x_s)

    steps = jnp.arange(trajectory.log_prob.shape[0])
    return jax.lax.scan(body, None, steps)[1]


def replay_step(
    policy: Policy, kernel: Kernel, item: Transition, cond: Cond
) -> GaussianLike:
    """The distribution of one stored transition."""
    return transition(policy, kernel, item.x_t, item.time, cond, item.memory)[0]


def _no_memory(kernel: Kernel, x: Array) -> Memory | None:
    """Before the first step: an infinite level turns a two-step rule into Euler's."""
    if kernel.remember is None:
        return None
    return Memory(jnp.zeros_like(x), jnp.full(x.shape[:1], jnp.inf, jnp.float32))


class _Kept(NamedTuple):
    """What is kept of each trained step besides the states."""

    log_prob: Float[Array, "t b"]
    time: Float[Array, "t b 2"]
    memory: Memory | None


def stored_states(trained: int, steps: int) -> int:
    """States stored of a trajectory: each once, or two a trained step if fewer.

    Args:
      trained: steps kept of a sample.
      steps: of the sampler.
    """
    return min(2 * trained, steps + 1)


def _slots(
    trained: Int[Array, "t b"], steps: int
) -> tuple[Int[Array, "k b"], Int[Array, "t b"]]:
    """(number of the state in each slot, slot in which each trained step begins)."""
    t, b = trained.shape
    if stored_states(t, steps) == steps + 1:
        every = jnp.arange(steps + 1, dtype=trained.dtype)
        return jnp.broadcast_to(every[:, None], (steps + 1, b)), trained
    first = 2 * jnp.arange(t, dtype=trained.dtype)
    pairs = jnp.stack([trained, trained + 1], axis=1).reshape(2 * t, b)
    return pairs, jnp.broadcast_to(first[:, None], (t, b))


def _empty(trained: Array, memory: Memory | None) -> _Kept:
    t, b = trained.shape
    like = lambda a: jnp.zeros((t, *a.shape), a.dtype)  # noqa: E731
    zeros = jnp.zeros((t, b), jnp.float32)
    time = jnp.zeros((t, b, 2), jnp.float32)
    return _Kept(zeros, time, jax.tree.map(like, memory))


def _keep(old: Array, value: Array, here: Array) -> Array:
    """Writes a value where `here` [k b] says; element-wise, so it shards."""
    return jnp.where(here.reshape(here.shape + (1,) * (old.ndim - 2)), value, old)
