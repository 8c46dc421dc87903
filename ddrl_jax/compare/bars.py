"""What counts as a collapse, and the two bars that DDRL is held to.

A run has collapsed at an evaluation where its held-out retrieval is below a third of
the base's or its held-out data loss is above twice the base's; the base is the first
evaluation of the same run, before any training.

Two bars are computed for every arm against the arm without an anchor (DDPO):

(a) Anchored. No evaluation of any seed of the arm has collapsed, over the whole run;
    each seed was given at least three times the reward calls at which the last seed of
    DDPO first collapsed; the largest data loss of any seed is at most 1.25 times its
    base's; and in every seed the largest data loss of DDPO is above twice its base's.
(b) Not bought with the pictures. The size an arm reaches is the mean of its last three
    evaluations, so that one dip is no result. The mean over seeds of its fall from the
    base is at least 15 %, and the mean retrieval of those evaluations is at least 1.5
    times the mean retrieval of DDPO where it first comes down to the same size, seed by
    seed (`at_matched_size`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddrl_jax.compare.runs import Run, Runs, at_matched_size, role

COLLAPSED_RETRIEVAL = 1 / 3  # of the base's, below it
COLLAPSED_DATA_LOSS = 2.0  # times the base's, above it
LONGER = 3  # times the calls that collapse DDPO
KEPT_DATA_LOSS = 1.25  # times the base's, at most
FALL = 0.15  # of the base's JPEG size, at least
GAIN = 1.5  # times DDPO's retrieval, at least
TAIL = 3  # evaluations whose mean is where a run has arrived


class Verdict(NamedTuple):
    """What an arm shows of the two bars; None is where the runs can not tell."""

    arm: str
    seeds: int  # compared, those that DDPO has too
    calls: int  # of the shortest run
    horizon: int | None  # calls it must stand; None: DDPO did not collapse in all seeds
    collapsed: tuple[int | None, ...]  # calls of the first collapse, for each seed
    data_loss: float  # the largest of all seeds, times the base's
    fall: float  # mean over seeds of 1 - size at the end / base
    retrieval: float  # at the end, mean over seeds
    reference: float | None  # DDPO's at the same sizes; None: not reached in all seeds
    seeds_above: int  # seeds in which (b) holds alone
    anchored: bool | None  # (a)
    kept: bool | None  # (b)


def first_collapse(run: Run) -> int | None:
    """Reward calls of the first evaluation that has collapsed (rules: module)."""
    fallen = run.relative("retrieval") < COLLAPSED_RETRIEVAL
    forgotten = run.relative("data_loss") > COLLAPSED_DATA_LOSS
    found = np.flatnonzero(fallen | forgotten)
    return int(run.calls[found[0]]) if found.size else None


def evaluated(runs: Runs) -> dict[str, list[Run]]:
    """The runs that have an evaluation after their first, of the base; by arm."""
    kept = {
        arm: [r for r in of_arm if len(r.steps) > 1] for arm, of_arm in runs.items()
    }
    return {arm: of_arm for arm, of_arm in kept.items() if of_arm}


def judged(run: Run) -> bool:
    """Whether a collapse would be seen: retrieval or held-out data loss is there.

    That of the base alone, before any training, says nothing.
    """
    names = ("retrieval", "data_loss")
    return any(bool(np.isfinite(run.relative(name)[1:]).any()) for name in names)


def verdicts(runs: Runs) -> list[Verdict]:
    """Both bars for every arm against the first arm without an anchor.

    Returns:
      A verdict for each other arm of which a collapse would be seen, over the seeds
      that are evaluated after their start; none where no arm is without an anchor, or
      would not show its own.
    """
    runs = evaluated(runs)
    free = [arm for arm, of_arm in runs.items() if role(of_arm[0].config) == "DDPO"]
    if not free or not all(map(judged, runs[free[0]])):
        return []
    reference = {run.seed: run for run in runs[free[0]]}
    return [
        _verdict(arm, [r for r in of_arm if r.seed in reference], reference)
        for arm, of_arm in runs.items()
        if arm != free[0]
        and any(r.seed in reference for r in of_arm)
        and all(map(judged, of_arm))
    ]


def _verdict(arm: str, runs: Sequence[Run], reference: dict[int, Run]) -> Verdict:
    others = [reference[run.seed] for run in runs]
    ends = [first_collapse(run) for run in others]
    known = [end for end in ends if end is not None]
    horizon = LONGER * max(known) if len(known) == len(ends) else None
    sizes = [_tail(run, "kilobytes") for run in runs]
    falls = [1 - s / r.values["kilobytes"][0] for s, r in zip(sizes, runs, strict=True)]
    mine = [_tail(run, "retrieval") for run in runs]
    theirs = [at_matched_size(o, s) for o, s in zip(others, sizes, strict=True)]
    reached = [value for value in theirs if value is not None]
    verdict = Verdict(
        arm=arm,
        seeds=len(runs),
        calls=int(min(run.calls[-1] for run in runs)),
        horizon=horizon,
        collapsed=tuple(first_collapse(run) for run in runs),
        data_loss=float(np.max([np.max(run.relative("data_loss")) for run in runs])),
        fall=float(np.mean(falls)),
        retrieval=float(np.mean(mine)),
        reference=float(np.mean(reached)) if len(reached) == len(runs) else None,
        seeds_above=sum(
            f >= FALL and t is not None and _above(m, t)
            for f, m, t in zip(falls, mine, theirs, strict=True)
        ),
        anchored=None,
        kept=None,
    )
    doubled = [_doubled(other) for other in others]
    all_doubled = None if None in doubled else all(doubled)
    return verdict._replace(
        anchored=_anchored(verdict, all_doubled), kept=_kept(verdict)
    )


def _doubled(run: Run) -> bool | None:
    """Whether the data loss went above twice the base's; None: it is not known."""
    loss = run.relative("data_loss")[1:]
    known = loss[np.isfinite(loss)]
    return bool(np.max(known) > COLLAPSED_DATA_LOSS) if known.size else None


def _tail(run: Run, metric: str) -> float:
    """Where a run has arrived: the mean of its last evaluations, never of the base."""
    return float(np.mean(run.values[metric][1:][-TAIL:]))


def _anchored(verdict: Verdict, doubled: bool | None) -> bool | None:
    if any(calls is not None for calls in verdict.collapsed):
        return False
    if verdict.data_loss > KEPT_DATA_LOSS:
        return False
    short = verdict.horizon is None or verdict.calls < verdict.horizon
    return None if short or np.isnan(verdict.data_loss) else doubled


def _kept(verdict: Verdict) -> bool | None:
    if np.isnan(verdict.fall) or np.isnan(verdict.retrieval):
        return None
    if verdict.fall < FALL:
        return False
    reference = verdict.reference
    if reference is None or np.isnan(reference):
        return None
    return _above(verdict.retrieval, reference)


def _above(mine: float, reference: float) -> bool:
    return mine > 0 and mine >= GAIN * reference
