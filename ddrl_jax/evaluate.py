"""Evaluation on fixed prompts and fixed noise, with the averaged weights."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.diffusion.schedules import flow_sigmas
from ddrl_jax.diffusion.solvers import solve
from ddrl_jax.distributed import is_main, own_share, whole_scores
from ddrl_jax.draws import draw_records, draw_trained_steps
from ddrl_jax.finite import finite_rows, leave_out
from ddrl_jax.interfaces import Cond, DataSource, Reward
from ddrl_jax.learner import TrainState
from ddrl_jax.matmul_precision import in_matmul_precision
from ddrl_jax.metrics import Metrics
from ddrl_jax.objectives.data import noised, prediction_loss
from ddrl_jax.pictures import grid, save_png
from ddrl_jax.program import Program
from ddrl_jax.rewards.diversity import diversity
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rewards.registry import check_rewards, make_rewards
from ddrl_jax.rewards.retrieval import load_judge
from ddrl_jax.rollout import guided, initial_noise, rollout, step_times
from ddrl_jax.sharding import place_batch, place_fetched, to_host
from ddrl_jax.terms import draw_times

_Part = TypeVar("_Part")
NOISE_STREAM = 2_000_003  # folded into the seed: evaluation noise is never trained on
DATA_STREAM = 2_000_029  # augmentation and noise of the held-out data loss


class Stopped(Exception):
    """An evaluation that was asked to end has ended, and found nothing."""


class Evaluation:
    """The same prompts and noise at every call; one jit for samples, one for the loss.

    Args:
      program: the run.
      judges: the rewards of weights and heldout.
      stop: asked before each chunk whether to end, then with `Stopped`; all processes
        have to get the same answer.
    """

    def __init__(
        self,
        program: Program,
        judges: dict[str, Reward],
        stop: Callable[[], bool] = lambda: False,
    ):
        config, self._stop = program.config, stop
        self.program, self.count = program, config.evaluate.samples
        self.index = np.arange(self.count, dtype=np.int32) % len(program.prompts)
        self.text = tuple(program.prompts[i] for i in self.index)
        self.judges = judges
        self.features = _features(config)
        self._sample = make_sampler(program, config.evaluate, config.evaluate.solver)
        source = program.source
        self._loss = _make_data_loss(program, source) if source else None

    def run(self, state: TrainState, metrics: Metrics, epoch: int) -> dict[str, float]:
        """Samples, judges, writes a picture grid; returns the metrics of the epoch."""
        values, picture = self.judge(state)
        if picture is not None:
            metrics.images(epoch, "evaluation", picture)
        return values

    def judge(self, state: TrainState) -> tuple[dict[str, float], np.ndarray | None]:
        """Samples and judges the average; returns the metrics and a picture grid."""
        params, config = state.average, self.program.config
        (images, finite), picture = self.sample(params), None
        values = self.judged(images, finite)
        if self._loss is not None and config.evaluate.data_samples:
            values["data/heldout_loss"] = self.data_loss(params)
        if shown := config.evaluate.pictures:
            upscale = max(1, 128 // images.shape[1])
            picture = grid(images[:shown], _columns(shown), upscale, self.text[:shown])
        return values, picture

    def sample(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [b h w c] of the evaluation prompts; which are finite [b]."""
        root = jax.random.fold_in(
            jax.random.key(self.program.config.seed), NOISE_STREAM
        )
        frozen = self.program.frozen
        if self.program.config.evaluate.solver == "rollout":
            params, frozen = self.program.sampling(params, frozen)
        parts = chunks_of(self.program, root, self.index)
        chunks = []
        for part in self._unless_stopped(parts):
            # Waited for, or the answer would be that of the beginning.
            chunks.append(jax.block_until_ready(self._sample(params, frozen, *part)))
        images, finite = map(np.concatenate, zip(*to_host(chunks), strict=True))
        return images[: self.count], finite[: self.count]

    def judged(
        self, images: np.ndarray, finite: np.ndarray | None = None
    ) -> dict[str, float]:
        """Every judge's mean and the diversity of the pictures; None: all finite."""
        config, values = self.program.config, {}
        r = config.rewards
        with RewardPool(self.judges, r.threads, r.timeout, r.on_failure) as pool:
            rows = own_share(self.count)
            # in the portions of training, where each process has its part of a chunk:
            # a judge's time limit is that of a portion
            size = max(1, self.program.chunk // jax.process_count())
            parts = [rows[i : i + size] for i in range(0, len(rows), size)]
            texts = [[self.text[i] for i in part] for part in parts]
            calls = [
                pool.submit(images[p], t) for p, t in zip(parts, texts, strict=True)
            ]
            found = whole_scores(pool.collect(calls, rows), rows, self.count)
        finite = np.ones(self.count, bool) if finite is None else finite
        found = leave_out(found, finite, r.on_failure)
        for name, scores in found.values.items():
            place = "evaluation" if name in config.rewards.weights else "heldout"
            values |= _mean(f"{place}/{name}", scores)
        if self.features is not None and finite.any():
            features = np.asarray(self.features(images[finite]))
            found = diversity(features, self.index[finite])
            values |= {f"diversity/{k}": float(v) for k, v in found.items()}
        return values

    def _unless_stopped(self, parts: Iterator[_Part]) -> Iterator[_Part]:
        for part in parts:
            if self._stop():
                raise Stopped
            yield part

    def data_loss(self, params: Any) -> float:
        """Diffusion loss on pictures, times and noise that training never draws."""
        program, loss = self.program, self._loss
        assert loss is not None and program.source is not None, "no data to judge by"
        count = program.config.evaluate.data_samples
        index = np.arange(count, dtype=np.int32) % len(program.prompts)
        records, captions = draw_records(program, index, -1 % 2**31, heldout=True)
        table = program.captions.table if program.captions else None
        fetch = program.source.fetch
        root = jax.random.fold_in(jax.random.key(program.config.seed), DATA_STREAM)
        size, losses = program.chunk, []
        rows = captions if program.captions is None or table else np.zeros_like(records)
        parts = chunks_of(program, root, rows, table)
        parts = self._unless_stopped(parts)
        for part, numbers in zip(parts, _padded(records, size), strict=True):
            mesh = program.mesh
            data = (
                place_batch(mesh, numbers)
                if fetch is None
                else place_fetched(mesh, numbers, fetch)
            )
            losses.append(loss(params, program.frozen, *part, data))
        return float(np.mean(np.concatenate(to_host(losses))[:count]))


def _mean(name: str, scores: np.ndarray) -> dict[str, float]:
    """The mean of what one judge has judged [b], and of how much that is unless of all.

    NaN are failures and pictures that are none (only with rewards.on_failure "mask").
    Those of another judge leave nothing out here: training needs them all, a mean not.
    """
    judged = np.isfinite(scores)
    if judged.all():
        return {f"{name}/mean": float(np.mean(scores))}
    share = {f"{name}/valid": float(np.mean(judged))}
    if not judged.any():  # it has no mean
        return share
    return share | {f"{name}/mean": float(np.mean(scores[judged]))}


def make_sampler(program: Program, settings: Any, solver: str):
    """Returns sample(params, frozen, keys, cond) -> (uint8 images, which are finite).

    Args:
      program: the run.
      settings: with `steps` and `guidance_scale` (config.evaluate or config.sample).
      solver: "euler" or "heun" for the deterministic ODE of a flow network, "ddim" for
        the same of any network, or "rollout": the sampler of training with its noise,
        steps and guidance, whatever `settings` say.
    """
    if solver == "rollout":
        return _rollout_sampler(program)
    if solver == "ddim":
        return _ddim_sampler(program, settings)
    apply, pipeline = program.objective.apply, program.pipeline
    times = flow_sigmas(settings.steps, program.config.sampler.shift)

    @jax.jit
    def sample(params, frozen, keys, cond: Cond):
        policy = guided(
            lambda z, time, c: apply(params, frozen, z, time, c),
            pipeline.uncond,
            settings.guidance_scale,
        )
        noise = initial_noise(keys, pipeline.latent_shape)
        return solve(lambda z, t: policy(z, t, cond), noise, times, solver)

    return lambda *inputs: _shown(program, sample(*inputs))


def _shown(program: Program, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    return program.decode(x0), finite_rows(x0)


def _ddim_sampler(program: Program, settings: Any):
    """DDIM with eta 0 (arXiv 2010.02502, Eq. 12)."""
    objective, pipeline = program.objective, program.pipeline
    sampler = program.config.sampler.copy_and_resolve_references()
    sampler.update(kernel="ddim", eta=0.0, steps=settings.steps)
    kernel = make_kernel(sampler, pipeline.prediction)
    size = program.chunk
    times = place_batch(program.mesh, step_times(kernel, size), axis=1)
    unread = place_batch(program.mesh, np.zeros((0, size), np.int32), axis=1)

    @jax.jit
    def sample(params, frozen, keys, cond: Cond, times, unread):
        policy = guided(
            lambda z, time, c: objective.apply(params, frozen, z, time, c),
            pipeline.uncond,
            settings.guidance_scale,
        )
        shape, score = pipeline.latent_shape, objective.score
        return rollout(policy, kernel, score, keys, cond, shape, times, unread)[0]

    return lambda *inputs: _shown(program, sample(*inputs, times, unread))


def _rollout_sampler(program: Program):
    """The compiled rollout of training itself; the steps it keeps are not read."""
    config = program.config
    kept = draw_trained_steps(config, program.kernel, 0, program.chunk)
    unread = place_batch(program.mesh, np.ascontiguousarray(kept), axis=1)

    def sample(params, frozen, keys, cond: Cond):
        found = program.rollout(params, frozen, keys, cond, unread)
        return found.images, finite_rows(found.x0)

    return sample


@in_matmul_precision
def evaluate_mode(config: Any, workdir: str) -> None:
    """--mode=evaluate: judges the newest checkpoint of WORKDIR, prints the values.

    Nothing of the run is changed: the pictures go to WORKDIR/evaluations/EPOCH.png, or
    EPOCH_2.png and so on where there are some. Keys that are not as in the run, but for
    those of config.evaluate, are named on stderr.

    Raises:
      UserError: the folder holds no run, or weights would be drawn from another seed.
    """
    from ddrl_jax.checkpoint import Checkpoints
    from ddrl_jax.program import build
    from ddrl_jax.resume import drawn_from, start
    from ddrl_jax.workdir import open_workdir, tell_differences

    home = open_workdir(workdir, config, exclusive=False)
    checkpoints = Checkpoints(home.checkpoints, 0, 1, read_only=True)
    tell_differences(home, config, ("evaluate.",), drawn_from(config, checkpoints))
    # Before the large model: a file or server that is missing is told at once.
    judges = make_rewards(config.rewards)
    check_rewards(judges)
    program = build(config, judges)
    if is_main() and checkpoints.latest() is None:
        print(f"{home.root} has no checkpoint: its first weights", file=sys.stderr)
    epoch, state, *_ = start(program, checkpoints)
    values, picture = Evaluation(program, judges).judge(state)
    if not is_main():
        return
    print(f"epoch {epoch}")
    for name, value in sorted(values.items()):
        print(f"{name:32s} {value:.5g}")
    if picture is not None:
        print(f"pictures: {save_png(_unused(home.evaluations, epoch), picture)}")


def _unused(folder: Path, epoch: int) -> Path:
    """EPOCH.png, or with the first number that is not taken: nothing is replaced."""
    names = (f"{epoch:06d}{f'_{n}' if n > 1 else ''}.png" for n in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _make_data_loss(program: Program, source: DataSource):
    objective, captions = program.objective, program.captions
    own_text = source.cond if captions and captions.table is None else None

    @jax.jit
    def loss(params, frozen, keys, cond: Cond, records):
        cond = own_text(records) if own_text else cond
        draw = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        x0 = source.latents(records, draw[:, 0])
        time = draw_times("uniform", draw[:, 1], objective.prediction)
        eps = initial_noise(draw[:, 2], objective.latent_shape)
        z = noised(x0, eps, time, objective.prediction)
        out = objective.apply(params, frozen, z, time, cond)
        weighting = objective.data.weighting
        return prediction_loss(out, x0, eps, time, weighting, objective.prediction)

    return loss


def chunks_of(
    program: Program,
    root: jax.Array,
    index: np.ndarray,
    table: Cond | None = None,
) -> Iterator[tuple[jax.Array, Cond]]:
    """(keys, cond) of each chunk; the last one is filled up with repeats.

    Args:
      program: the run.
      root: key of the stream; sample i draws from it folded with i.
      index: row of each sample's text in the table.
      table: of embeddings; None: those of the prompts.
    """
    table = program.cond_table if table is None else table
    size = program.chunk
    for number, rows in enumerate(_padded(index, size)):
        sample = number * size + jnp.arange(size)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, sample)
        cond = jax.tree.map(lambda t, r=rows: t[r], table)
        yield place_batch(program.mesh, (keys, cond))


def _padded(index: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in groups of `size`, the last one filled up from the beginning."""
    total = -(-len(index) // size) * size
    return list(np.resize(index, total).reshape(-1, size))


def _columns(count: int) -> int:
    return min(count, 8)


def _features(config: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """What the diversity is measured by; None where no judge reads such pictures."""
    if config.model.name != "emoji":
        return None
    judge = load_judge()
    return judge.features if config.model.image_size == judge.size else None
