"""Every model by its name in the configuration. A new one is one line of PIPELINES."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from ddrl_jax.interfaces import Pipeline
from ddrl_jax.models.emoji import emoji_pipeline
from ddrl_jax.models.stable_diffusion import stable_diffusion_pipeline
from ddrl_jax.models.video_pipeline import video_dit_pipeline

# model.name -> (the whole configuration, the mesh or None) -> Pipeline
PIPELINES: dict[str, Callable[[Any, Mesh | None], Pipeline]] = {
    "emoji": emoji_pipeline,
    "stable_diffusion": stable_diffusion_pipeline,
    "video_dit": video_dit_pipeline,
}
PICTURES = ("emoji", "samples")  # data of a model whose latents are the pictures
# model.name -> the sources of data that it can be trained on, where they are others
SOURCES: dict[str, tuple[str, ...]] = {
    "stable_diffusion": ("folder", "tfds", "samples"),
    "video_dit": (),
}


def data_sources(model: str) -> tuple[str, ...]:
    """The values of data.source, but for "none", that go with a model.

    Args:
      model: its name in the configuration.
    """
    return SOURCES.get(model, PICTURES)
