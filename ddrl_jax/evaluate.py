"""Evaluation on fixed prompts and fixed noise, with the averaged weights."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddrl_jax.data.prompts import choose_records, records_by_prompt
from ddrl_jax.diffusion.schedules import flow_sigmas
from ddrl_jax.diffusion.solvers import solve
from ddrl_jax.interfaces import Cond, DataSource
from ddrl_jax.learner import TrainState
from ddrl_jax.metrics import Metrics
from ddrl_jax.objectives.data import denoising_loss
from ddrl_jax.pictures import grid
from ddrl_jax.program import Program, draw_trained_steps
from ddrl_jax.rewards.diversity import diversity
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rewards.registry import make_rewards
from ddrl_jax.rewards.retrieval import load_judge
from ddrl_jax.rollout import guided, initial_noise
from ddrl_jax.sharding import place_batch

NOISE_STREAM = 2_000_003  # folded into the seed: evaluation noise is never trained on
DATA_STREAM = 2_000_029  # augmentation and noise of the held-out data loss


class Evaluation:
    """The same prompts and noise at every call; one jit for samples, one for the loss.

    Args:
      program: the run.
    """

    def __init__(self, program: Program):
        config = program.config
        self.program, self.count = program, config.evaluate.samples
        self.index = np.arange(self.count, dtype=np.int32) % len(program.prompts)
        self.text = tuple(program.prompts[i] for i in self.index)
        names = tuple(config.rewards.weights) + tuple(config.rewards.heldout)
        self.judges = make_rewards(config.rewards, self.text, names=names)
        self.features = load_judge().features if _is_emoji(config) else None
        self._sample = make_sampler(program, config.evaluate, config.evaluate.solver)
        source = program.source
        self._loss = _make_data_loss(program, source) if source else None

    def run(self, state: TrainState, metrics: Metrics, epoch: int) -> dict[str, float]:
        """Samples, judges, writes a picture grid; returns the metrics of the epoch."""
        params, config = state.ema, self.program.config
        images = self.sample(params)
        values = self.judged(images)
        if self._loss is not None and config.evaluate.data_samples:
            values["data/heldout_loss"] = self.data_loss(params)
        shown = config.evaluate.pictures
        if shown:
            upscale = max(1, 128 // images.shape[1])
            picture = grid(images[:shown], _columns(shown), upscale, self.text[:shown])
            metrics.images(epoch, "evaluation", picture)
        return values

    def sample(self, params: Any) -> np.ndarray:
        """Pictures uint8 [b h w c] of the evaluation prompts."""
        root = jax.random.fold_in(
            jax.random.key(self.program.config.seed), NOISE_STREAM
        )
        chunks = [
            self._sample(params, self.program.frozen, *part)
            for part in chunks_of(self.program, root, self.index)
        ]
        return np.concatenate(jax.device_get(chunks))[: self.count]

    def judged(self, images: np.ndarray) -> dict[str, float]:
        """Every judge's mean and the diversity of the pictures."""
        config, values = self.program.config, {}
        r = config.rewards
        with RewardPool(self.judges, r.threads, r.timeout, "error") as pool:
            found = pool.collect([pool.submit(images, self.text)]).values
        for name, scores in found.items():
            place = "evaluation" if name in config.rewards.weights else "heldout"
            values[f"{place}/{name}/mean"] = float(np.mean(scores))
        if self.features is not None:
            found = diversity(np.asarray(self.features(images)), self.index)
            values |= {f"diversity/{k}": float(v) for k, v in found.items()}
        return values

    def data_loss(self, params: Any) -> float:
        """Diffusion loss on pictures, times and noise that training never draws."""
        program, loss = self.program, self._loss
        assert loss is not None and program.source is not None, "no data to judge by"
        count = program.config.evaluate.data_samples
        index = np.arange(count, dtype=np.int32) % len(program.prompts)
        records_of = program.records_of or records_by_prompt(
            program.prompts, program.source.captions
        )
        records = choose_records(index, records_of, program.config.seed, -1 % 2**31)
        root = jax.random.fold_in(jax.random.key(program.config.seed), DATA_STREAM)
        losses = [
            loss(params, program.frozen, *part, place_batch(program.mesh, rows))
            for part, rows in zip(
                chunks_of(program, root, index),
                _padded(records, program.config.train.microbatch),
                strict=True,
            )
        ]
        return float(np.mean(np.concatenate(jax.device_get(losses))[:count]))


