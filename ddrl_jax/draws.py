"""What an epoch works on, drawn by (seed, epoch): samples, records, trained steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ddrl_jax.data.prompts import choose_records, draw_prompts, records_by_prompt
from ddrl_jax.interfaces import Kernel, Prompts
from ddrl_jax.learner import Minibatch, kept_samples
from ddrl_jax.program import Program
from ddrl_jax.sharding import held_rows, place_batch, place_fetched
from ddrl_jax.terms import WEIGHTED


def prompts_of(program: Program, epoch: int) -> Prompts:
    """The prompts of an epoch, counted from 0."""
    config = program.config
    return draw_prompts(
        program.prompts,
        config.seed,
        epoch,
        config.prompts.per_epoch,
        config.prompts.group_size,
    )


def draw_chunks(
    program: Program,
    prompts: Prompts,
    epoch: int,
    inner: int,
    samples: np.ndarray | None = None,
) -> list[Minibatch]:
    """The samples of a pass in chunks, a microbatch a device, without trajectories yet.

    Arguments as `each_chunk`, which draws them one at a time.
    """
    return list(each_chunk(program, prompts, epoch, inner, samples))


def each_chunk(
    program: Program,
    prompts: Prompts,
    epoch: int,
    inner: int,
    samples: np.ndarray | None = None,
) -> Iterator[Minibatch]:
    """The chunks of a pass, each drawn when it is asked for.

    Args:
      program: the run.
      prompts: of the epoch.
      epoch: from 0.
      inner: pass over the epoch's samples; each draws other data and data noise.
      samples: which of the epoch's, by number; None is all of them.
    """
    rows_of = _rows_of(program, prompts, epoch, inner, samples)
    draw = epoch * program.config.train.inner_epochs + inner
    records, captions = draw_records(program, prompts.index, draw)
    source = program.objective.source  # None without a data term: nothing is read
    fetch = source.fetch if source else None
    weights = _data_weights(program, rows_of, samples)
    for rows, weight in zip(rows_of, weights, strict=True):
        data = records[rows]
        if fetch is not None:
            data = place_fetched(program.mesh, data, fetch)
        chunk = program.prepare(
            epoch, inner, rows, prompts.index[rows], data, captions[rows]
        )
        yield chunk._replace(data_weights=weight)
    if source is not None and source.announce is not None:
        source.announce(_next_batches(program, prompts, epoch, inner, samples))


def sample_order(config: Any, epoch: int, inner: int, count: int) -> np.ndarray:
    """The order [count] in which a pass takes an epoch's samples, whatever the mesh.

    Each pass has an order of its own, but the first one of a surrogate takes them as
    they come: its microbatches are then those of the rollout and the ratio is exact.
    RWR has no ratio, and samples come prompt after prompt: its first pass mixes them
    too. Of sparse RWR the selection has spread them already, and what only fills up
    chunks stays where it is: how much that is depends on the mesh.

    Args:
      config: the whole configuration.
      epoch: from 0.
      inner: pass over the samples, from 0.
      count: of the samples.
    """
    in_place = inner == 0 and config.policy.term != "rwr"
    if in_place or config.train.minibatches == 1:  # one minibatch has no order
        return np.arange(count, dtype=np.int32)
    random = np.random.default_rng([config.seed, 5, epoch, inner])
    if config.policy.term != "sparse_rwr":
        return random.permutation(count).astype(np.int32)
    order, kept = np.arange(count, dtype=np.int32), _kept_places(config, count)
    order[kept] = random.permutation(kept)
    return order


def data_weights(config: Any, count: int) -> np.ndarray:
    """Weights [count] of sparse RWR's samples in the data term, of mean 1 an update.

    Those that it keeps weigh alike, and those that fill up chunks nothing.

    Args:
      config: the whole configuration.
      count: samples that are fitted, those that fill up included.
    """
    weights = np.zeros(count, np.float32)
    weights[_kept_places(config, count)] = 1.0
    each = weights.reshape(config.train.minibatches, -1)
    share = each.mean(axis=1, keepdims=True)  # 0 where there are fewer than updates
    return (each / np.where(share > 0, share, 1.0)).reshape(-1)


def _data_weights(
    program: Program, rows_of: np.ndarray, samples: np.ndarray | None
) -> list[Any]:
    """`data_weights` of each chunk, where there are chosen samples and a data term."""
    if samples is None or not program.config.data_term.weight:
        return [None] * len(rows_of)
    weights = data_weights(program.config, rows_of.size).reshape(rows_of.shape)
    return [place_batch(program.mesh, part) for part in weights]


def _kept_places(config: Any, count: int) -> np.ndarray:
    """Where of all that is fitted those are that sparse RWR keeps, dealt in turn."""
    parts = config.train.minibatches
    dealt = np.arange(count, dtype=np.int32).reshape(parts, -1).T.reshape(-1)
    return dealt[: kept_samples(config)]


def _rows_of(
    program: Program,
    prompts: Prompts,
    epoch: int,
    inner: int,
    samples: np.ndarray | None,
) -> np.ndarray:
    """Numbers [chunks b] of the samples of each chunk."""
    if samples is None:
        samples = np.arange(len(prompts.index), dtype=np.int32)
    if inner:  # the first draw is rolled out, and changes places only when it is fitted
        samples = samples[sample_order(program.config, epoch, inner, len(samples))]
    return samples.reshape(-1, program.chunk)


def _next_batches(
    program: Program, prompts: Prompts, epoch: int, inner: int, samples
) -> list[np.ndarray]:
    """The records that this process fetches after those of a draw."""
    train = program.config.train
    if samples is None and program.config.policy.term == "sparse_rwr":
        return []  # the same draw again, of samples that are not chosen yet
    if inner + 1 == train.inner_epochs:
        epoch, inner, samples = epoch + 1, -1, None
        if epoch == train.epochs:
            return []
        prompts = prompts_of(program, epoch)
    inner += 1
    draw = epoch * train.inner_epochs + inner
    records, _ = draw_records(program, prompts.index, draw)
    held = held_rows(program.mesh, program.chunk)
    rows_of = _rows_of(program, prompts, epoch, inner, samples)
    return [records[rows][held] for rows in rows_of]


def draw_records(
    program: Program, prompt_index: np.ndarray, draw: int, heldout: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A record for each sample, and the row of its caption in the table of captions.

    Args:
      program: the run.
      prompt_index: [b] prompt of each sample.
      draw: number of this draw, another one for each pass over the samples.
      heldout: of the records that training never sees, where there are any.
    """
    seed, own = program.config.seed, program.captions
    if own is not None:
        total = len(own.of_record)
        first, last = (own.training, total) if heldout else (0, own.training)
        first = first if first < last else 0
        random = np.random.default_rng([seed, 3, draw])
        records = random.integers(first, last, len(prompt_index)).astype(np.int32)
        return records, own.of_record[records]
    if not program.records_of and not heldout:
        return np.zeros_like(prompt_index), prompt_index
    records_of = program.records_of
    if not records_of:
        assert program.source is not None, "no data to draw from"
        records_of = records_by_prompt(program.prompts, program.source.captions)
    return choose_records(prompt_index, records_of, seed, draw), prompt_index


