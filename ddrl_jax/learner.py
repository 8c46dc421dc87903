"""TrainState and its one jitted update: accumulate, apply, average.

    loss = policy_weight * policy term + kl_weight * step KL + data_weight * data term

A term of weight 0 is not traced. Gradients are taken inside the body of a scan over
(trained step x microbatch) and summed in float32; the state is donated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ddrl_jax.interfaces import Cond, DataSource, Kernel, Metrics, Params, Trajectory
from ddrl_jax.objectives.advantages import (
    PerPromptTracker,
    batch_normalized,
    clip_advantages,
    group_normalized,
)
from ddrl_jax.objectives.data import denoising_loss
from ddrl_jax.objectives.policy import (
    clipped_surrogate,
    reinforce,
    reward_transform,
    step_kl,
)
from ddrl_jax.rollout import Policy, Score, initial_noise, replay_step

# (trainable, frozen, z, time, cond) -> prediction, without guidance
Apply = Callable[[Params, Params, Array, Array, Cond], Array]


class TrainState(NamedTuple):
    """Everything an update changes; all of it is in every checkpoint."""

    step: Int[Array, ""]  # optimizer steps applied
    params: Params  # what is trained: the weights, or the LoRA tree
    opt_state: Any
    ema: Params  # average of params; equal to params where ema_decay is 0
    bad_updates: Int[Array, ""]  # consecutive updates skipped for non-finite gradients


class Minibatch(NamedTuple):
    """One microbatch of samples; an optimizer step sees a tuple of them."""

    keys: Key[Array, " b"]  # of the samples: their initial noise is a function of it
    data_keys: Key[Array, " b"]  # of the data draws
    cond: Cond
    records: Int[Array, " b"] | None  # data of the same captions, or None
    data_cond: Cond | None
    trajectory: Trajectory | None
    old_log_prob: Float[Array, "t b"] | None
    advantages: Float[Array, " b"] | None


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


def policy_loss(
    objective: Objective, params: Params, frozen: Params, reference: Params, item
) -> tuple[Float[Array, ""], Metrics]:
    """Policy term and KL of one microbatch at one trained step."""
    transition, old, advantages, cond = item
    weights = objective.policy
    step = _step(objective, params, frozen, transition, cond)
    log_prob = objective.score(step, transition.x_s)
    # "exact": each sample is used once, so the old policy is this one by definition.
    if weights.old_log_prob == "exact":
        old = jax.lax.stop_gradient(log_prob)
    loss, metrics = clipped_surrogate(log_prob, old, advantages, weights.clip_range)
    if weights.term == "reinforce":
        loss, _ = reinforce(log_prob, advantages)
    total = weights.weight * loss
    if weights.kl_weight:
        base, base_frozen = reference
        other = _step(objective, base, base_frozen, transition, cond)
        kl = jnp.mean(step_kl(step.mean, jax.lax.stop_gradient(other.mean), step.std))
        total = total + weights.kl_weight * kl
        metrics = metrics | {"kl": kl}
    return total, metrics | {"loss": loss}


def data_loss(
    objective: Objective, params: Params, frozen: Params, item
) -> tuple[Float[Array, ""], Metrics]:
    """The data term of one microbatch: diffusion loss on captioned data."""
    assert objective.source is not None, "a data term needs data"
    keys, data_keys, records, cond, time = item
    draw = jax.vmap(lambda k: jax.random.split(k, 4))(data_keys)
    x0 = objective.source.latents(records, draw[:, 0])
    if objective.data.levels == "rollout":
        eps = initial_noise(keys, objective.latent_shape)
    else:
        eps = initial_noise(draw[:, 2], objective.latent_shape)
        time = _own_time(objective.data.time, draw[:, 1])
    dropped = jax.vmap(jax.random.uniform)(draw[:, 3]) < objective.data.text_dropout
    cond = _drop_text(cond, objective.uncond, dropped)
    t = time.reshape(-1, *(1,) * (x0.ndim - 1))
    prediction = objective.apply(params, frozen, (1 - t) * x0 + t * eps, time, cond)
    each = denoising_loss(prediction, x0, eps, time, objective.data.weighting)
    loss = jnp.mean(each)
    return objective.data.weight * loss, {"loss": loss}


def make_update(objective: Objective, tx: optax.GradientTransformation, ema: float):
    """Returns update(state, frozen, reference, chunks) -> (state, metrics), not jitted.

    Args:
      objective: terms and weights.
      tx: the optimizer.
      ema: decay of the average of the weights; 0 keeps a copy.
    """

    def update(state: TrainState, frozen: Params, reference: Params, chunks):
        grads = jax.tree.map(jnp.zeros_like, state.params)
        metrics: Metrics = {}
        if objective.policy.weight:
            loss = lambda p, i: policy_loss(objective, p, frozen, reference, i)  # noqa: E731
            items = policy_items(chunks)
            grads, found = accumulate(loss, state.params, items, grads)
            metrics |= {f"policy/{k}": v for k, v in found.items()}
        if objective.data.weight:
            loss = lambda p, i: data_loss(objective, p, frozen, i)  # noqa: E731
            items = _data_items(objective, chunks)
            grads, found = accumulate(loss, state.params, items, grads)
            metrics |= {f"data/{k}": v for k, v in found.items()}
        return apply_gradients(state, grads, tx, ema, metrics)

    return update


def accumulate(loss, params: Params, items: Any, grads: Params):
    """Adds the mean gradient over the leading axis of `items` to `grads`.

    Returns:
      The gradients and the mean of each metric (the maximum of those named *_max_*).
    """
    count = jax.tree.leaves(items)[0].shape[0]

    def body(total, item):
        (_, metrics), grad = jax.value_and_grad(loss, has_aux=True)(params, item)
        return jax.tree.map(lambda a, g: a + g / count, total, grad), metrics

    grads, metrics = jax.lax.scan(body, grads, items)
    reduce = {k: jnp.max if "_max_" in k else jnp.mean for k in metrics}
    return grads, {k: reduce[k](v) for k, v in metrics.items()}


def apply_gradients(
    state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    decay: float,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """One optimizer step; with a non-finite gradient the state stays as it was."""
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)
    bad = state.bad_updates
    new = TrainState(state.step + 1, params, opt_state, ema, jnp.zeros_like(bad))
    old = state._replace(bad_updates=bad + 1)
    chosen = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return chosen, metrics | {"grad_norm": norm}


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state around `params` (jit it with out_shardings)."""
    ema = jax.tree.map(jnp.copy, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), ema, jnp.zeros((), jnp.int32))


