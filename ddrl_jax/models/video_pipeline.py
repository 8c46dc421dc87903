"""The text-to-video pipeline: shapes and a network, for which no weights exist yet.

It is what `--mode=plan` plans. `model.init` "random" makes it run end to end at small
sizes, with stand-ins for the two parts that are missing: a prompt's words are random
vectors, each a function of the word, and a picture is three channels of frame one.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond, Pipeline
from ddrl_jax.models.denoiser import make_denoiser
from ddrl_jax.models.video_dit import PRECISE, VideoDiT
from ddrl_jax.models.video_layout import Layout
from ddrl_jax.sharding import table


def video_dit_pipeline(config: Any, mesh: Mesh | None = None) -> Pipeline:
    """Builds the pipeline of config.model and config.lora; computes nothing.

    Args:
      config: the whole configuration.
      mesh: on which the network will run; None is one device.
    """
    model, video = config.model, config.model.video
    network = VideoDiT(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp=video.mlp,
        patch=model.patch,
        layout=Layout(mesh, model.attention),
        dtype=model.dtype,
        remat=model.remat,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
    )
    shape = (video.frames, video.height, video.width, video.channels)
    words = (video.text_tokens, video.text_width)
    # No weight's shape depends on the size of the video, so the example is small.
    z = jnp.zeros((1, 1, model.patch, model.patch, video.channels))
    text = jnp.zeros((1, 1, video.text_width))
    made = make_denoiser(network, (z, jnp.zeros(1), text), table(config.sharding))
    return Pipeline(
        encode=lambda prompts: Cond(jnp.asarray(word_vectors(prompts, *words))),
        uncond=Cond(jnp.zeros((1, *words), jnp.float32)),
        init=made.init,
        denoise=made.denoise,
        decode=Partial(first_frame),
        axes=made.axes,
        latent_shape=shape,
        prediction="velocity",
        load=lambda: _load(model.init),
        fingerprint="random",
        precise=PRECISE,
    )


def word_vectors(
    prompts: Sequence[str], tokens: int, width: int
) -> Float[np.ndarray, "b l d"]:
    """A unit Gaussian vector for each word, by its checksum; 0 past the last word."""
    out = np.zeros((len(prompts), tokens, width), np.float32)
    for row, prompt in enumerate(prompts):
        for column, word in enumerate(prompt.lower().split()[:tokens]):
            random = np.random.default_rng(zlib.crc32(word.encode()))
            out[row, column] = random.standard_normal(width, np.float32)
    return out


def first_frame(x0: Float[Array, "b f h w c"]) -> UInt8[Array, "b h w rgb"]:
    """Three channels of the first frame, [-1, 1] to uint8."""
    pixels = jnp.clip(jnp.round((x0[:, 0, :, :, :3] + 1.0) * 127.5), 0, 255)
    return pixels.astype(jnp.uint8)


def _load(init: str) -> None:
    """No weights: right for a random start, an error where others were asked for."""
    if init != "random":
        raise UserError(
            "there are no weights of the text-to-video network",
            got=f"model.init {init!r}",
            wanted='model.init "random", or --mode=plan, which needs none',
            way_out="the network is planned at full size and run at small ones",
        )
