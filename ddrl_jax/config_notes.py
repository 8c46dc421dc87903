"""What a configuration allows and its author may not have meant: notes, no errors."""

from typing import Any

from ddrl_jax.check_optimizer import total_updates
from ddrl_jax.rewards.retrieval import SIZE
from ddrl_jax.terms import WEIGHTED

# What configs/base.py has, which says that nobody chose one
_CLIP_RANGE = 1e-4
_EVALUATION = {"steps": 10, "guidance_scale": 1.0}


def notes(config: Any) -> list[str]:
    """What is allowed and may not be what was meant, a sentence each.

    Args:
      config: checked.
    """
    found, data = [], config.data
    warmup, updates = config.optimizer.warmup, total_updates(config)
    if config.optimizer.fresh:  # then it starts anew each epoch
        updates //= config.train.epochs
    if warmup >= updates:
        found.append(
            f"optimizer.warmup {warmup} is not over within {updates} updates: the rate "
            "stays below optimizer.lr"
        )
    if config.model.name == "emoji" and config.model.image_size != SIZE:
        found.append(
            f"diversity/* is not measured: its judge reads pictures of {SIZE} pixels, "
            f"and model.image_size is {config.model.image_size}"
        )
    stored = data.source not in ("emoji", "none") and data.heldout == 0
    if stored and config.data_term.weight and config.evaluate.data_samples:
        found.append(
            "data/heldout_loss is that of the pictures trained on, with noise of its "
            "own: data.heldout is 0"
        )
    return found + _without_effect(config) + _of_the_sampler(config)


def _without_effect(config: Any) -> list[str]:
    """Keys that were set and that nothing reads, but for those that are refused.

    A file may set them for all its rows.
    """
    policy, advantages, found = config.policy, config.advantages, []
    weighted = policy.term in WEIGHTED
    if weighted and policy.clip_range != _CLIP_RANGE:
        found.append(
            f"policy.clip_range {policy.clip_range} has no effect: with policy.term "
            f'"{policy.term}" there is no ratio to clip'
        )
    if advantages.std != "group" and (weighted or advantages.kind != "group"):
        why = f'advantages.kind "{advantages.kind}"'
        why = f'policy.term "{policy.term}"' if weighted else why
        found.append(f'advantages.std "{advantages.std}" has no effect with {why}')
    return found if policy.weight else []


def _of_the_sampler(config: Any) -> list[str]:
    """Keys of an evaluation that is the sampler's own, where they say otherwise."""
    evaluate, sampler = config.evaluate, config.sampler
    if evaluate.solver != "rollout":
        return []
    return [
        f"evaluate.{key} {evaluate[key]} has no effect with evaluate.solver "
        f'"rollout", which has sampler.{key} {sampler[key]}'
        for key, unset in _EVALUATION.items()
        if evaluate[key] not in (unset, sampler[key])
    ]