def make_advantages(config: Any):
    """Returns advantages(values, valid, group, index, tracker) -> (adv [b], tracker).

    Per reward normalised, then averaged by weight (the tracker sums first, as DDPO
    does), divided by beta, transformed and clipped; 0 where the reward is missing.

    Args:
      config: the whole configuration.
    """
    weights, adv = dict(config.rewards.weights), config.advantages
    groups, total_weight = config.prompts.per_epoch, sum(weights.values())

    def normalized(rewards, group, valid):
        if adv.kind == "batch":
            return batch_normalized(rewards, valid, epsilon=adv.epsilon)
        return group_normalized(
            rewards, group, valid, num_groups=groups, std=adv.std, epsilon=adv.epsilon
        )

    def advantages(values, valid, group, index, tracker: PerPromptTracker):
        if adv.kind == "tracker":
            total = jnp.asarray(sum(w * values[n] for n, w in weights.items()))
            found, tracker = tracker.update(
                index, total, valid, adv.tracker_min, epsilon=adv.epsilon
            )
        else:
            each = {n: normalized(values[n], group, valid) for n in weights}
            found = sum(w * each[n] for n, w in weights.items()) / total_weight
        kind = config.policy.transform
        found = reward_transform(found / config.policy.beta, kind, group, valid, groups)
        found = clip_advantages(found, adv.clip) if adv.clip else found
        return jnp.where(valid, found, 0.0), tracker

    return advantages


