"""The run of Weights & Biases: one for a workdir, over all of its starts."""

import json
import uuid
from pathlib import Path
from typing import Any

from ddrl_jax.errors import UserError


def start_wandb(root: Path) -> Any:
    """Starts the run of a workdir, or goes on with it.

    Args:
      root: the folder of the run; its config.json is told, and .wandb_id is kept in it.

    Raises:
      UserError: the package is not installed, or refuses.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "log.wandb is on and the package wandb is not installed",
            got=error,
            wanted="wandb, an optional extra",
            way_out="pip install 'ddrl_jax[wandb]', or --config.log.wandb=False",
        ) from None
    name = root / ".wandb_id"  # a restart goes on with the same wandb run
    if not name.exists():
        name.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            dir=str(root),
            name=root.name,
            project="ddrl_jax",
            config=json.loads((root / "config.json").read_text()),
            id=name.read_text(),
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise UserError(
            "log.wandb is on and wandb does not start",
            got=" ".join(str(error).split()),
            wanted="an account that is logged in and reached, or WANDB_MODE=offline",
            way_out="wandb login, WANDB_MODE=offline, or --config.log.wandb=False",
        ) from error
