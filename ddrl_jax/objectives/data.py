"""The data term: the denoising loss, and the weights that turn it into RWR."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ddrl_jax.diffusion import schedules
from ddrl_jax.diffusion.gaussian import per_sample
from ddrl_jax.errors import UserError

WEIGHTINGS = ("velocity", "edm", "eps")

# q (n - 1) of a decimal fraction lands a rounding error beside its integer; ranks are
# meant to this many decimals, which is exact for any set below 10 million samples.
RANK_DECIMALS = 8


def denoising_loss(
    prediction: Float[Array, "b *x"],
    x0: Float[Array, "b *x"],
    eps: Float[Array, "b *x"],
    time: Float[Array, " b"],
    weighting: str,
) -> Float[Array, " b"]:
    """Diffusion loss of a velocity prediction; DDRL's forward KL up to a constant.

    At z = (1 - t) x0 + t eps the target is v* = eps - x0 (rectified flow), and with
    D = mean_x (v - v*)^2 the three losses are
      velocity: D;
      eps:      mean_x (eps_hat - eps)^2 = (1 - t)^2 D;
      edm:      mean_x (sigma^2 + 1) / sigma^2 (x0_hat - x0)^2, sigma = t / (1 - t),
                which is ((1 - t)^2 + t^2) D (arXiv 2206.00364, sigma_data = 1).
    Only the forms with D are computed: they are finite at t = 0 and at t = 1.

    Args:
      prediction: the velocity the network returned for (z, time).
      x0: clean data.
      eps: the unit Gaussian noise in z.
      time: t in [0, 1], 1 is pure noise.
      weighting: one of `WEIGHTINGS`.

    Returns:
      One loss a sample, a mean over the latent axes, float32.

    Raises:
      UserError: unknown `weighting`.
    """
    target = eps.astype(jnp.float32) - x0.astype(jnp.float32)
    square = jnp.square(prediction.astype(jnp.float32) - target)
    error = jnp.mean(square, axis=tuple(range(1, square.ndim)))
    t = time.astype(jnp.float32)
    if weighting == "velocity":
        return error
    if weighting == "edm":
        return (jnp.square(1.0 - t) + jnp.square(t)) * error
    if weighting == "eps":
        return jnp.square(1.0 - t) * error
    raise _unknown(weighting)


def noised(
    x0: Float[Array, "b *x"],
    eps: Float[Array, "b *x"],
    time: Float[Array, " b"],
    source: str = "velocity",
) -> Float[Array, "b *x"]:
    """The network's input at `time`: flow for "velocity", else Stable Diffusion's VP.

    (1 - t) x0 + t eps, or sqrt(abar) x0 + sqrt(1 - abar) eps at timestep t.

    Args:
      x0: clean data.
      eps: unit Gaussian noise.
      time: t in [0, 1], or a timestep in [0, 999].
      source: what the network predicts: "velocity", "eps", "x0" or "v".
    """
    if source == "velocity":
        t = time.reshape(-1, *(1,) * (x0.ndim - 1))
        return (1 - t) * x0 + t * eps
    alpha, sigma = schedules.VP.scales(schedules.sd_alpha_bar(time))
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


def prediction_loss(
    prediction: Float[Array, "b *x"],
    x0: Float[Array, "b *x"],
    eps: Float[Array, "b *x"],
    time: Float[Array, " b"],
    weighting: str,
    source: str = "velocity",
) -> Float[Array, " b"]:
    """`denoising_loss` for any network: in flow time or on Stable Diffusion's schedule.

    For a VP state alpha x0 + sigma eps the error is taken in what the network
    predicts and brought to eps by |d eps / d prediction|, 1 for eps, alpha for v =
    alpha eps - sigma x0, alpha / sigma for x0. E = mean_x (eps_hat - eps)^2 is the
    loss of "eps" (arXiv 2006.11239, Eq. 14). At the flow time tau = sigma / (alpha +
    sigma) of the same noise ratio E = (1 - tau)^2 D, which gives "velocity" = D and
    "edm" = ((1 - tau)^2 + tau^2) D.

    Args:
      prediction: of the network at `noised(x0, eps, time, source)`.
      x0: clean data.
      eps: the noise in that state.
      time: as in `noised`.
      weighting: one of `WEIGHTINGS`.
      source: what the network predicts.

    Returns:
      One loss a sample, a mean over the latent axes, float32.

    Raises:
      UserError: unknown `weighting`.
    """
    if source == "velocity":
        return denoising_loss(prediction, x0, eps, time, weighting)
    alpha, sigma = schedules.VP.scales(schedules.sd_alpha_bar(time))
    a, s = per_sample(alpha, x0), per_sample(sigma, x0)
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[source]
    scale = {"eps": jnp.ones_like(alpha), "x0": alpha / sigma, "v": alpha}[source]
    square = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    error = jnp.square(scale) * jnp.mean(square, axis=tuple(range(1, square.ndim)))
    tau = sigma / (alpha + sigma)
    weights = {
        "eps": jnp.ones_like(tau),
        "velocity": 1.0 / jnp.square(1.0 - tau),
        "edm": (jnp.square(1.0 - tau) + jnp.square(tau)) / jnp.square(1.0 - tau),
    }
    if weighting not in weights:
        raise _unknown(weighting)
    return weights[weighting] * error


def _unknown(weighting: str) -> UserError:
    return UserError(
        "unknown weighting of the data loss",
        got=repr(weighting),
        wanted="one of " + ", ".join(WEIGHTINGS),
        way_out="set data_term.weighting",
    )


def rwr_weights(
    rewards: Float[Array | np.ndarray, "*g b"],
    inverse_temperature: float | int,
    valid: Bool[Array | np.ndarray, "*g b"] | None = None,
) -> Float[Array, "*g b"]:
    """Reward-weighted regression (arXiv 2305.13301, sec. 4.2): w = b softmax(beta r).

    Args:
      rewards: any unit; the softmax runs over the last axis, so [b] weighs the whole
        set and [g b] each prompt on its own.
      inverse_temperature: beta in 1 / unit of the reward, >= 0; 0 keeps all alike.
      valid: which samples have a reward, None: all. The softmax is over those alone.

    Returns:
      Weights >= 0, 0 without a reward, with mean 1 over all b (of a set without any
      reward all are 0), float32.

    Raises:
      UserError: negative or non-finite beta; non-finite rewards (under `jit`, where
        values can not be read, they turn every weight of their set into NaN).
    """
    if not (math.isfinite(inverse_temperature) and inverse_temperature >= 0):
        raise UserError(
            "the inverse temperature multiplies the rewards",
            got=inverse_temperature,
            wanted="a finite number >= 0",
            way_out="the DDPO paper uses 0.2",
        )
    rewards, valid = _finite(rewards, valid)
    beta = inverse_temperature
    # 0 times -inf is NaN: with beta 0 the rewards are 0 instead
    masked = jnp.where(valid, rewards if beta else 0.0, -jnp.inf)
    weights = jax.nn.softmax((beta or 1.0) * masked, axis=-1)
    return jnp.where(valid, weights * rewards.shape[-1], 0.0)


def sparse_rwr_weights(
    rewards: Float[Array | np.ndarray, "*g b"],
    percentile: float | int,
    valid: Bool[Array | np.ndarray, "*g b"] | None = None,
) -> Float[Array, "*g b"]:
    """Sparse RWR (arXiv 2305.13301, sec. 4.2): w = 1[r >= C] / mean 1[r >= C].

    C is the percentile of the set by linear interpolation. The smallest reward that is
    >= C is an element of the set, and comparing with that one keeps the same samples
    without the rounding of the interpolation, which could drop a whole set of ties.

    Args:
      rewards: any unit; the set is the last axis.
      percentile: a fraction below 1 (0.9, the paper's table) or a percentage above 1
        (90); exactly 1 could be either and is refused.
      valid: which samples have a reward, None: all. C is the percentile of those.

    Returns:
      Weights 0 or b / kept with mean 1 over all b, float32. At least the best sample is
      kept; of a set without any reward all weights are 0.

    Raises:
      UserError: percentile outside [0, 1) and (1, 100]; non-finite rewards (under
        `jit` they turn every weight of their set into NaN).
    """
    if not (0.0 <= percentile < 1.0 or 1.0 < percentile <= 100.0):
        raise UserError(
            "the percentile of sparse RWR is out of range",
            got=percentile,
            wanted="a fraction in [0, 1) or a percentage in (1, 100]",
            way_out="the DDPO paper uses 0.9, the share that is dropped",
        )
    rewards, valid = _finite(rewards, valid)
    # The rank for every number of valid samples: float32 would round it when traced.
    counts = range(1, rewards.shape[-1] + 1)
    ranks = np.array([0, *(n - sparse_rwr_count(n, percentile) for n in counts)])
    rank = jnp.asarray(ranks)[jnp.sum(valid, axis=-1, keepdims=True)]
    ascending = jnp.sort(jnp.where(valid, rewards, jnp.inf), axis=-1)
    threshold = jnp.take_along_axis(ascending, rank, axis=-1)
    kept = (valid & (rewards >= threshold)).astype(jnp.float32)
    broken = jnp.isnan(rewards).any(axis=-1, keepdims=True)
    kept = jnp.where(valid & broken, jnp.nan, kept)
    share = jnp.mean(kept, axis=-1, keepdims=True)
    return jnp.where(valid.any(axis=-1, keepdims=True), kept / share, 0.0)


def sparse_rwr_count(size: int, percentile: float | int) -> int:
    """How many of a set of so many different rewards `sparse_rwr_weights` keeps."""
    fraction = percentile if percentile < 1.0 else percentile / 100.0
    return size - math.ceil(round(fraction * (size - 1), RANK_DECIMALS))


def heaviest(
    weights: Float[Array, "g b"], count: int, room: int | None = None
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """The rows that weigh most, so many of all sets together, the sets in turn.

    Where fewer of a set fit in than weigh something, as with ties, the first of them
    take the weight of all.

    Args:
      weights: >= 0 with mean 1, the set is the last axis.
      count: at most g b.
      room: k, rows to return, at least `count`: the next ones fill it up and weigh
        nothing. None: as many as are counted.

    Returns:
      Rows of the flattened weights, and their weights times k / (g b): a mean of k
      weighted losses is then the one over all rows.
    """
    (groups, size), room = weights.shape, room or count
    order = jnp.argsort(-weights, axis=-1, stable=True)
    ranked = jnp.take_along_axis(weights, order, axis=-1)
    taken = count > jnp.arange(groups * size).reshape(size, groups).T
    part = jnp.sum(jnp.where(taken, ranked, 0.0), axis=-1, keepdims=True)
    whole = jnp.sum(ranked, axis=-1, keepdims=True)
    scale = jnp.where(part > 0, whole / part, 1.0)
    ranked = jnp.where(taken, ranked * scale, 0.0)
    rows = order + size * jnp.arange(groups)[:, None]
    first = lambda x: x.T.reshape(-1)[:room]  # noqa: E731
    return first(rows), first(ranked) * (room / weights.size)


def _finite(
    rewards: Array | np.ndarray, valid: Array | np.ndarray | None
) -> tuple[Array, Array]:
    """(float32 rewards, 0 where there is none; which there are).

    Refuses NaN and inf where the values can be read.
    """
    values = jnp.asarray(rewards, jnp.float32)
    there = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)
    values = jnp.where(there, values, 0.0)
    if not isinstance(values, Tracer):
        bad = int(np.sum(~np.isfinite(np.asarray(values))))
        if bad:
            raise UserError(
                "rewards of RWR must be numbers",
                got=f"{bad} of {values.size} are NaN or infinite",
                wanted="finite rewards",
                way_out="leave failed samples out before weighting",
            )
    return values, there
