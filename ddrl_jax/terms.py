"""The terms of the loss, each on one microbatch at a time.

    loss = policy_weight * policy term + kl_weight * step KL + data_weight * data term

The policy term is a surrogate along the stored transitions, or, for RWR, a weighted
denoising loss on the policy's own samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddrl_jax.interfaces import Cond, DataSource, Kernel, Metrics, Params, Trajectory
from ddrl_jax.objectives.data import noised, prediction_loss
from ddrl_jax.objectives.policy import clipped_surrogate, reinforce, step_kl
from ddrl_jax.rollout import Policy, Score, initial_noise, replay_step

# (trainable, frozen, z, time, cond) -> prediction, without guidance
Apply = Callable[[Params, Params, Array, Array, Cond], Array]

WEIGHTED = ("rwr", "sparse_rwr")  # policy terms that fit samples, without log-probs
MAXIMA = ("ratio_max_deviation", "rollout_gap")  # metrics that are no means
FIT_STREAM = 11  # folded into the data key: draws of the fit to own samples
TRAIN_STEPS = 1000.0  # timesteps of Stable Diffusion's schedule


class Minibatch(NamedTuple):
    """One microbatch of samples; an optimizer step sees a tuple of them."""

    keys: Key[Array, " b"]  # of the samples: their initial noise is a function of it
    data_keys: Key[Array, " b"]  # of the data draws
    cond: Cond
    records: Any  # of the data: numbers [b], or what DataSource.fetch gave, or None
    data_cond: Cond | None
    trajectory: Trajectory | None
    old_log_prob: Float[Array, "t b"] | None
    advantages: Float[Array, " b"] | None  # for RWR the weights of the samples
    x0: Float[Array, "b *x"] | None = None  # the samples themselves, only for RWR
    # of the samples in the data term, 0 for those that only fill up a chunk of sparse
    # RWR; None: all count alike
    data_weights: Float[Array, " b"] | None = None


class Items(NamedTuple):
    """What a gradient is accumulated over, step by step and never all at once.

    Attributes:
      index: the numbers of the items.
      at: number -> the item.
    """

    index: Int[Array, " n"]
    at: Callable[[Array], tuple]


class Objective(NamedTuple):
    """The terms and their weights, all static: read from the config once."""

    apply: Apply
    guide: Callable[[Policy], Policy]
    kernel: Kernel
    score: Score
    policy: Any  # config.policy
    data: Any  # config.data_term
    source: DataSource | None
    uncond: Cond
    latent_shape: tuple[int, ...]
    prediction: str = "velocity"  # what the network predicts


def policy_loss(
    objective: Objective, params: Params, frozen: Params, reference: Params, item
) -> tuple[Float[Array, ""], Metrics]:
    """Policy term and KL of one microbatch at one trained step."""
    transition, old, advantages, cond = item
    weights = objective.policy
    step = policy_step(objective, params, frozen, transition, cond)
    log_prob = objective.score(step, transition.x_s)
    gap = {}
    # "exact": an epoch has one update, so the old policy is this one by definition,
    # and the ratio 1 however far the rollout's log-probs are.
    if weights.old_log_prob == "exact":
        gap = {"rollout_gap": jnp.max(jnp.abs(log_prob - old))}
        old = jax.lax.stop_gradient(log_prob)
    loss, metrics = clipped_surrogate(log_prob, old, advantages, weights.clip_range)
    if weights.term == "reinforce":
        loss, _ = reinforce(log_prob, advantages)
    total = weights.weight * loss
    if weights.kl_weight:
        base, base_frozen = reference
        other = policy_step(objective, base, base_frozen, transition, cond)
        anchor = jax.lax.stop_gradient(other.mean)
        kl = jnp.mean(step_kl(step.mean, anchor, step.std, weights.reduction))
        total = total + weights.kl_weight * kl
        metrics = metrics | {"kl": kl}
    return total, metrics | gap | {"loss": loss}


def fit_loss(
    objective: Objective, params: Params, frozen: Params, item
) -> tuple[Float[Array, ""], Metrics]:
    """RWR (arXiv 2305.13301, Eq. 4): w_i times the denoising loss on the sample i.

    The prediction is the guided one, as in the rollout: without guidance in training
    the policy falls apart from the second round on (appendix E.1 there).
    """
    data_keys, x0, weights, cond = item
    fold = lambda k: jax.random.split(jax.random.fold_in(k, FIT_STREAM))  # noqa: E731
    draw = jax.vmap(fold)(data_keys)
    time = draw_times("uniform", draw[:, 0], objective.prediction)
    eps = initial_noise(draw[:, 1], objective.latent_shape)
    policy = objective.guide(lambda z, t, c: objective.apply(params, frozen, z, t, c))
    out = policy(noised(x0, eps, time, objective.prediction), time, cond)
    weighting = "velocity" if objective.prediction == "velocity" else "eps"
    each = prediction_loss(out, x0, eps, time, weighting, objective.prediction)
    loss = jnp.mean(weights * each)
    return objective.policy.weight * loss, {"loss": loss}


def data_loss(
    objective: Objective, params: Params, frozen: Params, item
) -> tuple[Float[Array, ""], Metrics]:
    """The data term of one microbatch: diffusion loss on captioned data."""
    assert objective.source is not None, "a data term needs data"
    keys, data_keys, records, cond, time, weights = item
    draw = jax.vmap(lambda k: jax.random.split(k, 4))(data_keys)
    x0 = objective.source.latents(records, draw[:, 0])
    if objective.data.levels == "rollout":
        eps = initial_noise(keys, objective.latent_shape)
    else:
        eps = initial_noise(draw[:, 2], objective.latent_shape)
        time = draw_times(objective.data.time, draw[:, 1], objective.prediction)
    dropped = jax.vmap(jax.random.uniform)(draw[:, 3]) < objective.data.text_dropout
    cond = _drop_text(cond, objective.uncond, dropped)
    z = noised(x0, eps, time, objective.prediction)
    out = objective.apply(params, frozen, z, time, cond)
    weighting, source = objective.data.weighting, objective.prediction
    each = prediction_loss(out, x0, eps, time, weighting, source)
    loss = jnp.mean(each if weights is None else weights * each)
    return objective.data.weight * loss, {"loss": loss}


def policy_step(objective: Objective, params, frozen, transition, cond):
    """The stored transition's distribution under `params`.

    The network is rematerialised: its forward pass then compiles to the rollout's own
    program, where one that also keeps residuals fuses and rounds differently. That is
    what makes the on-policy ratio exactly 1; it costs one more forward pass.
    """
    apply = jax.checkpoint(objective.apply)
    policy = objective.guide(lambda z, time, c: apply(params, frozen, z, time, c))
    return replay_step(policy, objective.kernel, transition, cond)


def draw_times(kind: str, keys: Array, prediction: str) -> Float[Array, " b"]:
    """The network's time of a diffusion loss, "uniform" or "logit_normal".

    Flow networks get t in [0, 1], those of Stable Diffusion's schedule a whole
    timestep of 0 to 999.
    """
    if kind == "uniform":
        time = jax.vmap(jax.random.uniform)(keys)
    else:
        time = jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys))
    if prediction == "velocity":
        return time
    return jnp.minimum(jnp.floor(time * TRAIN_STEPS), TRAIN_STEPS - 1)


def _drop_text(cond: Cond, uncond: Cond, dropped: Array) -> Cond:
    def drop(c, u):
        return jnp.where(dropped.reshape(-1, *(1,) * (c.ndim - 1)), u, c)

    return jax.tree.map(drop, cond, uncond)


def policy_items(chunks: tuple[Minibatch, ...]) -> Items:
    """(transition, old log-prob, advantages, cond) for each (step, microbatch).

    Trajectories are stacked with their latents as rows. The last two axes of an array
    lie in tiles of 8 x 128 on a TPU: of Stable Diffusion's latents [64 64 4] a stack
    took 32 times its size, 54 GB with its copies.
    """
    like = chunks[0].trajectory
    batch, count = _stack(tuple(_in_rows(chunk) for chunk in chunks)), len(chunks)
    parts = (batch.trajectory, batch.old_log_prob, batch.advantages, batch.cond)
    assert batch.old_log_prob is not None, "only collected chunks have a policy term"
    steps = batch.old_log_prob.shape[1]  # [chunks steps b]

    def at(i):
        trajectory, old, advantages, cond = _pick(parts, i % count)
        trajectory = jax.tree.map(lambda a, b: a.reshape(b.shape), trajectory, like)
        return trajectory.at(i // count), _pick(old, i // count), advantages, cond

    return Items(jnp.arange(steps * count), at)


def fit_items(chunks: tuple[Minibatch, ...]) -> Items:
    """(data keys, samples, weights, cond) for each microbatch."""
    batch = _stack(chunks)
    parts = (batch.data_keys, batch.x0, batch.advantages, batch.cond)
    return Items(jnp.arange(len(chunks)), lambda i: _pick(parts, i))


def data_items(objective: Objective, chunks: tuple[Minibatch, ...]) -> Items:
    """(keys, data keys, records, cond, time, weights) once a sample or a trained step.

    The loss is a mean over the items, so its weight does not depend on their number.
    With the rollout's levels the steps of a sample share one picture and its initial
    noise, as the released DDRL code does; with levels of its own each step draws anew.
    """
    batch, count = _stack(chunks), len(chunks)
    parts = (batch.keys, batch.data_keys, batch.records, batch.data_cond)
    weights = batch.data_weights
    time = jnp.zeros((count, 1, *chunks[0].data_keys.shape), jnp.float32)
    if batch.trajectory is not None:
        time = _network_times(objective.kernel, batch.trajectory)
    steps = time.shape[1] if objective.data.every_step else 1
    anew = objective.data.levels == "own" and steps > 1

    def at(i):
        keys, data_keys, records, cond = _pick(parts, i % count)
        if anew:
            draws = i * data_keys.size + jnp.arange(data_keys.size)
            data_keys = jax.vmap(jax.random.fold_in)(data_keys, draws)
        level = _pick(_pick(time, i % count), i // count)
        return keys, data_keys, records, cond, level, _pick(weights, i % count)

    return Items(jnp.arange(steps * count), at)


def _pick(tree: Any, index: Array) -> Any:
    """Entry `index` of the leading axis of every leaf."""
    pick = partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    return jax.tree.map(pick, tree)


def _in_rows(chunk: Minibatch) -> Minibatch:
    """The same with leaves [t b X] in its trajectory in place of [t b *x]."""
    rows = lambda a: a.reshape(*a.shape[:2], -1) if a.ndim > 3 else a  # noqa: E731
    return chunk._replace(trajectory=jax.tree.map(rows, chunk.trajectory))


def _stack(chunks: tuple[Minibatch, ...]) -> Any:
    """Microbatches as the rollout made them -> one with leaves [m b ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)


def _network_times(kernel: Kernel, trajectory: Trajectory) -> Float[Array, "m t b"]:
    """The rollout's noise levels as the network's time."""
    t = trajectory.time[..., 0]
    like = jnp.zeros((t.size, 1), jnp.float32)
    return kernel.to_network(like, t.reshape(-1))[1].reshape(t.shape)
