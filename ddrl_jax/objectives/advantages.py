"""Advantages: rewards made comparable, per group, per batch or per prompt over time.

Everywhere: float32 whatever comes in, population standard deviation (ddof 0, as DDPO
and Flow-GRPO use it; the Cosmos code of DDRL divides by n - 1, which is a factor
sqrt(1 - 1/n) on every advantage), and a sample whose mask is False takes part in no
statistic and gets exactly 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from ddrl_jax.errors import UserError

# A set of rewards that differ by no more than this share of their size is equal up to
# float32 rounding; dividing by its standard deviation would turn dust into +-1.
DUST = 4 * float(np.finfo(np.float32).eps)

# On the host or on a device.
Rewards = Real[Array | np.ndarray, " b"]
Ids = Int[Array | np.ndarray, " b"]
Valid = Bool[Array | np.ndarray, " b"]

STD_KINDS = ("group", "global", "none")


def group_normalized(
    rewards: Rewards,
    group_ids: Ids,
    mask: Valid | None = None,
    *,
    num_groups: int | None = None,
    std: str = "group",
    epsilon: float | int = 1e-4,
    clip: float | int = 0.0,
) -> Float[Array, " b"]:
    """GRPO's advantage (arXiv 2402.03300, section 4.1.2): (r - mean) / (std + epsilon).

    A group with fewer than two valid members, or whose rewards are all equal up to
    float32 rounding, gets exactly 0.

    Args:
      rewards: any unit; values under mask False may be NaN.
      group_ids: 0..num_groups-1, need not be sorted; without `num_groups` any numbers.
      mask: True where the reward is valid; None means all.
      num_groups: static bound of the ids, saves sorting them; None: they are numbered
        here, so that prompt numbers or hashes serve as well.
      std: "group", "global" (all valid rewards of the batch, Flow-GRPO's default) or
        "none" (centre only, Dr.GRPO; epsilon unused).
      epsilon: added to the std, in units of the reward; bounds the advantage of
        differences smaller than it.
      clip: largest magnitude returned; 0 means no clip.

    Returns:
      Dimensionless advantages (in units of the reward for "none").

    Raises:
      UserError: unknown `std`.
    """
    if std not in STD_KINDS:
        raise UserError(
            "unknown standard deviation of advantages",
            got=repr(std),
            wanted="one of " + ", ".join(STD_KINDS),
            way_out="set advantages.std",
        )
    valid = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask)
    ids, groups = dense_ids(jnp.asarray(group_ids), num_groups)
    centered, deviation, flat = _centered(rewards, ids, valid, groups)
    if std == "global":
        everyone = jnp.zeros_like(ids)
        _, deviation, _ = _centered(rewards, everyone, valid, 1)
    scale = 1.0 if std == "none" else deviation + epsilon
    scale = jnp.where(flat, 1.0, scale)  # keeps 0 / 0 out when epsilon is 0
    return clip_advantages(jnp.where(flat, 0.0, centered / scale), clip)


def dense_ids(
    group_ids: Int[Array, "*s"], num_groups: int | None = None
) -> tuple[Int[Array, "*s"], int]:
    """Ids in 0..g-1 and g, the static number of groups they may name.

    A sum over segments drops ids beyond its bound without a word, so ids of no known
    bound are replaced by their rank among the different ones; jit knows no smaller
    bound of these than the number of samples.

    Args:
      group_ids: any numbers; with `num_groups` already 0..num_groups-1.
      num_groups: static bound of the ids, or None.

    Returns:
      The ids to use and their bound.
    """
    if num_groups is not None:
        return group_ids, num_groups
    size = group_ids.size
    _, ranks = jnp.unique(group_ids.ravel(), return_inverse=True, size=size)
    return ranks.reshape(group_ids.shape), size


def batch_normalized(
    rewards: Rewards,
    mask: Valid | None = None,
    *,
    epsilon: float | int = 1e-8,
    clip: float | int = 0.0,
) -> Float[Array, " b"]:
    """DDPO without its tracker: the whole batch is one group.

    Args:
      rewards: any unit; values under mask False may be NaN.
      mask: True where the reward is valid; None means all.
      epsilon: added to the std, in units of the reward.
      clip: largest magnitude returned; 0 means no clip.

    Returns:
      Dimensionless advantages.
    """
    everyone = jnp.zeros(rewards.shape, jnp.int32)
    return group_normalized(
        rewards, everyone, mask, num_groups=1, epsilon=epsilon, clip=clip
    )


class PerPromptTracker(NamedTuple):
    """DDPO's running reward statistics of each prompt (arXiv 2305.13301, app. D.3).

    A tree of three arrays and nothing else: save it with the checkpoint and a resumed
    run goes on with the same numbers. Each row of `buffer` is a ring that holds the
    last n rewards of its prompt.

    Attributes:
      buffer: the rewards kept; slots from `count` on are unused.
      count: how many rewards of the prompt are kept, 0..n.
      position: the slot that the next reward goes to.
    """

    buffer: Float[Array, "p n"]
    count: Int[Array, " p"]
    position: Int[Array, " p"]

    @classmethod
    def init(cls, num_prompts: int, size: int) -> "PerPromptTracker":
        """An empty tracker for prompts 0..num_prompts-1 that keeps `size` rewards each.

        Raises:
          UserError: either number is below 1.
        """
        if num_prompts < 1 or size < 1:
            raise UserError(
                "a reward tracker needs room",
                got=f"{num_prompts} prompts, {size} rewards each",
                wanted="at least 1 of both",
                way_out="set advantages.tracker_size and the prompt list",
            )
        zeros = jnp.zeros((num_prompts,), jnp.int32)
        return cls(jnp.zeros((num_prompts, size), jnp.float32), zeros, zeros)

    def update(
        self,
        prompt_index: Ids,
        rewards: Rewards,
        mask: Valid | None = None,
        min_count: int = 16,
        epsilon: float | int = 1e-6,
    ) -> tuple[Float[Array, " b"], "PerPromptTracker"]:
        """Appends an epoch's rewards, then normalises them by their prompt's rewards.

        A = (r - mean) / (std + epsilon) over the rewards kept of the prompt, this
        epoch's included; a prompt with fewer than `min_count` of them uses all valid
        rewards of this epoch instead. Rewards enter in sample order; of more than n
        in one epoch the last n stay.

        Args:
          prompt_index: position of each sample's prompt in the prompt list.
          rewards: any unit; values under mask False may be NaN.
          mask: True where the reward is valid; None means all.
          min_count: rewards a prompt needs for statistics of its own; static.
          epsilon: added to the std, in units of the reward.

        Returns:
          Dimensionless advantages [b], and the tracker after the epoch.

        Raises:
          UserError: min_count is larger than the buffer and could never be reached.
        """
        size = self.buffer.shape[1]
        if min_count > size:
            raise UserError(
                "the reward tracker can never hold enough rewards of a prompt",
                got=f"{min_count} wanted before use, {size} kept",
                wanted="no more wanted than kept",
                way_out="lower advantages.tracker_min or raise advantages.tracker_size",
            )
        valid = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask)
        prompt = jnp.asarray(prompt_index)
        values = jnp.where(valid, jnp.asarray(rewards, jnp.float32), 0.0)
        tracker = self._append(prompt, values, valid)
        own = tracker._own_advantages(prompt, values, epsilon)
        fallback = batch_normalized(values, valid, epsilon=epsilon)
        enough = tracker.count[prompt] >= min_count
        return jnp.where(valid, jnp.where(enough, own, fallback), 0.0), tracker

    def _append(self, prompt: Array, values: Array, valid: Array) -> "PerPromptTracker":
        """The rings after this epoch's rewards."""
        prompts, size = self.buffer.shape
        total = jax.ops.segment_sum(valid.astype(jnp.int32), prompt, prompts)
        rank = _rank_in_group(jnp.where(valid, prompt, prompts), prompts)
        stays = valid & (rank >= total[prompt] - size)
        slot = (self.position[prompt] + rank) % size
        row = jnp.where(stays, prompt, prompts)  # out of range: the write is dropped
        buffer = self.buffer.at[row, slot].set(values, mode="drop")
        count = jnp.minimum(self.count + total, size)
        return PerPromptTracker(buffer, count, (self.position + total) % size)

    def _own_advantages(
        self, prompt: Array, values: Array, epsilon: float | int
    ) -> Array:
        """Each reward against the ring of its own prompt."""
        prompts, size = self.buffer.shape
        kept = jnp.arange(size)[None, :] < self.count[:, None]
        rows = jnp.repeat(jnp.arange(prompts), size)
        base, mean, deviation, flat = _statistics(
            self.buffer.ravel(), rows, kept.ravel(), prompts
        )
        centered = (values - base[prompt]) - mean[prompt]
        # A flat ring holds this reward too, unless later ones pushed it out.
        dust = flat[prompt] & (jnp.abs(centered) <= DUST * jnp.abs(values))
        scale = jnp.where(dust, 1.0, deviation[prompt] + epsilon)
        return jnp.where(dust, 0.0, centered / scale)


def combine(
    advantages: Mapping[str, Float[Array, " b"]], weights: Mapping[str, float | int]
) -> Float[Array, " b"]:
    """Several rewards: each normalised on its own, then averaged with weights.

    sum_k w_k A_k / sum_k |w_k|: DDRL's mean where all weights are equal. Mixing after
    normalisation keeps a reward of large units from drowning the others, and only the
    ratios of the weights matter; a negative weight turns its reward round.

    Args:
      advantages: reward name -> advantages.
      weights: the same names -> weight.

    Returns:
      The weighted mean, float32.

    Raises:
      UserError: the names differ, there is none, or all weights are 0.
    """
    total = sum(abs(weight) for weight in weights.values())
    if not total > 0 or set(advantages) != set(weights):
        raise UserError(
            "every reward needs one weight, and one of them has to count",
            got=f"rewards {sorted(advantages)}, weights {dict(weights)}",
            wanted="the same names, at least one weight other than 0",
            way_out="set rewards.weights",
        )
    summed = sum(weight * advantages[name] for name, weight in weights.items())
    return jnp.asarray(summed / total, jnp.float32)


def clip_advantages(
    advantages: Float[Array, " b"], clip: float | int
) -> Float[Array, " b"]:
    """Bounds the magnitude: clip(A, -clip, clip); clip 0 changes nothing.

    DDRL clips last, after averaging over rewards and after the reward transform.
    """
    return jnp.clip(advantages, -clip, clip) if clip > 0 else advantages


def _centered(
    rewards: Array | np.ndarray, ids: Array, valid: Array, groups: int
) -> tuple[Array, Array, Array]:
    """Per sample: r - mean and std of its group, and whether the group is flat."""
    values = jnp.where(valid, jnp.asarray(rewards, jnp.float32), 0.0)
    base, mean, deviation, flat = _statistics(values, ids, valid, groups)
    centered = jnp.where(valid, (values - base[ids]) - mean[ids], 0.0)
    return centered, deviation[ids], flat[ids] | ~valid


def _statistics(
    values: Array, ids: Array, valid: Array, groups: int
) -> tuple[Array, Array, Array, Array]:
    """Per group: smallest value, mean above it, population std, and flatness.

    Measuring from the smallest value makes equal rewards exactly 0 and keeps the mean
    accurate when rewards share a large offset.
    """

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(valid, x, 0.0), ids, groups)

    number = total(jnp.ones_like(values))
    count = jnp.maximum(number, 1.0)
    low = jax.ops.segment_min(jnp.where(valid, values, jnp.inf), ids, groups)
    high = jax.ops.segment_max(jnp.where(valid, values, -jnp.inf), ids, groups)
    base = jnp.where(number > 0, low, 0.0)
    spread = jnp.where(number > 0, high - base, 0.0)
    above = values - base[ids]
    mean = total(above) / count
    deviation = jnp.sqrt(total(jnp.square(above - mean[ids])) / count)
    size = jnp.where(number > 0, jnp.maximum(jnp.abs(base), jnp.abs(high)), 0.0)
    return base, mean, deviation, spread <= DUST * size


def _rank_in_group(ids: Array, largest: int) -> Array:
    """How many earlier samples have the same id (ids in 0..largest)."""
    order = jnp.argsort(ids, stable=True)
    place = jnp.arange(ids.shape[0])
    first = jax.ops.segment_min(place, ids[order], largest + 1)
    return jnp.zeros_like(place).at[order].set(place - first[ids[order]])
