"""Policy terms: what turns log-probs and advantages into a loss to minimise.

All of them take arrays of any one shape (`b`, or `t b`), work in float32 and average
over every element, masked ones included: micro-batches of equal size then add up to
the loss of the whole batch. A sample whose mask is False adds exactly 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Metrics
from ddrl_jax.objectives.advantages import dense_ids

# exp(80) = 6e34 can still be summed over a group in float32; advantages that far below
# 0 mean a beta that is too small, and every clip range is met long before.
MAX_EXPONENT = 80.0

TRANSFORMS = ("linear", "neg_exp", "neg_exp_centered")


def reward_transform(
    advantages: Float[Array, "*s"],
    kind: str,
    group_ids: Int[Array, "*s"] | None = None,
    mask: Bool[Array, "*s"] | None = None,
    num_groups: int | None = None,
) -> Float[Array, "*s"]:
    """DDRL's lambda, applied to the normalised reward (arXiv 2512.04332, J_DDRL).

    linear: A;  neg_exp: lambda(A) = -exp(-A);  neg_exp_centered: lambda(A) minus its
    mean over the valid members of the group. The mean is a constant of the group, so
    it leaves the expected gradient alone (up to the usual 1 - 1/n of a mean that
    contains the sample itself) but not its variance: without it every sample is
    pushed down.

    Args:
      advantages: dimensionless, already divided by DDRL's temperature beta.
      kind: one of `TRANSFORMS`.
      group_ids: 0..num_groups-1, without `num_groups` any numbers, for
        "neg_exp_centered"; None is one single group.
      mask: False where the reward is missing; such a sample gets 0 whatever `kind`.
      num_groups: static bound of the ids, or None.

    Returns:
      What the policy term uses as advantages, float32.

    Raises:
      UserError: unknown `kind`.
    """
    advantages = advantages.astype(jnp.float32)
    valid = jnp.ones(advantages.shape, bool) if mask is None else mask
    if kind == "linear":
        return jnp.where(valid, advantages, 0.0)
    if kind not in TRANSFORMS:
        raise UserError(
            "unknown reward transform",
            got=repr(kind),
            wanted="one of " + ", ".join(TRANSFORMS),
            way_out="set policy.transform",
        )
    exponent = jnp.minimum(-advantages, MAX_EXPONENT)
    transformed = jnp.where(valid, -jnp.exp(exponent), 0.0)
    if kind == "neg_exp":
        return transformed
    if group_ids is None:
        group_ids, num_groups = jnp.zeros(valid.shape, jnp.int32), 1
    ids, groups = dense_ids(group_ids, num_groups)

    def group_sum(values: Array) -> Array:
        return jax.ops.segment_sum(values.ravel(), ids.ravel(), groups)[ids]

    count = jnp.maximum(group_sum(valid.astype(jnp.float32)), 1.0)
    return jnp.where(valid, transformed - group_sum(transformed) / count, 0.0)


def reinforce(
    log_prob: Float[Array, "*s"],
    advantages: Float[Array, "*s"],
    mask: Bool[Array, "*s"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """DDPO's score-function estimator (arXiv 2305.13301, eq. 5): L = -mean A log p.

    Unbiased only for samples of the current weights: one update per rollout.

    Args:
      log_prob: of the sampled transitions under the current weights.
      advantages: no gradient flows into them.
      mask: False where the reward is missing.

    Returns:
      The loss, and `log_prob`, its mean over valid samples.
    """
    log_prob = log_prob.astype(jnp.float32)
    used, advantages = _used(advantages, mask)
    loss = jnp.mean(jnp.where(used, -advantages * log_prob, 0.0))
    return loss, {"log_prob": _valid_mean(jax.lax.stop_gradient(log_prob), mask)}


def clipped_surrogate(
    log_prob: Float[Array, "*s"],
    old_log_prob: Float[Array, "*s"],
    advantages: Float[Array, "*s"],
    clip_range: float | int,
    mask: Bool[Array, "*s"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped ratio (arXiv 1707.06347, eq. 7), as DDPO-IS uses it per transition.

    r = p / p_old;  L = mean max( -A r, -A clip(r, 1 - c, 1 + c) ).
    On policy r = 1 and the gradient is that of `reinforce`.

    Args:
      log_prob: of the stored transitions under the current weights.
      old_log_prob: of the same transitions when they were sampled; held constant.
      advantages: no gradient flows into them.
      clip_range: c >= 0, in units of the ratio; it depends on whether the log-probs
        are means or sums over the latent axes. inf switches clipping off.
      mask: False where the reward is missing.

    Returns:
      The loss and the metrics of `ratio_metrics`.

    Raises:
      UserError: negative or NaN clip_range.
    """
    if not clip_range >= 0:
        raise UserError(
            "the clip range bounds |ratio - 1|",
            got=clip_range,
            wanted="a number >= 0, or inf for no clipping",
            way_out="set policy.clip_range, 1e-4 is usual for mean log-probs",
        )
    log_prob = log_prob.astype(jnp.float32)
    old_log_prob = jax.lax.stop_gradient(old_log_prob.astype(jnp.float32))
    used, advantages = _used(advantages, mask)
    # Without `used`, a ratio that overflowed would make 0 * inf of an advantage of 0.
    ratio = jnp.exp(jnp.where(used, log_prob - old_log_prob, 0.0))
    low, high = 1.0 - clip_range, 1.0 + clip_range
    # The maximum, branch by branch: autodiff of max and clip would halve the gradient
    # where they tie, which is at r = 1 when c is below float32 resolution.
    beyond = jnp.where(advantages > 0, ratio > high, ratio < low)
    bounded = jnp.where(beyond, jnp.clip(ratio, low, high), ratio)
    loss = jnp.mean(-advantages * bounded)
    return loss, ratio_metrics(log_prob, old_log_prob, clip_range, mask)


