"""The distribution of the next state, and every density the objectives read from it.

A step kernel returns a `Gaussian`; sampling, log-probability and KL are written once,
here. How a density is reduced over the latent axes is decided here too, because every
clip range depends on it: "mean" is the convention of DDPO and its successors.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Real, UInt32

# A noise level or coefficient: one for all samples, or one a sample.
Level = Real[ArrayLike, ""] | Real[ArrayLike, " b"]
# One key for the whole batch, or one a sample; typed or raw.
Keys = Key[Array, ""] | Key[Array, " b"] | UInt32[Array, " 2"] | UInt32[Array, "b 2"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
# ln 2 in two parts; the first is so short that its product with an exponent is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2.0) - _LN2_HIGH


@jax.custom_jvp
def rounded(x: Array) -> Array:
    """The identity, as a float32 that the compiler can not see through.

    Compilers contract a multiply and an add into one fused operation where both end up
    in one loop, which depends on what else the program computes: the same formula then
    rounds differently in rollout and replay, and the on-policy ratio is not 1. A select
    on x == x stands between them; it costs nothing and keeps non-finite values
    non-finite.
    """
    return jnp.where(x == x, x, jnp.inf)


@rounded.defjvp
def _rounded_jvp(primals, tangents):
    return rounded(*primals), tangents[0]


def per_sample(value: Level, x: Float[Array, "b *x"]) -> Array:
    """Shapes a scalar or [b] coefficient so that it multiplies `x` [b *x]."""
    value = rounded(jnp.asarray(value, jnp.float32))
    if value.ndim == 0:
        return value
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def weighted(coefficient: Level, x: Float[Array, "b *x"]) -> Float[Array, "b *x"]:
    """coefficient * x for a scalar or [b] coefficient, rounded before it is summed."""
    return rounded(per_sample(coefficient, x) * x)


def quotient(x: Float[Array, "b *x"], level: Level) -> Float[Array, "b *x"]:
    """x / level for a scalar or [b] level, as a product with its reciprocal.

    Which is what compilers make of such a division in some programs and not in others.
    """
    return weighted(1.0 / rounded(jnp.asarray(level, jnp.float32)), x)


def squares(alpha: Array, sigma: Array) -> Array:
    """alpha^2 + sigma^2, each rounded before they are summed."""
    return rounded(alpha * alpha) + rounded(sigma * sigma)


@jax.custom_jvp
def log(x: Array) -> Array:
    """The natural logarithm of float32, the same bits in every program.

    Compilers have a polynomial for it, and contract that one where they please. Here
    x = 2^k m with m in [sqrt(1/2), sqrt(2)), and with r = (m - 1) / (m + 1)
    log m = 2 (r + r^3/3 + r^5/5 + r^7/7 + r^9/9), which leaves out less than 1e-8 of
    it. Of 0, numbers below it, those without an exponent of their own (subnormal) and
    those that are not finite it is what jnp.log says.
    """
    x = jnp.asarray(x, jnp.float32)
    ordinary = (x >= jnp.finfo(jnp.float32).tiny) & (x < jnp.inf)
    mantissa, exponent = jnp.frexp(jnp.where(ordinary, x, 1.0))
    small = mantissa < math.sqrt(0.5)
    m = jnp.where(small, 2.0 * mantissa, mantissa)
    k = jnp.where(small, exponent - 1, exponent).astype(jnp.float32)
    r = rounded((m - 1.0) / rounded(m + 1.0))
    square = rounded(r * r)
    series = jnp.float32(1.0 / 9.0)
    for odd in (7.0, 5.0, 3.0, 1.0):
        series = 1.0 / odd + rounded(square * series)
    rest = rounded(_LN2_LOW * k) + rounded(2.0 * rounded(r * series))
    return jnp.where(ordinary, rounded(_LN2_HIGH * k) + rest, jnp.log(x))


@log.defjvp
def _log_jvp(primals, tangents):
    return log(*primals), tangents[0] / primals[0]


def reduce_latent(values: Float[Array, "b *x"], reduction: str) -> Float[Array, " b"]:
    """The mean or the sum over the latent axes.

    Raises:
      ValueError: if `reduction` is neither "mean" nor "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"unknown reduction: got {reduction!r}, wanted 'mean' or 'sum'; "
            "set policy.reduction to one of them"
        )
    rows = rounded(values.reshape(values.shape[0], -1))
    total = _total(rows)
    return rounded(total) / rows.shape[1] if reduction == "mean" else total


