"""Solvers of the rectified flow's ODE dz/dtime = velocity, for evaluation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import per_sample

METHODS = ("euler", "heun")  # one and two velocities a step


def solve(
    velocity_fn: Callable[[Array, Array], Array],
    z: Float[Array, "b *x"],
    times: Float[np.ndarray, " m"],
    method: str = "euler",
) -> Float[Array, "b *x"]:
    """Carries the state from times[0] to times[-1] in one scan, in float32.

    Args:
      velocity_fn: (z [b *x], time [b]) -> eps - x0.
      z: state at times[0].
      times: the n + 1 times, from noise (1) to data (0).
      method: "euler" (order 1), or "heun" (order 2; both ends of a step are asked, time
        0 too, where the velocity of a flow is finite).

    Returns:
      The state at times[-1].

    Raises:
      ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown solver: got {method!r}, wanted one of {METHODS}; "
            "set evaluate.solver to one of them"
        )
    grid = jnp.asarray(np.stack([times[:-1], times[1:]], axis=1), jnp.float32)

    def step(z: Array, pair: Array) -> tuple[Array, None]:
        t, s = jnp.broadcast_to(pair[:, None], (2, z.shape[0]))
        dt = per_sample(s - t, z)
        v = velocity_fn(z, t).astype(jnp.float32)
        if method == "heun":
            v = 0.5 * (v + velocity_fn(z + dt * v, s).astype(jnp.float32))
        return z + dt * v, None

    return jax.lax.scan(step, jnp.asarray(z, jnp.float32), grid)[0]
