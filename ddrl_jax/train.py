"""The training loop: sample, judge, update, log, checkpoint, evaluate."""

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.collect import Collected, collect
from ddrl_jax.config_rules import shared_settings
from ddrl_jax.distributed import check_agreement, is_main, numbers_of_main
from ddrl_jax.draws import each_chunk, sample_order
from ddrl_jax.evaluate import Evaluation, Stopped
from ddrl_jax.interfaces import Reward
from ddrl_jax.learner import Minibatch, TrainState
from ddrl_jax.matmul_precision import in_matmul_precision
from ddrl_jax.metrics import ONLY_AT_END, Metrics, ProgressBar, Timer
from ddrl_jax.metrics_file import continue_from, written_steps
from ddrl_jax.mfu import Utilization
from ddrl_jax.models.attention import WHOLE, implementations
from ddrl_jax.preemption import Preemption
from ddrl_jax.profile import Epochs, Profile
from ddrl_jax.program import Program, build
from ddrl_jax.report import write_report
from ddrl_jax.resume import samples_per_epoch, save, start
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rewards.registry import check_rewards, make_rewards
from ddrl_jax.self_test import check_ratio, check_update
from ddrl_jax.sharding import take_rows
from ddrl_jax.skipped import leaf_names, report_skipped
from ddrl_jax.terms import MAXIMA, WEIGHTED
from ddrl_jax.workdir import Workdir, open_workdir


@in_matmul_precision
def train(config: Any, workdir: str, profile: Epochs | None = None) -> None:
    """Trains, or goes on with the run that WORKDIR holds, and writes its report.

    SIGTERM saves the last whole epoch and returns; the same command continues there.

    Args:
      config: the whole configuration, checked.
      workdir: folder of the run.
      profile: first and last epoch of a profiler trace, if any.

    Raises:
      UserError: whatever the user can fix, before any training where possible.
    """
    with open_workdir(workdir, config) as home, Preemption() as stop:
        # Before the large model: a file or server that is missing is told at once.
        rewards = make_rewards(config.rewards)
        check_rewards(rewards)
        program = build(config, rewards)
        if is_main():
            print(attention_line(program), file=sys.stderr, flush=True)
        checkpoints = Checkpoints(
            home.checkpoints, config.checkpoint.every, config.checkpoint.keep
        )
        try:
            run(program, rewards, home, checkpoints, stop, profile)
        finally:
            checkpoints.close()
            if program.source and program.source.announce:
                program.source.announce(())  # nothing more is read ahead
        if is_main() and not stop.agreed:
            print(f"report: {write_report(home)}", flush=True)


