"""Every reward by its name in the configuration. A new one is one line of REWARDS."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards.aesthetic import aesthetic
from ddrl_jax.rewards.alignment import vlm_alignment, vlm_questions
from ddrl_jax.rewards.clip_score import clip_score
from ddrl_jax.rewards.compressibility import compressibility, incompressibility
from ddrl_jax.rewards.preference import hpsv2, pickscore
from ddrl_jax.rewards.retrieval import load_judge, retrieval, retrieval_log_prob

# A random CLIP of a few thousand weights that transformers wrote, and a random head.
TINY = Path(__file__).parent.parent / "assets" / "tiny_clip"


def _place(name: str, file: str = "") -> str:
    """A folder, file or repository; "assets" is the tiny one that ships for :smoke."""
    return str(TINY / file) if name == "assets" else name


# name -> (rewards section of the configuration, captions) -> Reward
REWARDS: dict[str, Callable[[Any, Sequence[str]], Reward]] = {
    "compressibility": lambda config, _: compressibility(config.jpeg_upscale),
    "incompressibility": lambda config, _: incompressibility(config.jpeg_upscale),
    "aesthetic": lambda config, _: aesthetic(
        _place(config.aesthetic_head, "head.safetensors"), _place(config.clip)
    ),
    "clip_score": lambda config, _: clip_score(_place(config.clip)),
    "pickscore": lambda config, _: pickscore(config.pickscore, config.clip_h),
    "hpsv2": lambda config, _: hpsv2(config.hpsv2, config.clip_h),
    "vlm_alignment": lambda config, _: vlm_alignment(config),
    "vlm_questions": vlm_questions,
    "retrieval": lambda _, captions: retrieval(load_judge(), captions),
    "retrieval_log_prob": lambda _, captions: retrieval_log_prob(
        load_judge(), captions
    ),
}


def make_rewards(
    config: Any,
    captions: Sequence[str] = (),
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Reward]:
    """Builds the rewards that a configuration names.

    Args:
      config: the `rewards` section: weights, heldout, jpeg_upscale.
      captions: the prompts of the run; a reward that can not judge one says so now
        instead of after the first rollout. Empty: no check.
      names: which to build; None means all of weights and heldout.

    Returns:
      name -> Reward, in the order of the names.

    Raises:
      UserError: a name is unknown, or a reward can not judge these captions.
    """
    if names is None:
        names = (*config.weights, *config.heldout)
    for name in names:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"there is no reward named {name!r}",
                got=repr(name),
                wanted=f"one of {', '.join(sorted(REWARDS))}",
                way_out=hint + "change --config.rewards.weights or"
                " --config.rewards.heldout, or add a line to REWARDS in"
                " ddrl_jax/rewards/registry.py",
            )
    return {name: REWARDS[name](config, captions) for name in dict.fromkeys(names)}


def check_rewards(rewards: dict[str, Reward]) -> None:
    """Asks rewards that live elsewhere whether they can answer, before a rollout.

    Raises:
      UserError: a server is unreachable, refuses, or has no such model.
    """
    for reward in rewards.values():
        check = getattr(reward, "check", None)
        if check is not None:
            check()


def counters(rewards: dict[str, Reward]) -> dict[str, float]:
    """What rewards have counted so far, as reward/NAME/COUNTER."""
    found = {}
    for name, reward in rewards.items():
        counts = getattr(reward, "counters", dict)()
        found |= {f"reward/{name}/{key}": float(n) for key, n in counts.items()}
    return found
