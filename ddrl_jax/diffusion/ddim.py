"""The DDIM transition of Song et al. (2021), the policy of DDPO (Black et al. 2023)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import Gaussian, Level, quotient, rounded, weighted


def ddim_step(
    x: Float[Array, "b *x"],
    eps: Float[Array, "b *x"],
    alpha_bar_t: Level,
    alpha_bar_s: Level,
    eta: Level,
) -> Gaussian:
    """One step from alpha_bar_t to alpha_bar_s (DDIM, equations 12 and 16).

        std^2 = eta^2 (1 - abar_s)/(1 - abar_t) (1 - abar_t/abar_s)
        mean  = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps
        x0    = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t)

    Args:
      x: state sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.
      eps: predicted noise.
      alpha_bar_t: of the state, in (0, 1), scalar or [b].
      alpha_bar_s: of the next state, in [abar_t, 1], scalar or [b].
      eta: 0 is the deterministic sampler, 1 the ancestral one of DDPM; in [0, 1].

    Returns:
      The distribution of the next state. No floor on std: it is 0 for eta 0.
    """
    x, eps = jnp.asarray(x, jnp.float32), jnp.asarray(eps, jnp.float32)
    abar_t = jnp.asarray(alpha_bar_t, jnp.float32)
    abar_s = jnp.asarray(alpha_bar_s, jnp.float32)
    eta = jnp.asarray(eta, jnp.float32)
    # The share of the next state's noise that is fresh at eta 1. Rounding can not lift
    # it above 1 (abar_t / abar_s >= abar_t), so the root below needs no clamp.
    fresh = (1.0 - abar_t / abar_s) / (1.0 - abar_t)
    std = eta * jnp.sqrt((1.0 - abar_s) * fresh)
    kept = jnp.sqrt((1.0 - abar_s) * (1.0 - rounded(eta * eta * fresh)))
    noise = weighted(jnp.sqrt(1.0 - abar_t), eps)
    x0 = quotient(x - noise, jnp.sqrt(abar_t))
    return Gaussian(weighted(jnp.sqrt(abar_s), x0) + weighted(kept, eps), std)
