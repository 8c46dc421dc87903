"""Noise processes as values with inverses, and the grids of levels samplers walk.

A process says how much data and noise a state holds at a level:
x = alpha(level) x0 + sigma(level) eps. Grids are float64 NumPy, from noise to data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import Level, per_sample, quotient, rounded, squares

TRAIN_STEPS = 1000  # levels of the Stable Diffusion schedule
BETA_FIRST, BETA_LAST = 0.00085, 0.012  # its betas, linear in their square roots
TIMESTEP_SNAP = 1e-3  # a timestep this close to an integer is that integer
STEPS_OFFSET = 1  # its samplers end at timestep 1, not 0
KARRAS_RHO = 7.0  # exponent of the EDM grid (Karras et al. 2022, equation 5)


class Process(NamedTuple):
    """A Gaussian noise process.

    Attributes:
      scales: level -> (alpha, sigma).
      level: (alpha, sigma) -> level, its inverse; only sigma / alpha matters.
    """

    scales: Callable[[Array], tuple[Array, Array]]
    level: Callable[[Array, Array], Array]


# Rectified flow; the level is the time sigma in [0, 1].
FLOW = Process(lambda t: (1.0 - t, t), lambda a, s: s / (a + s))
# Variance preserving (DDPM, Stable Diffusion); the level is alpha_bar.
VP = Process(
    lambda t: (jnp.sqrt(t), jnp.sqrt(1.0 - t)), lambda a, s: a * a / squares(a, s)
)
# Variance exploding (EDM); the level is sigma.
VE = Process(lambda t: (jnp.ones_like(t), t), lambda a, s: s / a)


def to_flow(
    x: Float[Array, "b *x"], alpha: Level, sigma: Level
) -> tuple[Float[Array, "b *x"], Array]:
    """The rectified-flow state and time of the same noise ratio.

    z = x / (alpha + sigma), time = sigma / (alpha + sigma); then
    z = (1 - time) x0 + time eps for x = alpha x0 + sigma eps.

    Returns:
      z [b *x] and time (shape of the levels), float32.
    """
    alpha, sigma = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    total = alpha + sigma
    return quotient(jnp.asarray(x, jnp.float32), total), rounded(sigma / total)


def from_flow(
    z: Float[Array, "b *x"], alpha: Level, sigma: Level
) -> Float[Array, "b *x"]:
    """The inverse of `to_flow`: alpha x0 + sigma eps from the rectified-flow state."""
    total = jnp.asarray(alpha, jnp.float32) + jnp.asarray(sigma, jnp.float32)
    return jnp.asarray(z, jnp.float32) * per_sample(total, z)


def to_vp(
    x: Float[Array, "b *x"], alpha: Level, sigma: Level
) -> tuple[Float[Array, "b *x"], Array]:
    """The variance-preserving state and alpha_bar of the same noise ratio.

    With r^2 = alpha^2 + sigma^2: x / r and alpha_bar = alpha^2 / r^2.
    """
    alpha, sigma = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    # Fenced where a compiler has a shorter way through a root.
    total = rounded(jnp.sqrt(squares(alpha, sigma)))
    level = rounded(rounded(alpha / total) ** 2)
    return quotient(jnp.asarray(x, jnp.float32), total), level


def shift_time(time: np.ndarray, shift: float) -> np.ndarray:
    """shift t / (1 + (shift - 1) t): more steps at high noise (SD3, section 5.3.2)."""
    return shift * time / (1.0 + (shift - 1.0) * time)


def unshift_time(time: np.ndarray, shift: float) -> np.ndarray:
    """The inverse of `shift_time`: the shift by 1 / shift."""
    return shift_time(time, 1.0 / shift)


def flow_sigmas(steps: int, shift: float = 1.0) -> np.ndarray:
    """The n + 1 times of a rectified-flow sampler, 1 to 0, float64."""
    return shift_time(np.linspace(1.0, 0.0, steps + 1), shift)


def sd_alpha_bars() -> np.ndarray:
    """alpha_bar of the 1000 timesteps of Stable Diffusion 1.x and 2.x, float64."""
    betas = np.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TRAIN_STEPS) ** 2
    return np.cumprod(1.0 - betas)


def ddim_timesteps(steps: int, offset: int = STEPS_OFFSET) -> np.ndarray:
    """The n timesteps of DDIM, descending: i (1000 // n) + offset, int64."""
    return np.arange(steps)[::-1] * (TRAIN_STEPS // steps) + offset


def ddim_levels(steps: int, offset: int = STEPS_OFFSET) -> np.ndarray:
    """alpha_bar before and after each DDIM step, [n 2] float64.

    The step from the last timestep goes to alpha_bar_0 = 0.99915, not to 1 (Stable
    Diffusion's set_alpha_to_one = false), so that it has noise like all others.
    """
    alpha_bars, t = sd_alpha_bars(), ddim_timesteps(steps, offset)
    s = np.maximum(t - TRAIN_STEPS // steps, 0)
    return np.stack([alpha_bars[t], alpha_bars[s]], axis=1)


def sd_timestep(alpha_bar: Level) -> Array:
    """The timestep of Stable Diffusion at alpha_bar, linear between timesteps.

    The inverse of `sd_alpha_bar`: exact on the schedule, at its ends beyond it.
    """
    ascending = jnp.asarray(sd_alpha_bars()[::-1], jnp.float32)
    timesteps = jnp.arange(TRAIN_STEPS - 1, -1, -1, dtype=jnp.float32)
    found = jnp.interp(jnp.asarray(alpha_bar, jnp.float32), ascending, timesteps)
    # float32 leaves an on-schedule level a few 1e-4 beside its timestep, which the
    # network was trained on as an integer and which its embedding would show.
    nearest = jnp.round(found)
    return jnp.where(jnp.abs(found - nearest) < TIMESTEP_SNAP, nearest, found)


def sd_alpha_bar(timestep: Level) -> Array:
    """alpha_bar of a (fractional) timestep of Stable Diffusion, float32."""
    levels = jnp.asarray(sd_alpha_bars(), jnp.float32)
    grid = jnp.arange(TRAIN_STEPS, dtype=jnp.float32)
    return jnp.interp(jnp.asarray(timestep, jnp.float32), grid, levels)


def karras_sigmas(
    steps: int, sigma_max: float, sigma_min: float, rho: float = KARRAS_RHO
) -> np.ndarray:
    """The n + 1 sigmas of EDM, from sigma_max to sigma_min, float64.

    (smax^(1/rho) + i/n (smin^(1/rho) - smax^(1/rho)))^rho, i = 0..n.
    """
    high, low = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    return (high + np.linspace(0.0, 1.0, steps + 1) * (low - high)) ** rho
