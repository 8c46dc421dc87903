"""Where a run begins: the newest checkpoint of its workdir, or the first epoch."""

from typing import Any

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.errors import UserError
from ddrl_jax.learner import TrainState
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.program import Program
from ddrl_jax.sharding import put, replicated


def start(
    program: Program, checkpoints: Checkpoints
) -> tuple[int, TrainState, PerPromptTracker]:
    """The state to begin with: the newest checkpoint's, or a new one."""
    config = program.config
    tracker = put(
        PerPromptTracker.init(len(program.prompts), config.advantages.tracker_size),
        replicated(program.mesh),
    )
    like = {"train": program.abstract_state(), "tracker": abstract(tracker)}
    found = checkpoints.restore(like, config.checkpoint.resume)
    if found is None:
        return 0, program.new_state(), tracker
    _check_weights(program, found.cursor)
    return found.epoch, found.state["train"], found.state["tracker"]


def save(
    checkpoints, epoch: int, state, tracker, program: Program, force: bool
) -> None:
    """Saves everything that influences the epochs to come."""
    cursor = {
        "epoch": epoch,
        "samples_seen": epoch * samples_per_epoch(program.config),
        "weights": program.pipeline.fingerprint,
    }
    if epoch:
        checkpoints.save(epoch, {"train": state, "tracker": tracker}, cursor, force)


def samples_per_epoch(config: Any) -> int:
    """Samples an epoch draws (rollouts, or data where there is no policy term)."""
    return config.prompts.per_epoch * config.prompts.group_size


def _check_weights(program: Program, cursor: dict) -> None:
    """A resumed run must stand on the weights it started from."""
    if cursor["weights"] != program.pipeline.fingerprint:
        raise UserError(
            "the checkpoint belongs to a run that started from other weights",
            got=program.pipeline.fingerprint,
            wanted=cursor["weights"],
            way_out="set config.model.init to the weights of that run, or choose "
            "another --workdir",
        )
