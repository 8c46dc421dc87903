"""--mode=export: the averaged weights of a run, as model.init and others read them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.distributed import is_main
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params
from ddrl_jax.matmul_precision import in_matmul_precision
from ddrl_jax.models.emoji import write_params
from ddrl_jax.models.export_diffusers import write_lora, write_pipeline
from ddrl_jax.models.lora import merge_lora
from ddrl_jax.models.stable_diffusion import model_folder
from ddrl_jax.program import Program, build
from ddrl_jax.resume import drawn_from, start
from ddrl_jax.sharding import to_host
from ddrl_jax.sources import without_data
from ddrl_jax.workdir import open_workdir, tell_differences

# Keys that do not change what is exported. Where the weights lie may have changed; that
# they are those of the run is checked by their fingerprint.
FREE = (
    "export.",
    "evaluate.",
    "model.init",
    "model.revision",
    "model.variant",
    "model.dtype",
    "model.remat",
    "model.attention",
    "model.vae_",
    "lora.base_dtype",
)


@in_matmul_precision
def export_mode(config: Any, workdir: str) -> None:
    """Writes WORKDIR/export/EPOCH: what the weights are used by is the model's matter.

    The emoji and the video network: one .npz in half precision, a LoRA merged into
    it. Stable Diffusion: a diffusers pipeline folder, or for a LoRA the file that
    `pipe.load_lora_weights` takes (config.export.merge_lora for the folder).

    Args:
      config: the configuration of the run.
      workdir: folder of the run.

    Raises:
      UserError: the run has no checkpoint, its place is taken, or its model or LoRA
        is another one: a LoRA's scale is no part of its weights, nor is the seed that
        a random base under it is drawn from.
    """
    home = open_workdir(workdir, config, exclusive=False)
    checkpoints = Checkpoints(home.checkpoints, 0, 1, read_only=True)
    never = ("model.", "lora.", *drawn_from(config, checkpoints))
    tell_differences(home, config, FREE, never)
    newest = checkpoints.latest()
    if newest is None:
        raise UserError(
            f"{home.root} has no checkpoint to export",
            got="a run without a finished save",
            wanted="a workdir of --mode=train",
            way_out="train first, or correct --workdir",
        )
    _refuse_existing(_target(config, home.root, newest))  # before anything is built
    whole = without_data(config, "export")
    whole.lora.base_dtype = "float32"  # the base itself, not what bfloat16 left of it
    program = build(whole)
    epoch, state, *_ = start(program, checkpoints)
    trained = jax.tree.map(lambda a: a.astype(jnp.float32), state.average)
    weights = to_host(_weights(program, trained))
    if not is_main():
        return
    target = _target(config, home.root, epoch)
    write = _diffusers if config.model.name == "stable_diffusion" else _archive
    print(f"exported epoch {epoch}: {write(config, weights, target)}", flush=True)


def _target(config: Any, root: Path, epoch: int) -> Path:
    """The file or folder that gets the weights of an epoch."""
    ending = "" if config.model.name == "stable_diffusion" else ".npz"
    return root / "export" / f"{epoch:06d}{ending}"


def _refuse_existing(target: Path) -> None:
    folder = target.parent
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{target} can not lie there",
            got=f"{folder}, which is a file",
            wanted="a folder, or nothing",
            way_out="move it away",
        )
    if target.exists():
        raise UserError(
            f"{target} is already there",
            got="an existing file or folder",
            wanted="a new one",
            way_out="move it away",
        )


def _archive(config: Any, weights: Params, target: Path) -> Path:
    _refuse_existing(target)
    target.parent.mkdir(exist_ok=True)
    write_params(target, weights, heads=config.model.heads)
    return target


def _diffusers(config: Any, weights: Params, target: Path) -> Path:
    """A LoRA file for `load_lora_weights`, or a whole pipeline folder."""
    if _keeps_lora(config):
        return write_lora(target, weights, config.lora, config.export.bake_alpha)
    folder, variant = model_folder(config.model), config.model.variant
    return write_pipeline(folder, target, weights, config.export.dtype, variant)


def _weights(program: Program, trained: Params) -> Params:
    """What is exported: a LoRA by itself, or whole weights."""
    lora = program.config.lora
    if not lora.rank or _keeps_lora(program.config):
        return trained
    return merge_lora(program.frozen, trained, lora)


def _keeps_lora(config: Any) -> bool:
    alone = config.lora.rank and not config.export.merge_lora
    return bool(alone) and config.model.name == "stable_diffusion"
