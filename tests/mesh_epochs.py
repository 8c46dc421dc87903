"""An update of a whole program on a mesh, for tests that compare meshes."""

import jax
import numpy as np
from tiny_runs import (
    DIFFUSION,
    chunks_with_trajectories,
    flat_source,
    perturbed_state,
    tiny_program,
)

from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.sharding import to_host

EDITS = {
    "train.microbatch": 1,  # a device: the same shapes on one and on eight
    "train.minibatches": 1,
    "sampler.guidance_scale": 3.0,
    "data_term.weight": 0.5,
    "data_term.every_step": True,
    "policy.kl_weight": 0.1,
}
# Of the policy alone: each further term compiles the UNet's derivatives once more.
DIFFUSED = DIFFUSION | {
    "train.microbatch": 1,
    "sampler.guidance_scale": 3.0,
    "sampler.steps": 2,
    # Adam's 1e-8 would make a step of the rounding of a gradient that is nearly 0.
    "optimizer.eps": 1e-5,
}


def epoch(**mesh):
    """Of the emoji model: what `epoch_of` returns."""
    return epoch_of(EDITS | {"mesh.data": 1} | mesh, flat_source())


def diffused_epoch(**edits):
    """Of Stable Diffusion's UNet: what `epoch_of` returns."""
    return epoch_of(DIFFUSED | edits, None)


def epoch_of(edits, source):
    """(program, state, trajectory, images, state after, metrics) of an update."""
    program = tiny_program(edits, source)
    state = perturbed_state(program)
    before = to_host((state.params, state.opt_state))
    c = program.config.prompts
    prompts = draw_prompts(program.prompts, 0, 0, c.per_epoch, c.group_size)
    chunks = tuple(chunks_with_trajectories(program, state, prompts))
    images = [to_host(program.decode(c.trajectory.x_s[-1])) for c in chunks]
    after, metrics = program.update(state, program.frozen, program.reference, chunks)
    parts = [to_host(c.trajectory) for c in chunks]
    trajectory = jax.tree.map(lambda *rows: np.concatenate(rows, axis=1), *parts)
    return program, before, trajectory, np.concatenate(images), after, to_host(metrics)


def compare(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