def draw_trained_steps(
    config: Any, kernel: Kernel, epoch: int, samples: int
) -> np.ndarray:
    """Step indices [t samples] trained this epoch, ascending for each sample.

    config.policy.train_on names them; else train_steps of the noisy ones are drawn by
    (seed, epoch), the same for all samples or, with per_sample_steps, for each. Only
    these are kept of a rollout, so that every pass over its samples trains the same;
    DDPO keeps the whole trajectory and draws anew for each pass (train_steps 0 is all
    of them here too).
    """
    policy = config.policy
    if policy.term in WEIGHTED:  # fits the samples: no transition is kept
        return np.zeros((0, samples), np.int32)
    noisy = np.flatnonzero(kernel.stochastic)
    if policy.train_on:
        steps = np.array(policy.train_on, np.int32)
        return np.repeat(np.sort(steps)[:, None], samples, 1)
    # Without a policy term fewer may be noisy: an evaluation may roll out all the same.
    count = min(policy.train_steps or len(noisy), len(noisy))
    random = np.random.default_rng([config.seed, 4, epoch])
    draws = samples if policy.per_sample_steps else 1
    keys = random.random((len(noisy), draws))
    chosen = np.sort(noisy[np.argsort(keys, axis=0)[:count]], axis=0)
    return np.broadcast_to(chosen, (count, samples)).astype(np.int32)
