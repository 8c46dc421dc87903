"""What rewards, terms and trained steps must satisfy together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddrl_jax.config_rules import plain, require
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.terms import WEIGHTED


def check_objective(config: Any, trains: bool = True) -> None:
    """Refuses terms, rewards, advantages and steps that do not go together.

    Args:
      config: the whole configuration.
      trains: False where there need be nothing to train on.

    Raises:
      UserError: the first combination that is wrong.
    """
    _check_weights(config, trains)
    _check_rewards(config)
    # checks the ranges that depend on the kernel
    make_kernel(config.sampler, _prediction(config))
    if config.policy.weight > 0:
        _check_advantages(config)
        if config.policy.term in WEIGHTED:
            _check_weighted(config)
        else:
            _check_policy(config)
            _check_trained_steps(config)
    if config.data_term.weight > 0:
        _check_data_term(config)


def _prediction(config: Any) -> str:
    """Whose noise levels the sampler must stay in; eps stands for v too."""
    return "eps" if config.model.name == "stable_diffusion" else "velocity"


def _check_weights(config: Any, trains: bool) -> None:
    policy, data_term = config.policy, config.data_term
    require(
        not trains or policy.weight > 0 or data_term.weight > 0,
        "there is nothing to train on",
        got="policy.weight 0 and data_term.weight 0",
        wanted="at least one above 0",
        way_out="policy.weight 1 is RL, data_term.weight 1 pre-training, both DDRL",
    )
    require(
        policy.weight > 0 or policy.kl_weight == 0,
        "the KL to the starting policy is taken along rollouts, and there are none",
        got=f"policy.kl_weight {policy.kl_weight} with policy.weight 0",
        wanted="policy.weight > 0, or no KL",
        way_out="set policy.kl_weight to 0",
    )


def _check_rewards(config: Any) -> None:
    rewards = config.rewards
    trained = [name for name in rewards.weights if rewards.weights[name] > 0]
    require(
        bool(trained) or config.policy.weight == 0,
        "there is no reward to train on",
        got=f"rewards.weights {plain(rewards.weights)} with policy.weight > 0",
        wanted="at least one reward with a weight above 0",
        way_out="--config.rewards.weights=\"{'compressibility': 1.0}\"",
    )
    idle = [name for name in rewards.weights if rewards.weights[name] == 0]
    require(
        not idle or config.policy.weight == 0,
        "a reward of weight 0 would be computed for nothing",
        got=f"rewards.weights {plain(rewards.weights)}",
        wanted="weights above 0",
        way_out=f"leave out {', '.join(idle)}, or move it to rewards.heldout to have "
        "it judge the evaluations",
    )
    both = [name for name in rewards.heldout if name in trained]
    require(
        not both or config.policy.weight == 0,
        "a held-out judge is also trained on, so it judges nothing",
        got=f"{', '.join(both)} in rewards.heldout and in rewards.weights",
        wanted="different names",
        way_out="remove it from one of them",
    )


def _check_advantages(config: Any) -> None:
    advantages, prompts = config.advantages, config.prompts
    require(
        advantages.kind != "group" or prompts.group_size > 1,
        "a group of one sample has nothing to be compared with",
        got="prompts.group_size 1 with advantages.kind group",
        wanted="prompts.group_size >= 2",
        way_out="raise prompts.group_size, or advantages.kind tracker or batch",
    )
    require(
        prompts.per_epoch * prompts.group_size > 1,
        "an epoch of one sample has nothing to be compared with",
        got="prompts.per_epoch 1 and prompts.group_size 1",
        wanted="at least 2 samples an epoch",
        way_out="raise prompts.per_epoch or prompts.group_size",
    )
    require(
        advantages.kind != "tracker"
        or advantages.tracker_min <= advantages.tracker_size,
        "the reward tracker can never hold as many rewards as it waits for",
        got=f"tracker_min {advantages.tracker_min}, "
        f"tracker_size {advantages.tracker_size}",
        wanted="advantages.tracker_min <= advantages.tracker_size",
        way_out="lower tracker_min or raise tracker_size",
    )


def _check_policy(config: Any) -> None:
    policy, train = config.policy, config.train
    updates = train.inner_epochs * train.minibatches
    require(
        policy.term != "reinforce" or updates == 1,
        "REINFORCE holds for samples of the current weights: one update an epoch",
        got=f"train.minibatches {train.minibatches}, "
        f"train.inner_epochs {train.inner_epochs}",
        wanted="both 1",
        way_out='set both to 1, or policy.term to "clipped"',
    )
    require(
        policy.old_log_prob != "exact" or updates == 1,
        'policy.old_log_prob "exact" holds for samples of the current weights: one '
        "update an epoch",
        got=f"train.minibatches {train.minibatches}, "
        f"train.inner_epochs {train.inner_epochs}",
        wanted="both 1",
        way_out='set both to 1, or policy.old_log_prob to "rollout" or "recompute"',
    )
    require(
        not (policy.train_on and policy.per_sample_steps),
        "policy.train_on names the steps that policy.per_sample_steps would draw",
        got=f"train_on {tuple(policy.train_on)}, per_sample_steps True",
        wanted="one of them",
        way_out="set policy.train_on to () or policy.per_sample_steps to False",
    )
    _check_rounding(config)


def _check_rounding(config: Any) -> None:
    """A rollout by rounded weights is not on policy.

    Where the network computes in bfloat16, or all weights are kept in it, the bits may
    agree: that is for the self-test to say.
    """
    policy = config.policy
    kept = config.lora.rank == 0 and config.optimizer.master == "bfloat16"
    rounded = config.rollout.dtype == "bfloat16" and config.model.dtype == "float32"
    require(
        not rounded
        or kept
        or policy.old_log_prob != "rollout"
        or policy.ratio_tolerance > 0,
        "the rollout's log-probs are those of rounded weights: the ratio is not 1 on "
        "policy",
        got=f'rollout.dtype "{config.rollout.dtype}", model.dtype '
        f'"{config.model.dtype}", policy.old_log_prob "{policy.old_log_prob}"',
        wanted='policy.old_log_prob "recompute" with a rounded copy of the weights',
        way_out='set it so, or rollout.dtype to "float32"',
    )


def _check_weighted(config: Any) -> None:
    """RWR fits samples: what belongs to transitions has nothing to act on."""
    policy, term = config.policy, config.data_term
    require(
        policy.kl_weight == 0 and not policy.train_on,
        "RWR trains no transition of the rollout",
        got=f"policy.kl_weight {policy.kl_weight}, train_on {tuple(policy.train_on)}",
        wanted="kl_weight 0 and train_on ()",
        way_out='set them so, or policy.term to "clipped"',
    )
    require(
        policy.beta == 1 and policy.transform == "linear",
        "RWR makes weights of the rewards themselves, not of advantages",
        got=f'policy.beta {policy.beta}, transform "{policy.transform}"',
        wanted='beta 1 and transform "linear"',
        way_out="set them so; policy.rwr_inverse_temperature is what sharpens the "
        "weights",
    )
    require(
        policy.old_log_prob == "rollout",
        "RWR has no log-probs",
        got=f'policy.old_log_prob "{policy.old_log_prob}"',
        wanted='"rollout"',
        way_out='set it so, or policy.term to "clipped"',
    )
    require(
        config.advantages.kind != "tracker",
        "the weights of RWR are those of an epoch; there is no running tracker of them",
        got='advantages.kind "tracker"',
        wanted='"batch" for the whole epoch or "group" for each prompt',
        way_out="change advantages.kind",
    )
    require(
        term.weight == 0 or (term.levels == "own" and not term.every_step),
        "the data term takes noise levels from transitions, which RWR does not keep",
        got=f'data_term.levels "{term.levels}", every_step {term.every_step}',
        wanted='levels "own" and every_step False',
        way_out="change them, or set data_term.weight to 0",
    )


def _check_trained_steps(config: Any) -> None:
    sampler, policy = config.sampler, config.policy
    noisy = [
        int(i)
        for i in np.flatnonzero(make_kernel(sampler, _prediction(config)).stochastic)
    ]
    require(
        bool(noisy),
        "the sampler adds no noise at any step, so there is no log-prob to train",
        got=_noise_settings(sampler),
        wanted="at least one step with noise",
        way_out="raise the noise of the kernel, or sampler.steps above 1",
    )
    for index in policy.train_on:
        require(
            index < sampler.steps,
            "policy.train_on names a step that the sampler does not have",
            got=f"step {index} of sampler.steps {sampler.steps}",
            wanted=f"steps 0 to {sampler.steps - 1}",
            way_out="change policy.train_on, or raise sampler.steps",
        )
        require(
            index in noisy,
            "policy.train_on names a step without noise, which has no log-prob",
            got=f"step {index} of {_noise_settings(sampler)}",
            wanted=f"steps out of {_ranges(noisy)}",
            way_out="remove it from policy.train_on",
        )
    require(
        bool(policy.train_on) or policy.train_steps <= len(noisy),
        "policy.train_steps is more than the steps that have noise",
        got=f"{policy.train_steps} of {len(noisy)} ({_noise_settings(sampler)})",
        wanted=f"at most {len(noisy)}, or 0 for all of them",
        way_out="lower policy.train_steps or raise sampler.steps",
    )


def _noise_settings(sampler: Any) -> str:
    """What decides which steps have noise, of the kernels of this package."""
    keys = {
        "flow_grpo": ("noise_level", "last_step", "window"),
        "dance": ("eta", "last_step", "window"),
        "cps": ("noise_level", "window"),
        "ddim": ("eta",),
        "edm": ("churn",),
    }.get(sampler.kernel, ())
    return ", ".join(f"{k} {sampler[k]}" for k in ("kernel", "steps", *keys))


def _ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _check_data_term(config: Any) -> None:
    term, rollouts = config.data_term, config.policy.weight > 0
    require(
        rollouts or term.levels == "own",
        "the data term takes its noise levels from rollouts, and there are none",
        got='data_term.levels "rollout" with policy.weight 0',
        wanted='"own", or policy.weight > 0',
        way_out='set data_term.levels to "own"',
    )
    require(
        rollouts or not term.every_step,
        "the data term is taken at every trained step, and there are none",
        got="data_term.every_step True with policy.weight 0",
        wanted="False, or policy.weight > 0",
        way_out="set data_term.every_step to False",
    )