@jax.custom_jvp
def _total(rows: Float[Array, "b n"]) -> Float[Array, " b"]:
    """The sum of each row, in an order of additions that is written down here.

    A reduction is compiled into the loop around it and adds in that loop's order, and
    so, in a loop that XLA compiles as one function, does a matrix product. Additions of
    halves are element-wise, and no compiler reorders those.
    """
    while rows.shape[1] > 1:
        rows = jnp.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


@_total.defjvp
def _total_jvp(primals, tangents):
    return _total(*primals), jnp.sum(tangents[0], axis=1)  # transposed: a broadcast


class Gaussian(NamedTuple):
    """N(mean, std^2 I): one independent Gaussian a latent element.

    Attributes:
      mean: [b *x] float32.
      std: [b] or scalar float32. Exactly 0 where the transition is deterministic;
        such a transition can be sampled, but it has no density.
    """

    mean: Array
    std: Array

    def sample(self, key: Keys) -> Float[Array, "b *x"]:
        """mean + std * noise.

        Args:
          key: one key for the batch, or keys [b], each of which draws the noise of its
            own sample whatever the batch around it.

        Returns:
          The next state, float32.
        """
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        shape = self.mean.shape if key.ndim == 0 else self.mean.shape[1:]
        draw = lambda k: jax.random.normal(k, shape, jnp.float32)  # noqa: E731
        noise = draw(key) if key.ndim == 0 else jax.vmap(draw)(key)
        return self.mean + per_sample(self.std, self.mean) * noise

    def log_prob(
        self, x: Float[Array, "b *x"], reduction: str = "mean"
    ) -> Float[Array, " b"]:
        """log N(x; mean, std^2), reduced over the latent axes, in float32.

        -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 an element. Gradients flow
        into mean, std and x alike. Not finite where std is 0: a deterministic
        transition has no density, and no number is made up for it.
        """
        mean = rounded(jnp.asarray(self.mean, jnp.float32))
        std = rounded(jnp.asarray(self.std, jnp.float32))
        error = rounded(rounded(jnp.asarray(x, jnp.float32)) - mean)
        z = quotient(error, std)
        count = 1 if reduction == "mean" else math.prod(mean.shape[1:])
        square = rounded(reduce_latent(rounded(z * z), reduction))
        constant = rounded(count * rounded(log(std) + HALF_LOG_2PI))
        return rounded(rounded(-0.5 * square) - constant)

    def kl(self, other: "Gaussian", reduction: str = "mean") -> Float[Array, " b"]:
        """KL(self || other), reduced over the latent axes; exactly 0 for equal ones.

        ((s1/s2)^2 - 1 + ((m1 - m2)/s2)^2) / 2 - log(s1/s2) an element.
        """
        spread = jnp.asarray(self.std, jnp.float32) / other.std
        shift = (self.mean - other.mean) / per_sample(other.std, self.mean)
        count = 1 if reduction == "mean" else math.prod(self.mean.shape[1:])
        constant = 0.5 * (spread * spread - 1.0) - jnp.log(spread)
        return reduce_latent(0.5 * shift * shift, reduction) + count * constant


def squared_error_log_prob(
    gaussian: Gaussian, x: Float[Array, "b *x"], reduction: str = "mean"
) -> Float[Array, " b"]:
    """-(x - mean)^2 reduced: what the DDRL release and Flow-CPS use as a log-prob.

    The factor 1 / (2 std^2) of the density is left out (and its constants), so the
    gradient of a step is that of the density times 2 std^2: steps of high noise
    dominate, and a clip range for it is on a scale of its own.
    """
    mean = rounded(jnp.asarray(gaussian.mean, jnp.float32))
    error = rounded(rounded(jnp.asarray(x, jnp.float32)) - mean)
    return -rounded(reduce_latent(rounded(error * error), reduction))
