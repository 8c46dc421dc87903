"""Updates that were skipped for a gradient that is no number: named, counted, stopped.

The number of the leaf is found on device with the gradient norm and comes to the host
with the other metrics of an epoch.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params


def leaf_names(params: Params) -> list[str]:
    """Names of what `bad_leaf` of an update counts: the leaves, then all together."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    return [*names, "all weights together (their squares overflow)"]


def report_skipped(
    history: Sequence[dict[str, Any]], names: Sequence[str], limit: int, epoch: int
) -> None:
    """Prints a line for each skipped update, and stops the run at too many in a row.

    Args:
      history: the metrics of an epoch's updates, on the host.
      names: what `leaf_names` gave.
      limit: so many in a row are too many.
      epoch: in which they happened, for the lines.

    Raises:
      UserError: `limit` updates in a row were skipped.
    """
    for number, metrics in enumerate(history, 1):
        if metrics["bad_leaf"] < 0:
            continue
        name, row = names[int(metrics["bad_leaf"])], int(metrics["bad_updates"])
        if jax.process_index() == 0:  # all processes have the same metrics
            print(
                f"epoch {epoch}: skipped update {number} of {len(history)}, {row} in a"
                f" row: the gradient of {name} is not finite",
                file=sys.stderr,
                flush=True,
            )
        if row >= limit:
            raise UserError(
                "the gradients are not finite",
                got=f"{row} updates in a row, all skipped; the first bad leaf of the "
                f"last one is {name}",
                wanted=f"fewer than {limit} (config.train.nan_limit)",
                way_out="lower config.optimizer.lr or config.policy.clip_range, in "
                "another --workdir; the last checkpoint here is from before this epoch",
            )
