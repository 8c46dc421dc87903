"""Where a run begins: the newest checkpoint of its workdir, or the first epoch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.errors import UserError
from ddrl_jax.learner import TrainState
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.program import Program
from ddrl_jax.sharding import put, replicated


class Start(NamedTuple):
    """The state to begin with.

    Attributes:
      epoch: how many epochs are done.
      state: of the weights and the optimizer.
      tracker: of the rewards.
      line: metrics of the last of these epochs, which a notice has kept from being
        evaluated and written; None where it was.
    """

    epoch: int
    state: TrainState
    tracker: PerPromptTracker
    line: dict[str, Any] | None = None

    @property
    def written(self) -> int:
        """The last epoch whose metrics stay; -1 before the first."""
        return self.epoch - (self.line is not None) if self.epoch else -1


def start(program: Program, checkpoints: Checkpoints) -> Start:
    """The state to begin with: the newest checkpoint's, or a new one."""
    config = program.config
    tracker = put(
        PerPromptTracker.init(len(program.prompts), config.advantages.tracker_size),
        replicated(program.mesh),
    )
    like = {"train": program.abstract_state(), "tracker": abstract(tracker)}
    # A mode that only reads may look at other prompts.
    check = () if checkpoints.read_only else (partial(_check_prompts, program.prompts),)
    found = checkpoints.restore(like, config.checkpoint.resume, *check)
    if found is None:
        return Start(0, program.new_state(), tracker)
    _check_weights(program, found.cursor)
    line = json.loads(found.cursor.get("line", "null"))
    return Start(found.epoch, found.state["train"], found.state["tracker"], line)


def save(
    checkpoints,
    epoch: int,
    state,
    tracker,
    program: Program,
    force: bool,
    line: Mapping[str, Any] | None = None,
) -> None:
    """Saves what influences the epochs to come, and a line that is still to write.

    With config.checkpoint.wait it returns when that is on disk, so that a kill can not
    cost more than the epoch after it.
    """
    cursor = {
        "epoch": epoch,
        "samples_seen": epoch * samples_per_epoch(program.config),
        "weights": program.pipeline.fingerprint,
        "prompts": describe_prompts(program.prompts),
    }
    if line is not None:  # as a text: NaN is none of JSON's values
        cursor["line"] = json.dumps({k: np.asarray(v).item() for k, v in line.items()})
    if epoch:
        checkpoints.save(epoch, {"train": state, "tracker": tracker}, cursor, force)
    if program.config.checkpoint.wait:
        checkpoints.wait()


def samples_per_epoch(config: Any) -> int:
    """Samples an epoch draws (rollouts, or data where there is no policy term)."""
    return config.prompts.per_epoch * config.prompts.group_size


def describe_prompts(prompts: Sequence[str]) -> dict[str, Any]:
    """How many prompts there are, and a digest of their texts in order."""
    whole = hashlib.sha256(json.dumps(list(prompts)).encode())
    return {"count": len(prompts), "digest": whole.hexdigest()[:16]}


def _check_prompts(prompts: Sequence[str], cursor: dict[str, Any]) -> None:
    """The trackers' rows and the order of the draws are those of the run's prompts."""
    now = describe_prompts(prompts)
    saved = cursor.get("prompts", now)  # older checkpoints do not say
    if saved != now:
        raise UserError(
            "the prompts of the run have changed since its checkpoint",
            got=f"{now['count']} prompts, digest {now['digest']}",
            wanted=f"{saved['count']} prompts, digest {saved['digest']}",
            way_out="restore the file or the data that they come from, or choose "
            "another --workdir",
        )


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
