"""Config -> the jitted functions and values of one run; what train, evaluate and
sample share."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from ddrl_jax.check_optimizer import total_updates
from ddrl_jax.data.prompts import (
    prompt_list,
    records_by_prompt,
    require_pictures,
    require_records,
    require_room,
)
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.distributed import check_agreement, main_first, meet
from ddrl_jax.interfaces import (
    Cond,
    DataSource,
    Kernel,
    Params,
    Pipeline,
    Reward,
    Rollout,
)
from ddrl_jax.learner import (
    Minibatch,
    Objective,
    TrainState,
    make_advantages,
    make_recompute,
    make_selection,
    make_update,
)
from ddrl_jax.models.pipelines import PIPELINES
from ddrl_jax.optim import make_optimizer
from ddrl_jax.rewards.registry import check_pictures, check_prompts
from ddrl_jax.rollout import guided, make_score, rollout, step_times
from ddrl_jax.sharding import (
    BATCH,
    batch_shares,
    make_mesh,
    place_batch,
    put,
    replicated,
)
from ddrl_jax.sources import in_short, make_source
from ddrl_jax.weights import describe_weights, tell_undivided

DATA_STREAM = (
    1_000_003  # folded into the seed, so data draws never repeat rollout noise
)


class Captions(NamedTuple):
    """The data's own captions: their embeddings, once each, and each record's row."""

    table: Cond | None  # None where records bring their text along
    of_record: np.ndarray  # [records] int32
    training: int  # records before the held-out ones


class Program(NamedTuple):
    """Everything of a run but its state; the functions are jitted."""

    config: Any
    mesh: Mesh
    chunk: int  # samples a call: a microbatch for each share of the batch
    pipeline: Pipeline
    kernel: Kernel
    source: DataSource | None
    prompts: tuple[str, ...]
    records_of: tuple[np.ndarray, ...]
    cond_table: Cond
    captions: Captions | None  # where the data keeps its own captions
    objective: Objective
    frozen: Params  # the base under a LoRA; empty for full fine-tuning
    reference: Any  # (params, frozen) of the starting policy where KL is on
    new_state: Callable[[], TrainState]
    abstract_state: Callable[[], TrainState]  # shapes with shardings
    prepare: Callable  # (epoch, pass, samples, prompts, data, captions) -> Minibatch
    decode: Callable  # x0 -> uint8 images
    rollout: Callable  # (params, frozen, keys, cond, trained) -> Rollout
    sampling: Callable  # (params, frozen) -> the same as config.rollout lays them out
    recompute: Callable
    advantages: Callable  # (values, valid, group, index, tracker) -> (adv, tracker)
    select: Callable  # of sparse RWR: (weights, x0) -> (samples, weights, x0)
    update: Callable  # (state, frozen, reference, chunks) -> (state, metrics)
    refresh: Callable[[TrainState], TrainState]  # new moments and schedule, donated


def build(config, judges: Mapping[str, Reward] | None = None) -> Program:
    """Builds a run from a checked config; loads the starting weights.

    Args:
      config: the whole configuration.
      judges: of the run's pictures, asked whether they can judge what there will be.

    Raises:
      UserError: prompts or data can not be used or differ between processes, or a
        judge can not read a prompt or the pictures.
    """
    mesh = make_mesh(config.mesh)
    meet(mesh)
    pipeline = PIPELINES[config.model.name](config, mesh)
    kernel = make_kernel(config.sampler, pipeline.prediction)
    source = main_first(lambda: make_source(config, pipeline))
    check_agreement(in_short(source))
    captions = source.captions if source else ()
    prompts = prompt_list(config.prompts, captions, config.seed)
    _check_judges(config, pipeline, judges or {}, prompts)
    # Before the weights: a prompt that can not be read is an error without a wait. And
    # before its pictures: what a model does not know, it can not make samples of.
    cond_table = _encoded(pipeline, prompts, mesh)
    records = _records_of(config, source, prompts)
    trained_on = source if config.data_term.weight > 0 else None
    objective = make_objective(config, pipeline, kernel, trained_on, mesh)
    tx = make_optimizer(config.optimizer, total_updates(config))
    decode = _make_decode(pipeline, mesh)
    own = _own_captions(config, pipeline, source, mesh)
    weights = describe_weights(config, pipeline, tx, mesh)
    tell_undivided(weights)
    frozen = weights.frozen()
    return Program(
        config=config,
        mesh=mesh,
        chunk=chunk_size(config, mesh),
        pipeline=pipeline,
        kernel=kernel,
        source=source,
        prompts=prompts,
        records_of=records,
        cond_table=cond_table,
        captions=own,
        objective=objective,
        frozen=frozen,
        reference=weights.reference(frozen),
        new_state=weights.new_state,
        abstract_state=lambda: weights.abstract,
        prepare=_make_prepare(config, mesh, cond_table, own, trained_on),
        decode=decode,
        rollout=_make_rollout(config, mesh, objective, decode),
        sampling=weights.sampling(),
        recompute=jax.jit(make_recompute(objective)),
        advantages=jax.jit(make_advantages(config)),
        select=jax.jit(make_selection(config, chunk_size(config, mesh))),
        update=jit_update(config, objective, tx, weights.abstract),
        refresh=_make_refresh(tx, weights.abstract),
    )


def _make_refresh(tx: optax.GradientTransformation, abstract: TrainState) -> Callable:
    return jax.jit(
        lambda state: state._replace(opt_state=tx.init(state.params)),
        donate_argnames="state",
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )


def _check_judges(config, pipeline: Pipeline, judges, prompts: tuple[str, ...]) -> None:
    """Those trained on see every prompt, all of them the prompts of an evaluation."""
    trained = config.rewards.weights if config.policy.weight else ()
    check_prompts({n: judges[n] for n in trained if n in judges}, prompts)
    check_prompts(judges, prompts[: config.evaluate.samples])
    latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), "float32")
    check_pictures(judges, jax.eval_shape(pipeline.decode, latents).shape[1:])


def _records_of(config, source, prompts: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """The records of each prompt, where the data term is that of the prompts.

    Without a data term none are kept, but the evaluations have to find some.
    """
    if source is None or config.data_term.captions == "own":
        return ()
    if config.data_term.weight > 0:
        return records_by_prompt(prompts, source.captions)
    if config.evaluate.data_samples:
        require_pictures(prompts, source.captions)
    return ()


def _make_decode(pipeline: Pipeline, mesh: Mesh) -> Callable:
    """x0 -> images; a decoder's weights are put on the mesh once, and are arguments."""
    # a plain function becomes a Partial without leaves
    placed = put(Partial(pipeline.decode), replicated(mesh))
    return partial(jax.jit(lambda decode, x0: decode(x0)), placed)


