"""--mode=export: the averaged weights of a run, as one file that model.init reads."""

from pathlib import Path
from typing import Any

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.errors import UserError
from ddrl_jax.models.emoji import write_params
from ddrl_jax.models.lora import merge_lora
from ddrl_jax.program import build
from ddrl_jax.resume import start
from ddrl_jax.workdir import open_workdir


def export_mode(config: Any, workdir: str) -> None:
    """Writes WORKDIR/export/EPOCH.npz in half precision; a LoRA is merged into it.

    Args:
      config: the configuration of the run.
      workdir: folder of the run.

    Raises:
      UserError: the run has no checkpoint, or the file exists already.
    """
    home = open_workdir(workdir, config, exclusive=False)
    program = build(config)
    checkpoints = Checkpoints(home.checkpoints, 0, 1, read_only=True)
    epoch, state, _ = start(program, checkpoints)
    if not epoch:
        raise UserError(
            f"{home.root} has no checkpoint to export",
            got="a run without a finished save",
            wanted="a workdir of --mode=train",
            way_out="train first, or correct --workdir",
        )
    target = Path(home.root) / "export" / f"{epoch:06d}.npz"
    if target.exists():
        raise UserError(
            f"{target} is already there",
            got="an existing file",
            wanted="a new one",
            way_out="move it away",
        )
    params = state.ema
    if config.lora.rank:
        params = merge_lora(program.frozen, state.ema, config.lora)
    target.parent.mkdir(exist_ok=True)
    write_params(target, params)
    print(f"exported epoch {epoch}: {target}", flush=True)