def ratio_metrics(
    log_prob: Float[Array, "*s"],
    old_log_prob: Float[Array, "*s"],
    clip_range: float | int,
    mask: Bool[Array, "*s"] | None = None,
) -> Metrics:
    """How far the policy has moved from the one that sampled, over valid samples.

    Args:
      log_prob: of the stored transitions under the current weights.
      old_log_prob: of the same transitions when they were sampled.
      clip_range: what counts as clipped.
      mask: False where the reward is missing.

    Returns:
      approx_kl: 0.5 mean (log r)^2, DDPO's estimate;  clip_fraction: share of samples
      with |r - 1| > clip_range;  ratio_max_deviation: max |r - 1|, exactly 0 on policy.
    """
    difference = log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)
    log_ratio = jax.lax.stop_gradient(difference)
    valid = jnp.ones(log_ratio.shape, bool) if mask is None else mask
    # expm1 sees differences that exp rounds to a ratio of 1
    deviation = jnp.where(valid, jnp.abs(jnp.expm1(log_ratio)), 0.0)
    clipped = (deviation > clip_range).astype(jnp.float32)
    return {
        "approx_kl": 0.5 * _valid_mean(jnp.square(log_ratio), mask),
        "clip_fraction": _valid_mean(clipped, mask),
        "ratio_max_deviation": jnp.max(deviation),
    }


def step_kl(
    mean: Float[Array, "b *x"],
    mean_reference: Float[Array, "b *x"],
    std: Float[Array, " b"],
    reduction: str = "mean",
) -> Float[Array, " b"]:
    """Exact KL of two Gaussian transitions of equal std, reduced over the latent axes.

    KL = mean_x (mu - mu_ref)^2 / (2 std^2), with the std of the whole step (in SDE
    samplers it contains sqrt |dt|), or the sum: as the log-probs beside it, so that its
    weight means the same with both.

    Args:
      mean: of the current policy's step.
      mean_reference: of the reference policy's step from the same state.
      std: of both; > 0, a deterministic step has no KL.
      reduction: "mean" or "sum".

    Returns:
      One KL a sample, in nats; of "mean" per latent element.
    """
    axes = tuple(range(1, mean.ndim))
    difference = mean.astype(jnp.float32) - mean_reference.astype(jnp.float32)
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    square = reduce(jnp.square(difference), axis=axes)
    return square / (2.0 * jnp.square(std.astype(jnp.float32)))


def _used(advantages: Array, mask: Array | None) -> tuple[Array, Array]:
    """Which samples contribute, and their advantages with 0 elsewhere."""
    constant = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    valid = jnp.ones(constant.shape, bool) if mask is None else mask
    used = valid & (constant != 0.0)  # NaN stays used: it must be seen, not hidden
    return used, jnp.where(used, constant, 0.0)


def _valid_mean(values: Array, mask: Array | None) -> Array:
    """Mean over the samples with mask True, 0 if there are none."""
    if mask is None:
        return jnp.mean(values)
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
    return jnp.sum(jnp.where(mask, values, 0.0)) / count