def jit_update(config, objective: Objective, tx, state: TrainState) -> Callable:
    """The update of the run, jitted; `state` says where each leaf lives."""
    states = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        make_update(objective, tx, config.optimizer.ema_decay),
        donate_argnames="state",
        out_shardings=(states, None),
    )


def chunk_size(config, mesh: Mesh) -> int:
    """Samples of one call: equal microbatches, one for each share of the batch.

    As long as train.microbatch sets its size, and not the number of devices, a device
    computes the same shapes on every data mesh: the samples are the same to the bit.
    """
    c, shares = config.prompts, batch_shares(mesh)
    minibatch = c.per_epoch * c.group_size // config.train.minibatches
    return shares * min(config.train.microbatch, minibatch // shares)


def make_apply(config, pipeline: Pipeline, mesh: Mesh) -> Callable:
    """(trainable, frozen, z, time, cond) -> prediction, for LoRA and full tuning.

    Over several devices its inputs and output are pinned to the batch's layout: what
    the partitioner then does inside does not depend on whether it serves the rollout,
    the replay or the gradient, so they round alike.
    """
    if config.lora.rank:
        apply = lambda t, frozen, *inputs: pipeline.denoise(frozen, t, *inputs)  # noqa: E731
    else:
        apply = lambda t, frozen, *inputs: pipeline.denoise(t, None, *inputs)  # noqa: E731
    if mesh.size == 1:
        return apply
    by_batch = NamedSharding(mesh, P(BATCH))
    pin = partial(jax.lax.with_sharding_constraint, shardings=by_batch)
    return lambda t, frozen, *inputs: pin(apply(t, frozen, *pin(inputs)))


def make_objective(config, pipeline, kernel, source, mesh) -> Objective:
    """The static description of the loss, from config.policy and config.data_term."""
    scale = config.sampler.guidance_scale
    return Objective(
        apply=make_apply(config, pipeline, mesh),
        guide=lambda policy: guided(policy, pipeline.uncond, scale),
        kernel=kernel,
        score=make_score(config.policy.log_prob, config.policy.reduction),
        policy=config.policy,
        data=config.data_term,
        source=source,
        uncond=pipeline.uncond,
        latent_shape=pipeline.latent_shape,
        prediction=pipeline.prediction,
    )


def _encoded(
    pipeline: Pipeline, texts: tuple[str, ...], mesh: Mesh, what: str = "prompts"
) -> Cond:
    """Embeddings on every device; more than that can hold are refused before."""
    each = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.uncond))
    require_room(len(texts), each, what)
    return put(pipeline.encode(texts), replicated(mesh))


