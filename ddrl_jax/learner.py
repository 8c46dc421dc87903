"""TrainState and its one jitted update: accumulate, apply, average.

    loss = policy_weight * policy term + kl_weight * step KL + data_weight * data term

A term of weight 0 is not traced. Gradients are taken inside the body of a scan over
(trained step x microbatch) and summed in float32; the state is donated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ddrl_jax.interfaces import Metrics, Params
from ddrl_jax.objectives.advantages import (
    PerPromptTracker,
    batch_normalized,
    clip_advantages,
    combine,
    group_normalized,
)
from ddrl_jax.objectives.data import (
    heaviest,
    rwr_weights,
    sparse_rwr_count,
    sparse_rwr_weights,
)
from ddrl_jax.objectives.policy import reward_transform
from ddrl_jax.optim import add_updates
from ddrl_jax.terms import (
    MAXIMA,
    WEIGHTED,
    Items,
    Minibatch,
    Objective,
    data_items,
    data_loss,
    fit_items,
    fit_loss,
    policy_items,
    policy_loss,
    policy_step,
)


class TrainState(NamedTuple):
    """Everything an update changes; all of it is in every checkpoint."""

    step: Int[Array, ""]  # optimizer steps applied
    params: Params  # what is trained: the weights, or the LoRA tree
    opt_state: Any
    ema: Params | None  # average of params; None where ema_decay is 0
    bad_updates: Int[Array, ""]  # consecutive updates skipped for non-finite gradients

    @property
    def average(self) -> Params:
        """What is evaluated, sampled and exported: the average, or the weights."""
        return self.params if self.ema is None else self.ema


def make_update(objective: Objective, tx: optax.GradientTransformation, ema: float):
    """Returns update(state, frozen, reference, chunks) -> (state, metrics), not jitted.

    Args:
      objective: terms and weights.
      tx: the optimizer.
      ema: decay of the average of the weights; 0: there is none.
    """

    def update(state: TrainState, frozen: Params, reference: Params, chunks):
        zeros = lambda p: jnp.zeros_like(p, jnp.float32)  # noqa: E731
        grads = jax.tree.map(zeros, state.params)
        metrics: Metrics = {}
        if objective.policy.weight and objective.policy.term in WEIGHTED:
            loss = lambda p, i: fit_loss(objective, p, frozen, i)  # noqa: E731
            grads, found = accumulate(loss, state.params, fit_items(chunks), grads)
            metrics |= {f"policy/{k}": v for k, v in found.items()}
        elif objective.policy.weight:
            loss = lambda p, i: policy_loss(objective, p, frozen, reference, i)  # noqa: E731
            items = policy_items(chunks)
            grads, found = accumulate(loss, state.params, items, grads)
            metrics |= {f"policy/{k}": v for k, v in found.items()}
        if objective.data.weight:
            loss = lambda p, i: data_loss(objective, p, frozen, i)  # noqa: E731
            items = data_items(objective, chunks)
            grads, found = accumulate(loss, state.params, items, grads)
            metrics |= {f"data/{k}": v for k, v in found.items()}
        return apply_gradients(state, grads, tx, ema, metrics)

    return update


def accumulate(loss, params: Params, items: Items, grads: Params):
    """Adds the mean gradient over `items` to `grads`.

    Returns:
      The gradients and the mean of each metric, of those of MAXIMA the largest.
    """
    count = items.index.size

    def body(total, index):
        item = items.at(index)
        (_, metrics), grad = jax.value_and_grad(loss, has_aux=True)(params, item)
        add = lambda a, g: a + g.astype(a.dtype) / count  # noqa: E731
        return jax.tree.map(add, total, grad), metrics

    grads, metrics = jax.lax.scan(body, grads, items.index)
    reduce = {k: jnp.max if k in MAXIMA else jnp.mean for k in metrics}
    return grads, {k: reduce[k](v) for k, v in metrics.items()}


def apply_gradients(
    state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    decay: float,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """One optimizer step; with a non-finite gradient the state stays as it was.

    The metrics get `grad_norm`; `bad_leaf`, the number of the first leaf whose squared
    norm is not finite (-1: none, the number of leaves: only the sum of all is not); and
    `bad_updates`, how many updates in a row were skipped.
    """
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    norm = jnp.sqrt(jnp.sum(squares))
    good, finite = jnp.isfinite(norm), jnp.isfinite(squares)
    first = jnp.where(jnp.all(finite), finite.size, jnp.argmin(finite))
    bad_leaf = jnp.where(good, -1, first).astype(jnp.int32)

    def apply(state: TrainState, grads: Params) -> TrainState:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = add_updates(state.params, updates, state.step)
        # wide before the product: in bfloat16 1 - decay and decay add up to 1.001
        wide = lambda p: p.astype(jnp.float32)  # noqa: E731
        average = lambda a, p: decay * a + (1 - decay) * wide(p)  # noqa: E731
        ema = jax.tree.map(average, state.ema, params) if decay else None
        zero = jnp.zeros_like(state.bad_updates)
        return TrainState(state.step + 1, params, opt_state, ema, zero)

    def skip(state: TrainState, _: Params) -> TrainState:
        return state._replace(bad_updates=state.bad_updates + 1)

    # A branch works in the donated buffers; choosing leaf by leaf afterwards would keep
    # the old state beside the new one.
    state = jax.lax.cond(good, apply, skip, state, grads)
    metrics = metrics | {"grad_norm": norm, "bad_leaf": bad_leaf}
    return state, metrics | {"bad_updates": state.bad_updates}


def init_state(
    params: Params, tx: optax.GradientTransformation, decay: float
) -> TrainState:
    """A fresh state around `params` (jit it with out_shardings).

    Args:
      params: what is trained.
      tx: the optimizer.
      decay: of the average of the weights; 0: there is none.
    """
    # Of narrow weights the average is float32: its steps are far below their spacing.
    wide = lambda p: jnp.array(p, jnp.float32)  # noqa: E731
    ema = jax.tree.map(wide, params) if decay else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), ema, jnp.zeros((), jnp.int32))


def make_advantages(config: Any):
    """Returns advantages(values, valid, group, index, tracker) -> (adv [b], tracker).

    Per reward normalised, then averaged by weight (the tracker sums first, as DDPO
    does), divided by beta, transformed and clipped; 0 where the reward is missing.
    "neg_exp_centered" is centred over what `advantages.kind` normalises over: the
    group, or else the whole epoch.

    Args:
      config: the whole configuration.
    """
    if config.policy.term in WEIGHTED:
        return _make_weights(config)
    weights, adv = dict(config.rewards.weights), config.advantages
    groups, by_group = config.prompts.per_epoch, adv.kind == "group"

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
            found = combine(each, weights)
        kind = config.policy.transform
        ids = group if by_group else None  # else a group may be a single sample
        found = reward_transform(found / config.policy.beta, kind, ids, valid, groups)
        found = clip_advantages(found, adv.clip) if adv.clip else found
        return jnp.where(valid, found, 0.0), tracker

    return advantages


def _make_weights(config: Any):
    """Weights of RWR in place of advantages: of the whole epoch, or a prompt's own.

    A sample without a reward weighs 0 and counts in no rank; the weights of a set have
    mean 1.
    """
    table, policy = dict(config.rewards.weights), config.policy
    shape = (_weighed_sets(config), -1)  # softmax and percentile of each

    def weights(values, valid, group, index, tracker: PerPromptTracker):
        total = jnp.asarray(sum(w * values[n] for n, w in table.items()))
        total, there = total.reshape(shape), jnp.asarray(valid).reshape(shape)
        if policy.term == "rwr":
            found = rwr_weights(total, policy.rwr_inverse_temperature, there)
        else:
            found = sparse_rwr_weights(total, policy.rwr_percentile, there)
        return found.reshape(-1), tracker

    return weights


def make_selection(config: Any, chunk: int):
    """Returns select(weights [b], x0) -> (rows [k], weights [k], x0 [k *x]).

    Of sparse RWR only what weighs something is fitted: as many samples as the
    percentile keeps. Minibatches get the rows in turn, so that each has its share of
    the best of every prompt, and are filled up to whole chunks by rows of weight 0:
    the size of a chunk does not change what is fitted.

    Args:
      config: the whole configuration.
      chunk: samples of one call.
    """
    parts, kept = config.train.minibatches, kept_samples(config)
    room = -(-kept // (parts * chunk)) * parts * chunk
    sets = _weighed_sets(config)

    def select(weights, x0: tuple):
        found = heaviest(weights.reshape(sets, -1), kept, room)
        rows, weights = (x.reshape(-1, parts).T.reshape(-1) for x in found)
        return rows, weights, jnp.concatenate(x0)[rows]

    return select


def kept_samples(config: Any) -> int:
    """How many samples of an epoch sparse RWR fits, where all have a reward."""
    sets, prompts = _weighed_sets(config), config.prompts
    size = prompts.per_epoch * prompts.group_size // sets
    return sets * sparse_rwr_count(size, config.policy.rwr_percentile)


def _weighed_sets(config: Any) -> int:
    """In how many sets RWR weighs an epoch's samples: each prompt's, or one of all."""
    return config.prompts.per_epoch if config.advantages.kind == "group" else 1


def make_recompute(objective: Objective):
    """Returns recompute(params, frozen, chunk) -> log_prob [t b] of the chunk's steps.

    It runs the update's own shapes without gradients: the old log-probability of
    `old_log_prob="recompute"`, and one side of the start-up self-test.
    """

    def recompute(params: Params, frozen: Params, chunk: Minibatch):
        items = policy_items((chunk,))

        def body(_, index):
            transition, _, _, cond = items.at(index)
            step = policy_step(objective, params, frozen, transition, cond)
            return None, objective.score(step, transition.x_s)

        return jax.lax.scan(body, None, items.index)[1]

    return recompute
