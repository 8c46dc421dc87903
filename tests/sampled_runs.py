"""Runs of the tiny network with a checkpoint, for modes that only read a run."""

from edited_config import configured
from tiny_runs import TINY, WORDS, perturbed, perturbed_state

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.program import build
from ddrl_jax.resume import save
from ddrl_jax.workdir import open_workdir

# Ten samples in microbatches of four: the last one is half empty.
EDITS = {
    "prompts.list": WORDS[:2],
    "sample.per_prompt": 5,
    "sample.steps": 2,
    "sample.guidance_scale": 1.0,
}


def settings(**edits):
    return configured(
        TINY | EDITS | {k.replace("__", "."): v for k, v in edits.items()}
    )


def no_build(*_):
    raise AssertionError("a model was built first")


def save_epoch(config, workdir, scale):
    """A workdir with a checkpoint of weights that are not the initial ones."""
    program = build(config)
    state = perturbed_state(program, scale)
    if config.lora.rank:
        state = state._replace(ema=perturbed(state.ema, 0.3))
    with open_workdir(workdir, config) as home:
        checkpoints = Checkpoints(home.checkpoints, 1, 2)
        tracker = PerPromptTracker.init(
            len(program.prompts), config.advantages.tracker_size
        )
        save(checkpoints, 1, state, tracker, program, force=True)
        checkpoints.close()
    return program, state