def _own_captions(config, pipeline: Pipeline, source, mesh: Mesh) -> Captions | None:
    if source is None or config.data_term.captions == "prompt":
        return None
    unique = tuple(dict.fromkeys(source.captions))
    row = {caption: i for i, caption in enumerate(unique)}
    rows = np.array([row[caption] for caption in source.captions], np.int32)
    require_records(len(rows), config.data.heldout)
    table = None
    if source.cond is None:
        table = _encoded(pipeline, unique, mesh, "captions of the data")
    return Captions(table, rows, len(rows) - config.data.heldout)


def _make_prepare(config, mesh: Mesh, cond_table: Cond, own, source):
    data_table = cond_table if own is None else own.table
    own_text = source.cond if source is not None and data_table is None else None

    @jax.jit
    def draw(scalars, sample, index, data, captions, table, data_table):
        epoch, inner = scalars
        root = jax.random.key(config.seed)
        stream = jax.random.fold_in(jax.random.fold_in(root, DATA_STREAM), inner)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = fold(jax.random.fold_in(root, epoch), sample)
        data_keys = fold(jax.random.fold_in(stream, epoch), sample)
        cond = jax.tree.map(lambda t: t[index], table)
        pair = (None, None)
        if source is not None:
            rows = jax.tree.map(lambda t: t[captions], data_table)
            pair = (data, own_text(data) if own_text else rows)
        return Minibatch(keys, data_keys, cond, *pair, None, None, None)

    def prepare(epoch, inner, samples, index, data, captions):
        scalars = (np.int32(epoch), np.int32(inner))
        placed = place_batch(mesh, (samples, index, data, captions))
        return draw(scalars, *placed, cond_table, data_table)

    return prepare


def _make_rollout(config, mesh: Mesh, objective: Objective, decode: Callable):
    chunk = chunk_size(config, mesh)
    times = step_times(objective.kernel, chunk)
    times = place_batch(mesh, times, axis=1)
    sample = make_sample(objective)

    def run(params, frozen, keys, cond, trained) -> Rollout:
        x0, trajectory = sample(params, frozen, keys, cond, times, trained)
        return Rollout(decode(x0), trajectory, x0)

    return run


def make_sample(objective: Objective) -> Callable:
    """(params, frozen, keys, cond, times, trained) -> (x0, Trajectory), jitted."""

    @jax.jit
    def sample(params, frozen, keys, cond, times, trained):
        def denoise(z, time, c):
            return objective.apply(params, frozen, z, time, c)

        return rollout(
            objective.guide(denoise),
            objective.kernel,
            objective.score,
            keys,
            cond,
            objective.latent_shape,
            times,
            trained,
        )

    return sample
