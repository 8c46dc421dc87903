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
      line: metrics of the last of these epochs, which may not be evaluated and written
        yet: a notice, a kill or an error came first.
    """

    epoch: int
    state: TrainState
    tracker: PerPromptTracker
    line: dict[str, Any] | None = None

    @property
    def written(self) -> int:
        """The last epoch whose metrics stay; -1 before the first."""
        return self.epoch - (self.line is not None) if self.epoch else -1


def drawn_from(config: Any, checkpoints: Checkpoints) -> tuple[str, ...]:
    """The keys that weights depend on which are drawn anew at every start.

    Of a random start no checkpoint has the base under a LoRA, and without a checkpoint
    all weights are those that the run began with: functions of its seed.

    Args:
      config: the whole configuration.
      checkpoints: of the run that is looked at.
    """
    anew = config.lora.rank or checkpoints.latest() is None
    return ("seed",) if anew and config.model.init == "random" else ()


def start(program: Program, checkpoints: Checkpoints) -> Start:
    """The state to begin with: the newest checkpoint's, or a new one."""
    config = program.config
    tracker = put(
        PerPromptTracker.init(len(program.prompts), config.advantages.tracker_size),
        replicated(program.mesh),
    )
    like = {"train": program.abstract_state(), "tracker": abstract(tracker)}
    # A mode that only reads may look at other prompts.
    check = () if checkpoints.read_only else (partial(_check_draws, program),)
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
        "described": program.pipeline.described,
        "prompts": describe(program.prompts),
    }
    if program.source is not None:
        cursor["data"] = _data(program)
    if line is not None:  # as a text: NaN is none of JSON's values
        cursor["line"] = json.dumps({k: np.asarray(v).item() for k, v in line.items()})
    if epoch:
        checkpoints.save(epoch, {"train": state, "tracker": tracker}, cursor, force)
    if program.config.checkpoint.wait:
        checkpoints.wait()


def samples_per_epoch(config: Any) -> int:
    """Samples an epoch draws (rollouts, or data where there is no policy term)."""
    return config.prompts.per_epoch * config.prompts.group_size


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """How many prompts or captions there are, and a digest of them in order."""
    whole = hashlib.sha256(json.dumps(list(texts)).encode())
    return {"count": len(texts), "digest": whole.hexdigest()[:16]}


def _data(program: Program) -> dict[str, Any]:
    """The same of the data, with a digest of what is in the records."""
    assert program.source is not None
    return describe(program.source.captions) | {"content": program.source.digest}


def _check_draws(program: Program, cursor: dict[str, Any]) -> None:
    """The tracker's rows and the draws are those of the run's prompts and data."""
    found = {"prompts": describe(program.prompts)}
    if program.source is not None:
        found["data"] = _data(program)
    for name, now in found.items():
        saved = cursor.get(name, now)  # older checkpoints do not say
        if saved != now:
            raise UserError(
                f"the {name} of the run have changed since its checkpoint",
                got=_listed(now),
                wanted=_listed(saved),
                way_out="restore the file or the data that they come from, or choose "
                "another --workdir",
            )


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


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
    now = program.pipeline.described
    if cursor.get("described", now) != now:  # older checkpoints do not say
        raise UserError(
            "the JSON files of the starting model have changed since the checkpoint",
            got=f"sizes, scaling and prediction type of digest {now}",
            wanted=cursor["described"],
            way_out="restore the config.json files and the scheduler_config.json of "
            f"{program.config.model.init}, or choose another --workdir",
        )
