"""The churned second-order transition of DDRL on Cosmos, x = x0 + sigma eps.

Each step raises the noise from sigma to sigma_hat = (1 + eta) sigma (Karras et al.
2022, algorithm 2), then solves the ODE down to the next sigma. The state that is kept
is the churned one, so the transition of the policy is x_hat -> next x_hat.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import Gaussian, Level, log, rounded, weighted

MAX_ETA = 1.2**0.5 - 1.0  # the release's bound: no step adds over a fifth in variance


def churn_eta(churn: float, steps: int) -> float:
    """eta = min(S_churn / (n + 1), sqrt(1.2) - 1) of a grid of n steps."""
    return min(churn / (steps + 1), MAX_ETA)


def churned_levels(sigmas: np.ndarray, eta: float) -> np.ndarray:
    """(sigma_hat_i, sigma_{i+1}) of each step from the n + 1 sigmas, [n 2] float64."""
    return np.stack([(1.0 + eta) * sigmas[:-1], sigmas[1:]], axis=1)


def churned_ab2_step(
    x_hat: Float[Array, "b *x"],
    x0: Float[Array, "b *x"],
    x0_previous: Float[Array, "b *x"] | None,
    sigma_hat_previous: Level | None,
    sigma_hat: Level,
    sigma_s: Level,
    eta: Level,
) -> Gaussian:
    """Two-step Adams-Bashforth in log sigma, then the churn of the next step.

    With h = ln(sigma_hat / sigma_s), phi1 = (1 - e^-h)/h, phi2 = (1 - phi1)/h and
    c2 = -ln(sigma_hat_previous / sigma_hat)/h, DDRL's release has

        mean = e^-h x_hat + h [(phi1 - phi2/c2) x0 + (phi2/c2) x0_previous]
             = r x_hat + (1 - r) x0 + (h - 1 + r)/L (x0 - x0_previous)
        std  = sigma_s sqrt(eta^2 + 2 eta)

    with r = e^-h = sigma_s / sigma_hat, L = ln(sigma_hat_previous / sigma_hat).

    Args:
      x_hat: churned state at sigma_hat.
      x0: predicted clean latent at x_hat.
      x0_previous: that of the step before; None is the Euler step.
      sigma_hat_previous: level of x0_previous, scalar or [b]; +inf is the Euler step
        too (with any finite x0_previous). Ignored where x0_previous is None.
      sigma_hat: level of x_hat, scalar or [b].
      sigma_s: level the ODE is solved to, scalar or [b], above 0 but for Euler.
      eta: churn of the next step, sigma_hat_s = (1 + eta) sigma_s; 0 is the ODE.

    Returns:
      The distribution of the next churned state, whose level is (1 + eta) sigma_s.
    """
    x_hat, x0 = jnp.asarray(x_hat, jnp.float32), jnp.asarray(x0, jnp.float32)
    sigma_hat = jnp.asarray(sigma_hat, jnp.float32)
    sigma_s, eta = jnp.asarray(sigma_s, jnp.float32), jnp.asarray(eta, jnp.float32)
    r = sigma_s / sigma_hat
    std = sigma_s * jnp.sqrt(rounded(eta * eta) + rounded(2.0 * eta))
    euler = weighted(r, x_hat) + weighted(1.0 - r, x0)
    if x0_previous is None or sigma_hat_previous is None:
        return Gaussian(euler, std)
    # A difference of logs, not a log of the ratio: its gradient is finite at +inf.
    before = log(jnp.asarray(sigma_hat_previous, jnp.float32))
    extrapolate = (-log(r) - 1.0 + r) / (before - log(sigma_hat))
    change = x0 - jnp.asarray(x0_previous, jnp.float32)
    return Gaussian(euler + weighted(extrapolate, change), std)
