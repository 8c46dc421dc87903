"""Stochastic transitions of the rectified flow z = (1 - sigma) x0 + sigma eps.

Symbols: v = eps - x0 the velocity, sigma -> sigma' the step, dt = sigma' - sigma < 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import Gaussian, Level, rounded, weighted


def _float32(*values: Level) -> list[Array]:
    return [jnp.asarray(value, jnp.float32) for value in values]


def flow_grpo_step(
    x: Float[Array, "b *x"],
    velocity: Float[Array, "b *x"],
    sigma_t: Level,
    sigma_s: Level,
    noise_level: Level,
    sigma_max: Level,
) -> Gaussian:
    """One Euler-Maruyama step of the Flow-GRPO SDE (Liu et al. 2025, equation 9).

        g    = a sqrt(sigma / (1 - sigma*)),   sigma* = sigma_max where sigma = 1
        mean = x (1 + g^2/(2 sigma) dt) + v (1 + g^2 (1 - sigma)/(2 sigma)) dt
        std  = g sqrt(-dt)

    Args:
      x: state at sigma_t.
      velocity: eps - x0.
      sigma_t: in (0, 1], scalar or [b].
      sigma_s: in [0, sigma_t), scalar or [b].
      noise_level: a of the paper; 0 is the Euler step of the ODE.
      sigma_max: stands in for sigma in 1 - sigma where sigma is 1 and g would be
        infinite; the second sigma of the grid in Flow-GRPO.

    Returns:
      The distribution of the state at sigma_s.
    """
    x, velocity = jnp.asarray(x, jnp.float32), jnp.asarray(velocity, jnp.float32)
    sigma, sigma_s, a, top = _float32(sigma_t, sigma_s, noise_level, sigma_max)
    dt = sigma_s - sigma
    # Chosen before the division, so that neither value nor gradient meets 1 / 0.
    sigma_star = jnp.where(sigma == 1.0, top, sigma)
    g2_over_2sigma = a * a / (2.0 * (1.0 - sigma_star))
    g = a * jnp.sqrt(sigma / (1.0 - sigma_star))
    keep = 1.0 + rounded(g2_over_2sigma * dt)
    move = (1.0 + rounded(g2_over_2sigma * (1.0 - sigma))) * dt
    mean = weighted(keep, x) + weighted(move, velocity)
    return Gaussian(mean, g * jnp.sqrt(-dt))


def dance_step(
    x: Float[Array, "b *x"],
    velocity: Float[Array, "b *x"],
    sigma_t: Level,
    sigma_s: Level,
    eta: Level,
) -> Gaussian:
    """One Euler-Maruyama step of the DanceGRPO SDE (Xue et al. 2025, equation 7).

        score = -(x - (1 - sigma) x0) / sigma^2 = -eps / sigma
        mean  = x + v dt - eta^2/2 score dt
        std   = eta sqrt(-dt)

    Args:
      x: state at sigma_t.
      velocity: eps - x0.
      sigma_t: in (0, 1], scalar or [b].
      sigma_s: in [0, sigma_t), scalar or [b].
      eta: constant diffusion coefficient; 0 is the Euler step of the ODE.

    Returns:
      The distribution of the state at sigma_s.
    """
    x, velocity = jnp.asarray(x, jnp.float32), jnp.asarray(velocity, jnp.float32)
    sigma, sigma_s, eta = _float32(sigma_t, sigma_s, eta)
    dt = sigma_s - sigma
    eps = x + weighted(1.0 - sigma, velocity)
    correction = weighted(0.5 * eta * eta * dt / sigma, eps)
    mean = x + weighted(dt, velocity) + correction
    return Gaussian(mean, eta * jnp.sqrt(-dt))


def cps_step(
    x: Float[Array, "b *x"],
    velocity: Float[Array, "b *x"],
    sigma_t: Level,
    sigma_s: Level,
    noise_level: Level,
) -> Gaussian:
    """One step of coefficients-preserving sampling (Flow-CPS, Wang and Yu 2025).

        std  = sigma' sin(a pi/2)
        mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) eps

    The scales of x0 and of all noise together are those of the flow at sigma'. The
    share of fresh noise is the same however short the step, so on data of spread c the
    limit of many steps is not the data's: its variance is cos^2(a pi/4) c^2
    (tests/test_theory_marginals.py).

    Args:
      x: state at sigma_t.
      velocity: eps - x0.
      sigma_t: in (0, 1], scalar or [b].
      sigma_s: in [0, sigma_t), scalar or [b].
      noise_level: a of the paper in [0, 1]; 0 is the Euler step of the ODE, 1 replaces
        all noise.

    Returns:
      The distribution of the state at sigma_s; std is exactly 0 at sigma_s = 0.
    """
    x, velocity = jnp.asarray(x, jnp.float32), jnp.asarray(velocity, jnp.float32)
    sigma, sigma_s, a = _float32(sigma_t, sigma_s, noise_level)
    angle = 0.5 * jnp.pi * a
    x0 = x - weighted(sigma, velocity)
    eps = x + weighted(1.0 - sigma, velocity)
    # sqrt(sigma'^2 - std^2), without the cancellation under the root.
    kept = sigma_s * jnp.abs(jnp.cos(angle))
    mean = weighted(1.0 - sigma_s, x0) + weighted(kept, eps)
    return Gaussian(mean, sigma_s * jnp.sin(angle))
