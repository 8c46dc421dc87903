"""Samples that are NaN or infinite: found on device before rounding hides them.

A picture is whole numbers, and a NaN becomes a black pixel in it. A judge would give
that black picture a score like any other, so it is told from the latent.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Scores

SHOWN = 8  # sample numbers in a message


@jax.jit
def finite_rows(x0: Float[Array, "b *x"]) -> Bool[Array, " b"]:
    """Says of each sample whether all of its latent is finite."""
    return jnp.all(jnp.isfinite(x0), axis=tuple(range(1, x0.ndim)))


def leave_out(
    scores: Scores, finite: Bool[np.ndarray, " b"], on_failure: str
) -> Scores:
    """Takes their scores from samples that are not finite.

    Args:
      scores: of all samples.
      finite: which samples are finite.
      on_failure: "mask" leaves such samples out, "error" refuses them.

    Raises:
      UserError: there are such samples, with on_failure="error".
    """
    if finite.all():
        return scores
    if on_failure == "error":
        raise broken(finite)
    values = {n: np.where(finite, v, np.nan) for n, v in scores.values.items()}
    values = {n: v.astype(np.float32) for n, v in values.items()}
    return Scores(values, scores.valid & finite)


def broken(finite: Bool[np.ndarray, " b"]) -> UserError:
    """The error for samples that are not finite; it names the first of them."""
    rows = np.flatnonzero(~finite)
    more = ", ..." if len(rows) > SHOWN else ""
    return UserError(
        "samples are NaN or infinite and have no picture",
        got=f"{len(rows)} of {len(finite)}: "
        + ", ".join(map(str, rows[:SHOWN]))
        + more,
        wanted="finite latents",
        way_out="try --config.model.dtype=float32, or a lower --config.optimizer.lr "
        "where the run has diverged, in another --workdir; where only some are, "
        "--config.rewards.on_failure=mask leaves them out of their epoch and counts "
        "them",
    )


def stand_ins(finite: Bool[np.ndarray, " b"], chunk: int) -> Int[np.ndarray, " b"]:
    """For each sample its own number, or that of a finite one in its place.

    Where there is one it has the same position in another chunk: computed there again
    it is the same to the bit.

    Args:
      finite: which samples are finite, at least one.
      chunk: samples of a call.
    """
    rows, good = np.arange(len(finite), dtype=np.int32), np.flatnonzero(finite)
    for row in np.flatnonzero(~finite):
        near = good[good % chunk == row % chunk]
        rows[row] = near[0] if len(near) else good[0]
    return rows
