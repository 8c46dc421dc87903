"""What a network predicts, as a table: every quantity from every other one.

State x = alpha x0 + sigma eps. Five ways to say the same thing:

| name       | quantity                                                     |
|------------|--------------------------------------------------------------|
| "eps"      | the noise                                                    |
| "x0"       | the clean latent                                             |
| "v"        | alpha eps - sigma x0 (Salimans and Ho 2022, progressive distillation) |
| "velocity" | eps - x0, dx/dsigma of the rectified flow, for any alpha, sigma |
| "score"    | gradient of log p(x) = -eps / sigma                          |

x0, eps and velocity do not depend on the coordinates of the state; v and score do.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddrl_jax.diffusion.gaussian import Level, quotient, squares, weighted

_Read = Callable[[Array, Array, Array, Array], Array]


# (prediction p, state x, alpha a, sigma s) -> x0
_TO_X0: dict[str, _Read] = {
    "eps": lambda p, x, a, s: quotient(x - weighted(s, p), a),
    "x0": lambda p, x, a, s: p,
    "v": lambda p, x, a, s: quotient(weighted(a, x) - weighted(s, p), squares(a, s)),
    "velocity": lambda p, x, a, s: quotient(x - weighted(s, p), a + s),
    "score": lambda p, x, a, s: quotient(x + weighted(s * s, p), a),
}

# (prediction p, state x, alpha a, sigma s) -> eps
_TO_EPS: dict[str, _Read] = {
    "eps": lambda p, x, a, s: p,
    "x0": lambda p, x, a, s: quotient(x - weighted(a, p), s),
    "v": lambda p, x, a, s: quotient(weighted(s, x) + weighted(a, p), squares(a, s)),
    "velocity": lambda p, x, a, s: quotient(x + weighted(a, p), a + s),
    "score": lambda p, x, a, s: -weighted(s, p),
}

NAMES = tuple(_TO_X0)


def convert(
    prediction: Float[Array, "b *x"],
    x: Float[Array, "b *x"],
    source: str,
    target: str,
    alpha: Level,
    sigma: Level,
) -> Float[Array, "b *x"]:
    """Reads the quantity `target` from a network that predicts `source`.

    Args:
      prediction: the quantity `source`.
      x: the state alpha x0 + sigma eps.
      source: one of `NAMES`.
      target: one of `NAMES`.
      alpha: scale of x0 in the state, scalar or [b].
      sigma: scale of the noise in the state, scalar or [b].

    Returns:
      The quantity `target`, float32. Not finite only where the state does not hold it:
      x0 from eps or score at alpha = 0, eps from x0 at sigma = 0.

    Raises:
      ValueError: for a name that is not in `NAMES`.
    """
    for name in (source, target):
        if name not in NAMES:
            raise ValueError(
                f"unknown prediction: got {name!r}, wanted one of {NAMES}; "
                "name the quantity that the network was trained to predict"
            )
    prediction, x = (jnp.asarray(y, jnp.float32) for y in (prediction, x))
    if source == target:
        return prediction
    a, s = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    to_x0 = lambda: _TO_X0[source](prediction, x, a, s)  # noqa: E731
    to_eps = lambda: _TO_EPS[source](prediction, x, a, s)  # noqa: E731
    # Lazy, so that a quantity is only asked for x0 or eps where it needs them.
    table: dict[str, Callable[[], Array]] = {
        "eps": to_eps,
        "x0": to_x0,
        "v": lambda: weighted(a, to_eps()) - weighted(s, to_x0()),
        "velocity": lambda: to_eps() - to_x0(),
        "score": lambda: quotient(-to_eps(), s),
    }
    return table[target]()
