"""A pipeline in the diffusers layout, from a folder or the hub, by one call."""

from typing import Any

from ddrl_jax.interfaces import Pipeline
from ddrl_jax.models.hub import resolve
from ddrl_jax.models.sd_folder import read_source
from ddrl_jax.models.stable_diffusion import COMPONENTS, assemble


def load_pipeline(
    path_or_repo_id: str, revision: str = "main", variant: str = "", **options: Any
) -> Pipeline:
    """Reads a Stable Diffusion 1.x or 2.x pipeline.

    Args:
      path_or_repo_id: a folder, or "owner/name" on the hub.
      revision: branch, tag or commit of a repository.
      variant: of the weight files, for example "fp16"; "" for the plain ones.
      **options: image_size, dtype, remat, rank, alpha, impl, vae_dtype and vae_at_once
        as for `ddrl_jax.models.stable_diffusion.assemble`.

    Raises:
      UserError: the model can not be found, read or honoured.
    """
    parts = tuple(COMPONENTS.values())
    folder = resolve(path_or_repo_id, revision, variant, parts)
    return assemble(read_source(folder, variant), **options)
