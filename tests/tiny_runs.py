"""Whole programs of one narrow block, for tests of what joins the parts together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from edited_config import configured

from ddrl_jax import program as program_module
from ddrl_jax.draws import draw_chunks
from ddrl_jax.interfaces import DataSource
from ddrl_jax.program import Program, build
from ddrl_jax.sharding import place_batch

WORDS = ("cat", "dog", "red apple", "shaved ice")
TINY = {
    "model.init": "random",
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.image_size": 16,
    "data.source": "none",
    "prompts.source": "list",
    "prompts.list": WORDS,
    "prompts.per_epoch": 2,
    "prompts.group_size": 4,
    "sampler.steps": 4,
    "policy.train_steps": 0,
    "train.microbatch": 4,
    "mesh.data": 1,
    "rewards.heldout": (),
    "evaluate.samples": 6,
    "evaluate.steps": 2,
    "evaluate.data_samples": 6,
    "log.tensorboard": False,
    "log.progress": False,
}
# The UNet in place of the emoji model: the tiny pipeline that diffusers wrote.
DIFFUSION = TINY | {
    "model.name": "stable_diffusion",
    "model.init": "assets",
    "model.image_size": 0,
    "sampler.kernel": "ddim",
    "sampler.steps": 3,
    "sampler.guidance_scale": 5.0,
    "evaluate.solver": "ddim",
    "rewards.jpeg_upscale": 1,
    "train.minibatches": 1,
}


def flat_source(size: int = 16, captions: tuple[str, ...] = WORDS) -> DataSource:
    """Data without files: record i is a page of the one value i / 8, key or not."""

    def latents(records, keys):
        del keys
        pages = jnp.ones((records.shape[0], size, size, 3), jnp.float32)
        return pages * (records / 8.0).astype(jnp.float32)[:, None, None, None]

    return DataSource(captions, latents)


def tiny_program(
    edits: dict[str, Any] | None = None, source: DataSource | None = None
) -> Program:
    """Builds a program from the tiny configuration with some keys changed.

    Args:
      edits: "section.key" -> value.
      source: what stands in for the data set; None is no data.
    """
    config = configured(TINY | (edits or {}))
    real, program_module.make_source = program_module.make_source, lambda *_: source
    try:
        return build(config)
    finally:
        program_module.make_source = real


def perturbed(tree: Any, scale: float = 0.05, seed: int = 3) -> Any:
    """Adds noise to every leaf: the output layers of a new network are all 0."""
    leaves, structure = jax.tree.flatten(tree)
    random = np.random.default_rng(seed)
    moved = [
        jax.device_put(
            (np.asarray(a) + scale * random.normal(size=a.shape)).astype(a.dtype),
            a.sharding,
        )
        for a in leaves
    ]
    return jax.tree.unflatten(structure, moved)


def perturbed_state(program: Program, scale: float = 0.05) -> Any:
    """A new state whose weights, and their average, are no longer the initial ones."""
    state = program.new_state()
    params = perturbed(state.params, scale)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, ema=ema)


def chunks_with_trajectories(program: Program, state: Any, prompts: Any) -> list:
    """The first epoch's chunks, rolled out at every noisy step, advantages +-1."""
    size = program.chunk
    steps = np.flatnonzero(program.kernel.stochastic).astype(np.int32)
    # placed and typed as the self-test's, so that both use the same compiled programs
    trained = place_batch(program.mesh, np.repeat(steps[:, None], size, 1), axis=1)
    chunks = []
    for number, chunk in enumerate(draw_chunks(program, prompts, 0, 0)):
        sample = number * size + jnp.arange(size)
        advantages = jnp.where(sample % 2, 1.0, -1.0).astype(jnp.float32)
        weights = program.sampling(state.params, program.frozen)
        _, trajectory, _ = program.rollout(*weights, chunk.keys, chunk.cond, trained)
        chunks.append(
            chunk._replace(
                trajectory=trajectory,
                old_log_prob=trajectory.log_prob,
                advantages=advantages,
            )
        )
    return chunks


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits in the same structure."""
    left, right = jax.tree.flatten(a), jax.tree.flatten(b)
    return left[1] == right[1] and all(
        _raw(x).tobytes() == _raw(y).tobytes()
        for x, y in zip(left[0], right[0], strict=True)
    )


def _raw(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def assert_the_network_speaks(program, state):
    """The prediction is not 0, or equal log-probs would show nothing."""
    shape = (4, *program.pipeline.latent_shape)
    z = jax.random.normal(jax.random.key(5), shape)
    cond = jax.tree.map(lambda c: c[:4], program.cond_table)
    apply = jax.jit(program.objective.apply)  # one program, not one an operation
    v = apply(state.params, program.frozen, z, jnp.linspace(0.1, 0.9, 4), cond)
    assert float(jnp.min(jnp.max(jnp.abs(v), axis=(1, 2, 3)))) > 0.1