def run(
    program: Program,
    rewards: dict[str, Reward],
    home: Workdir,
    checkpoints: Checkpoints,
    stop: Preemption,
    profile: Epochs | None = None,
) -> None:
    """The loop itself, from the newest checkpoint to the last epoch."""
    config = program.config
    begin = start(program, checkpoints)
    if begin.line and begin.epoch in numbers_of_main(written_steps(home)):
        begin = begin._replace(line=None)  # by an earlier start from this checkpoint
    epoch, state, tracker, line = begin
    if epoch >= config.train.epochs and line is None:
        if is_main():
            print(f"{home.root}: all {epoch} epochs are done", flush=True)
        return
    if is_main():
        moved = continue_from(home, begin.written)
        if moved and not epoch:
            said = f"{home.root} has no checkpoint: it begins anew, and its {moved} "
            said += f"lines of metrics are kept in {home.discarded.name}"
            print(said, file=sys.stderr, flush=True)
    if config.policy.weight and config.policy.term not in WEIGHTED:
        check_ratio(program, state)
    evaluation, timer = Evaluation(program, rewards, stop.agree), Timer()
    utilization = Utilization(program)
    with (
        make_pool(program, rewards) as pool,
        Metrics(home, config.log, resume_step=begin.written) as metrics,
        ProgressBar(config.train.epochs, config.log.progress, epoch) as bar,
        Profile(home.root / "profile", profile) as trace,
    ):
        if epoch == 0:
            finish(evaluation, state, metrics, 0, {}, due=True)
        if line is not None:  # saved, but not evaluated and written before the end
            due = is_due(config, epoch)
            line = finish(evaluation, state, metrics, epoch, line, due)
        timer.epoch()  # what came before belongs to no epoch
        while epoch < config.train.epochs and not stop.agree():
            trace.begin(epoch + 1)
            # 1. Sample, judge, turn rewards into advantages.
            bar.stage("rollout")
            batch = collect(program, state, epoch, pool, tracker, timer, stop)
            if batch is None:  # asked to stop: the epoch is dropped and drawn again
                break
            check_epoch(program, state, batch, epoch)
            # 2. Update.
            bar.stage("update")
            with timer("update"):
                state, values = update_epoch(program, state, batch, epoch)
            tracker, epoch = batch.tracker, epoch + 1
            # 3. Log.
            values |= batch.metrics | timer.epoch()
            values |= speeds(config, values, epoch)
            values |= utilization(batch.chunks, values)
            del batch  # its trajectories, before the next ones are collected
            # 4. Save, with the line still to be written: what follows may fail.
            last = epoch == config.train.epochs
            with timer.aside():
                save(checkpoints, epoch, state, tracker, program, last, values)
            # 5. Evaluate; after a notice the restart does: the time left may be short.
            with timer.aside():
                due = is_due(config, epoch)
                line = finish(evaluation, state, metrics, epoch, values, due)
            if line is not None:
                break
            bar.update(epoch, values)
        # before the writers close: a notice leaves little time, and that may fail
        save(checkpoints, epoch, state, tracker, program, force=True, line=line)
    if stop.agree():
        checkpoints.wait()
        if is_main():
            say_goodbye(stop, epoch)


