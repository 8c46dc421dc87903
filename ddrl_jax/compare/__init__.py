"""Several algorithms on equal prompts, noise and reward calls: one table, one figure.

Nothing is trained here: workdirs in, markdown and pictures out. `runs` reads them,
`bars` judges them, `table`, `values` and `figures` show them.
"""

import os
from pathlib import Path
from typing import Any

from ddrl_jax.compare.bars import first_collapse, verdicts
from ddrl_jax.compare.figures import draw
from ddrl_jax.compare.runs import at_matched_size, find_runs, load_runs, summarise
from ddrl_jax.compare.table import write_table

__all__ = (
    "at_matched_size",
    "compare_mode",
    "draw",
    "find_runs",
    "first_collapse",
    "load_runs",
    "summarise",
    "verdicts",
    "write_table",
)


def compare_mode(config: Any, workdir: str | os.PathLike) -> None:
    """--mode=compare: WORKDIR holds ARM/seed_N; writes compare.md and its figures.

    Args:
      config: not read; the runs bring their own.
      workdir: folder of the folders of the arms.
    """
    del config
    root = Path(workdir)
    runs = load_runs(find_runs(root))
    figures = draw(runs, root / "compare.png")
    print(write_table(runs, root / "compare.md", figures=figures))
