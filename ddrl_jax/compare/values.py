"""Every evaluation of every run in one small file: what the spreads are made of."""

import csv
import os
from pathlib import Path

import numpy as np

from ddrl_jax.compare.runs import METRICS, Runs

DIGITS = 6  # significant: float32 has 7


def write_values(runs: Runs, path: str | os.PathLike) -> Path:
    """Writes a CSV file, one line an evaluation: arm, seed, epochs, calls, metrics.

    Args:
      runs: of `load_runs`.
      path: of the file.

    Returns:
      The path. What was not measured is empty.
    """
    path = Path(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("arm", "seed", "epochs", "calls", *METRICS))
        for run in (run for of_arm in runs.values() for run in of_arm):
            for i, (step, calls) in enumerate(zip(run.steps, run.calls, strict=True)):
                values = [_short(run.values[name][i]) for name in METRICS]
                lines.writerow((run.arm, run.seed, step, calls, *values))
    return path


def _short(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.{DIGITS}g}"
