"""Why samples have no score: what a reward brought instead of one number a picture."""

from typing import NamedTuple

import numpy as np

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward

SHOWN = 8  # sample indices or values in a message
MEND = (
    "mend the reward, or set --config.rewards.on_failure=mask to leave such samples out"
)


class Problem(NamedTuple):
    """Why samples of a call have no score: which rows, and the words of a UserError."""

    rows: np.ndarray  # [n] bool
    got: str
    wanted: str
    way_out: str
    cause: BaseException | None = None


def checked(
    found: np.ndarray, count: int, reward: Reward
) -> tuple[np.ndarray | None, Problem | None]:
    """Takes what a reward returned for a batch.

    Args:
      found: what it returned.
      count: pictures of the batch.
      reward: where numbers are missing, its `why_missing() -> UserError | None`, if it
        has one, says why: the numbers themselves do not.

    Returns:
      Values float32 [count], NaN where there is none, and what is wrong with them; None
      for either that is not there.
    """
    wanted = f"one finite number a picture, shape [{count}]"
    everything = np.ones(count, bool)
    if found.shape != (count,):
        got = f"an array of shape {list(found.shape)}"
        return None, Problem(everything, got, wanted, MEND)
    number = np.issubdtype(found.dtype, np.number) or found.dtype == bool
    if not number or np.iscomplexobj(found):
        return None, Problem(everything, f"dtype {found.dtype}", wanted, MEND)
    with np.errstate(over="ignore"):
        values = found.astype(np.float32)
    bad = ~np.isfinite(values)
    if not bad.any():
        return values, None
    why = getattr(reward, "why_missing", lambda: None)()
    if why is not None:
        problem = from_exception(why, count)._replace(rows=bad)
    else:
        got = ", ".join(str(v) for v in found[bad][:SHOWN])
        problem = Problem(bad, got, wanted, MEND)
    values[bad] = np.nan
    return values, problem


def from_exception(e: BaseException, count: int) -> Problem:
    """Returns the problem of a batch whose reward raised; a UserError keeps its words.

    Args:
      e: what it raised.
      count: pictures of the batch: none has a score.
    """
    rows = np.ones(count, bool)
    if isinstance(e, UserError):
        return Problem(rows, f"{e.what}: {e.got}", e.wanted, e.way_out, e)
    got = f"{type(e).__name__}: {e}"
    return Problem(rows, got, "one finite number a picture", MEND, e)


def late_problem(timeout: float, count: int) -> Problem:
    """Returns the problem of a batch of `count` that took more than `timeout` s."""
    return Problem(
        np.ones(count, bool),
        f"no answer after {timeout:g} s",
        "scores in time",
        "raise --config.rewards.timeout, or set --config.rewards.on_failure=mask to"
        " leave such samples out",
    )