def make_sampler(program: Program, settings: Any, solver: str):
    """Returns sample(params, frozen, keys, cond) -> uint8 images.

    Args:
      program: the run.
      settings: with `steps` and `guidance_scale` (config.evaluate or config.sample).
      solver: "euler" or "heun" for the deterministic ODE, or "rollout": the sampler of
        training with its noise, steps and guidance, whatever `settings` say.
    """
    if solver == "rollout":
        return _rollout_sampler(program)
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
        x0 = solve(lambda z, t: policy(z, t, cond), noise, times, solver)
        return pipeline.decode(x0)

    return sample


def _rollout_sampler(program: Program):
    """The compiled rollout of training itself; the steps it keeps are not read."""
    config = program.config
    kept = draw_trained_steps(config, program.kernel, 0, config.train.microbatch)
    unread = place_batch(program.mesh, np.ascontiguousarray(kept), axis=1)

    def sample(params, frozen, keys, cond: Cond):
        return program.rollout(params, frozen, keys, cond, unread)[0]

    return sample


def evaluate_mode(config: Any, workdir: str) -> None:
    """--mode=evaluate: judges the newest checkpoint of WORKDIR, prints the values."""
    from ddrl_jax.checkpoint import Checkpoints
    from ddrl_jax.program import build
    from ddrl_jax.resume import start
    from ddrl_jax.workdir import open_workdir

    home = open_workdir(workdir, config, exclusive=False)
    program = build(config)
    checkpoints = Checkpoints(home.checkpoints, 0, 1, read_only=True)
    epoch, state, _ = start(program, checkpoints)
    log = config.log.copy_and_resolve_references()
    log.tensorboard = log.wandb = False
    with Metrics(home, log) as metrics:
        values = Evaluation(program).run(state, metrics, epoch)
    print(f"epoch {epoch}")
    for name, value in sorted(values.items()):
        print(f"{name:32s} {value:.5g}")


def _make_data_loss(program: Program, source: DataSource):
    objective = program.objective

    @jax.jit
    def loss(params, frozen, keys, cond: Cond, records):
        draw = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        x0 = source.latents(records, draw[:, 0])
        time = jax.vmap(jax.random.uniform)(draw[:, 1])
        eps = initial_noise(draw[:, 2], objective.latent_shape)
        t = time.reshape(-1, *(1,) * (x0.ndim - 1))
        out = objective.apply(params, frozen, (1 - t) * x0 + t * eps, time, cond)
        return denoising_loss(out, x0, eps, time, objective.data.weighting)

    return loss


def chunks_of(
    program: Program, root: jax.Array, index: np.ndarray
) -> Iterator[tuple[jax.Array, Cond]]:
    """(keys, cond) of each microbatch; the last one is filled up with repeats.

    Args:
      program: the run.
      root: key of the stream; sample i draws from it folded with i.
      index: prompt of each sample.
    """
    size = program.config.train.microbatch
    for number, rows in enumerate(_padded(index, size)):
        sample = number * size + jnp.arange(size)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, sample)
        cond = jax.tree.map(lambda t, r=rows: t[r], program.cond_table)
        yield place_batch(program.mesh, (keys, cond))


def _padded(index: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in groups of `size`, the last one filled up from the beginning."""
    total = -(-len(index) // size) * size
    return list(np.resize(index, total).reshape(-1, size))


def _columns(count: int) -> int:
    return min(count, 8)


def _is_emoji(config: Any) -> bool:
    return config.model.name == "emoji"