def make_recompute(objective: Objective):
    """Returns recompute(params, frozen, chunk) -> log_prob [t b] of the chunk's steps.

    It runs the update's own shapes without gradients: the old log-probability of
    `old_log_prob="recompute"`, and one side of the start-up self-test.
    """

    def recompute(params: Params, frozen: Params, chunk: Minibatch):
        def body(_, item):
            transition, _, _, cond = item
            step = _step(objective, params, frozen, transition, cond)
            return None, objective.score(step, transition.x_s)

        return jax.lax.scan(body, None, policy_items((chunk,)))[1]

    return recompute


def _step(objective: Objective, params, frozen, transition, cond):
    """The stored transition's distribution under `params`.

    The network is rematerialised: its forward pass then compiles to the rollout's own
    program, where one that also keeps residuals fuses and rounds differently. That is
    what makes the on-policy ratio exactly 1; it costs one more forward pass.
    """
    apply = jax.checkpoint(objective.apply)
    policy = objective.guide(lambda z, time, c: apply(params, frozen, z, time, c))
    return replay_step(policy, objective.kernel, transition, cond)


def _own_time(kind: str, keys: Array) -> Float[Array, " b"]:
    if kind == "uniform":
        return jax.vmap(jax.random.uniform)(keys)
    return jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys))


def _drop_text(cond: Cond, uncond: Cond, dropped: Array) -> Cond:
    def drop(c, u):
        return jnp.where(dropped.reshape(-1, *(1,) * (c.ndim - 1)), u, c)

    return jax.tree.map(drop, cond, uncond)


def _stack(chunks: tuple[Minibatch, ...]) -> Any:
    """Microbatches as the rollout made them -> one with leaves [m b ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)


def policy_items(chunks: tuple[Minibatch, ...]) -> tuple:
    """(transition, old log-prob, advantages, cond) for each (step, microbatch)."""
    batch = _stack(chunks)
    steps = batch.old_log_prob.shape[1]
    by_step = jax.tree.map(
        lambda a: jnp.moveaxis(a, 1, 0).reshape(-1, *a.shape[2:]),
        (batch.trajectory, batch.old_log_prob),
    )
    shared = jax.tree.map(
        lambda a: jnp.concatenate([a] * steps), (batch.advantages, batch.cond)
    )
    return (*by_step, *shared)


def _data_items(objective: Objective, chunks: tuple[Minibatch, ...]) -> tuple:
    """(keys, data keys, records, cond, time): once a sample, or at every trained step.

    The loss is a mean over the items, so its weight does not depend on their number.
    With the rollout's levels the steps of a sample share one picture and its initial
    noise, as the released DDRL code does; with levels of its own each step draws anew.
    """
    batch = _stack(chunks)
    parts = (batch.keys, batch.data_keys, batch.records, batch.data_cond)
    time = jnp.zeros((1, *batch.records.shape), jnp.float32)
    if batch.trajectory is not None:
        time = jnp.moveaxis(_network_times(objective.kernel, batch.trajectory), 1, 0)
    steps = time.shape[0] if objective.data.every_step else 1
    keys, data_keys, records, cond = jax.tree.map(
        lambda a: jnp.concatenate([a] * steps), parts
    )
    if objective.data.levels == "own" and steps > 1:
        step = jnp.arange(data_keys.size).reshape(data_keys.shape)
        data_keys = jax.vmap(jax.vmap(jax.random.fold_in))(data_keys, step)
    times = time[:steps].reshape(-1, time.shape[-1])
    return keys, data_keys, records, cond, times


def _network_times(kernel: Kernel, trajectory: Trajectory) -> Float[Array, "m t b"]:
    """The rollout's noise levels as the network's time."""
    t = trajectory.time[..., 0]
    like = jnp.zeros((t.size, 1), jnp.float32)
    return kernel.to_network(like, t.reshape(-1))[1].reshape(t.shape)