def attention_line(program: Program) -> str:
    """Says with which attention the network runs: what "auto" stood for here."""

    def batch(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((program.chunk, *shape), dtype)

    names = implementations(
        program.objective.apply,
        program.abstract_state().params,
        program.frozen,
        batch(program.pipeline.latent_shape),
        batch(()),
        jax.tree.map(lambda c: batch(c.shape[1:], c.dtype), program.cond_table),
    )
    context = program.mesh.shape["context"]
    undivided = f" of sequences that mesh.context {context} does not divide"
    said = ", ".join(name.replace(WHOLE, undivided) for name in names)
    backend = program.mesh.devices.flat[0].platform
    return f"attention: {said} ({backend}, {program.config.model.dtype})"


def say_goodbye(stop: Preemption, epoch: int) -> None:
    """Says which epoch a stopped run goes on from."""
    cause = stop.signal_name or "a signal to another process"
    kept = f"epoch {epoch} is saved" if epoch else "no epoch is done yet"
    text = f"{cause}: {kept}; the same command goes on from there"
    print(text, file=sys.stderr, flush=True)


def check_epoch(
    program: Program, state: TrainState, batch: Collected, epoch: int
) -> None:
    """Stops the run where a process works on something else than the others.

    Raises:
      UserError: names the process and its host.
    """
    check_agreement(
        {
            "the configuration": shared_settings(program.config),
            "the prompts": batch.prompts.text,
            "the optimizer step": int(state.step),
            "the epoch": epoch,
        }
    )


def update_epoch(
    program: Program, state: TrainState, batch: Collected, epoch: int
) -> tuple[TrainState, dict[str, float | int]]:
    """All optimizer steps of an epoch; one transfer of their metrics at its end.

    Raises:
      UserError: too many were skipped, or the first one was not on policy.
    """
    config = program.config
    if config.optimizer.fresh:
        state = program.refresh(state)
    per_update = len(batch.chunks) // config.train.minibatches
    history = []
    for inner in range(config.train.inner_epochs):
        each_of = _redrawn if inner else _in_order
        chunks = each_of(program, batch, epoch, inner)
        while part := tuple(islice(chunks, per_update)):
            state, metrics = program.update(
                state, program.frozen, program.reference, part
            )
            history.append(metrics)
            del part  # before the next one is drawn
    history = jax.device_get(history)
    report_skipped(history, leaf_names(state.params), config.train.nan_limit, epoch + 1)
    values = _summary(history)
    # The stand-in of a sample that is NaN may be computed elsewhere in its batch.
    if "reward/not_finite" not in batch.metrics:
        check_update(config, values, epoch + 1)
    return state, values


def finish(
    evaluation: Evaluation,
    state: TrainState,
    metrics: Metrics,
    epoch: int,
    values: dict[str, Any],
    due: bool,
) -> dict[str, Any] | None:
    """Evaluates an epoch where it is due, and writes its metrics.

    Returns:
      None; the metrics, not written, where the evaluation was asked to stop.
    """
    try:
        found: dict[str, Any] = {}
        found |= evaluation.run(state, metrics, epoch) if due else {}
    except Stopped:
        return values
    config = evaluation.program.config
    if found and not is_usual(config, epoch):  # only the end of the run asks for it
        found[ONLY_AT_END] = tuple(found)
    metrics.write(epoch, values | found)
    return None


def is_usual(config: Any, epoch: int) -> bool:
    """Whether an epoch is one of every config.evaluate.every, or the beginning."""
    every = config.evaluate.every
    return epoch == 0 or bool(every and epoch % every == 0)


def is_due(config: Any, epoch: int) -> bool:
    """Whether an epoch is evaluated: the usual ones, and the last of the run."""
    return epoch == config.train.epochs or is_usual(config, epoch)


def make_pool(program: Program, rewards: dict[str, Reward]) -> RewardPool:
    """The trained rewards on their threads."""
    config, r = program.config, program.config.rewards
    trained = {n: rewards[n] for n in r.weights} if config.policy.weight else {}
    return RewardPool(trained, r.threads, r.timeout, r.on_failure)


def speeds(config: Any, values: dict, epoch: int) -> dict[str, float]:
    """Samples per second of the epoch and samples seen so far."""
    count = samples_per_epoch(config)
    return {
        "samples_per_second": count / values["time/epoch"],
        "samples_seen": epoch * count,
    }


def _in_order(
    program: Program, batch: Collected, epoch: int, inner: int
) -> Iterator[Minibatch]:
    """The chunks as they were drawn, whole samples in the order of this pass.

    Only those of RWR change places, which keep nothing along the steps.
    """
    size = program.chunk
    order = sample_order(program.config, epoch, inner, len(batch.chunks) * size)
    if np.array_equal(order, np.arange(len(order))):
        yield from batch.chunks
        return
    for rows in order.reshape(-1, size):
        yield take_rows(program.mesh, batch.chunks, rows)


def _redrawn(
    program: Program, batch: Collected, epoch: int, inner: int
) -> Iterator[Minibatch]:
    """The same rollouts with new data draws, in the order of this pass.

    A chunk at a time: no second copy of the trajectories is on the devices.
    """
    size = program.chunk
    order = sample_order(program.config, epoch, inner, len(batch.chunks) * size)
    in_place = np.array_equal(order, np.arange(len(order)))
    by_step = [(chunk.trajectory, chunk.old_log_prob) for chunk in batch.chunks]
    # with the prompt rolled out: that of a stand-in is not the one drawn for its place
    each = [(chunk.cond, chunk.advantages, chunk.x0) for chunk in batch.chunks]
    fresh = each_chunk(program, batch.prompts, epoch, inner, batch.samples)
    for number, new in enumerate(fresh):
        steps, rest = by_step[number], each[number]
        if not in_place:
            rows = order[number * size : (number + 1) * size]
            steps = take_rows(program.mesh, by_step, rows, axis=1)
            rest = take_rows(program.mesh, each, rows)
        (trajectory, old), (cond, advantages, x0) = steps, rest
        yield new._replace(
            cond=cond,
            trajectory=trajectory,
            old_log_prob=old,
            advantages=advantages,
            x0=x0,
        )


def _summary(history: list[dict]) -> dict[str, float | int]:
    """Means over the epoch's updates; what tells whether the first one was on policy
    is that of the first, the count of skipped updates in a row that of the last."""
    names = [name for name in history[0] if name != "bad_leaf"]
    values = {k: float(np.mean([m[k] for m in history])) for k in names}
    values["bad_updates"] = float(history[-1]["bad_updates"])
    first = {f"policy/{name}" for name in MAXIMA} & values.keys()
    return values | {key: float(history[0][key]) for key in sorted(first)}
