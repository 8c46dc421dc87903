"""Every reward by its name in the configuration. A new one is one line of REWARDS."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards.aesthetic import aesthetic
from ddrl_jax.rewards.alignment import vlm_alignment, vlm_questions
from ddrl_jax.rewards.clip_folder import RewardNetworks
from ddrl_jax.rewards.clip_score import clip_score
from ddrl_jax.rewards.compressibility import compressibility, incompressibility
from ddrl_jax.rewards.preference import hpsv2, pickscore
from ddrl_jax.rewards.retrieval import Retrieval, RetrievalLogProb, load_judge

# A random CLIP of a few thousand weights that transformers wrote, and a random head.
TINY = Path(__file__).parent.parent / "assets" / "tiny_clip"


def _place(name: str, file: str = "") -> str:
    """A folder, file or repository; "assets" is the tiny one that ships for :smoke."""
    return str(TINY / file) if name == "assets" else name


# name -> (rewards section of the configuration, networks of the run) -> Reward
REWARDS: dict[str, Callable[[Any, RewardNetworks], Reward]] = {
    "compressibility": lambda config, _: compressibility(config.jpeg_upscale),
    "incompressibility": lambda config, _: incompressibility(config.jpeg_upscale),
    "aesthetic": lambda config, networks: aesthetic(
        _place(config.aesthetic_head, "head.safetensors"),
        _place(config.clip),
        networks.clip,
    ),
    "clip_score": lambda config, networks: clip_score(
        _place(config.clip), networks.clip
    ),
    "pickscore": lambda config, networks: pickscore(
        _place(config.pickscore), _place(config.clip_h), networks.clip
    ),
    "hpsv2": lambda config, _: hpsv2(config.hpsv2, _place(config.clip_h)),
    "vlm_alignment": lambda config, _: vlm_alignment(config),
    "vlm_questions": lambda config, _: vlm_questions(config),
    "retrieval": lambda *_: Retrieval(load_judge()),
    "retrieval_log_prob": lambda *_: RetrievalLogProb(load_judge()),
}


def make_rewards(
    config: Any, *, names: Sequence[str] | None = None
) -> dict[str, Reward]:
    """Builds the rewards that a configuration names; networks they share are one.

    Args:
      config: the `rewards` section.
      names: which to build; None means all of weights and heldout.

    Returns:
      name -> Reward, in the order of the names.

    Raises:
      UserError: a name is unknown, or files of a reward are missing or damaged.
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
    networks = RewardNetworks()
    return {name: REWARDS[name](config, networks) for name in dict.fromkeys(names)}


def check_rewards(rewards: Mapping[str, Reward]) -> None:
    """Asks rewards that live elsewhere whether they can answer, before a rollout.

    Raises:
      UserError: a server is unreachable, refuses, or has no such model.
    """
    for reward in rewards.values():
        getattr(reward, "check", _nothing)()


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[str]) -> None:
    """Asks rewards whether they can judge these prompts, before a rollout.

    Raises:
      UserError: a reward does not know a prompt.
    """
    for reward in rewards.values():
        getattr(reward, "check_prompts", _nothing)(prompts)


def check_pictures(rewards: Mapping[str, Reward], shape: tuple[int, ...]) -> None:
    """Asks rewards whether they can judge pictures of this shape [h w c].

    Raises:
      UserError: a reward reads pictures of another size.
    """
    for reward in rewards.values():
        getattr(reward, "check_pictures", _nothing)(shape)


def _nothing(*_: Any) -> None:
    """Of a reward that has nothing to check."""


def counters(rewards: dict[str, Reward]) -> dict[str, float]:
    """What rewards have counted so far, as reward/NAME/COUNTER."""
    found = {}
    for name, reward in rewards.items():
        counts = getattr(reward, "counters", dict)()
        found |= {f"reward/{name}/{key}": float(n) for key, n in counts.items()}
    return found
