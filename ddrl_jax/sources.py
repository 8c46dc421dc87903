"""config.data -> the captioned data of a run: drawn, stored, or latents of a cache."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddrl_jax.data.emoji import emoji_source
from ddrl_jax.data.images import Pictures
from ddrl_jax.data.latent_writer import write_latents
from ddrl_jax.data.latents import LatentSource, latent_source
from ddrl_jax.data.picture_folder import read_folder
from ddrl_jax.data.picture_tfds import read_tfds
from ddrl_jax.data.read_ahead import ReadAhead
from ddrl_jax.data.samples import sample_source
from ddrl_jax.interfaces import Cond, DataSource, Pipeline
from ddrl_jax.models.folder import fingerprint
from ddrl_jax.models.stable_diffusion import model_folder


def make_source(config: Any, pipeline: Pipeline) -> DataSource | None:
    """The captioned data of config.data, or None for source "none".

    Args:
      config: the whole configuration.
      pipeline: whose latents the data become.

    Raises:
      UserError: data that are missing or can not be read.
    """
    data = config.data
    if data.source == "none":
        return None
    if config.model.name == "stable_diffusion":
        return _cached(config, pipeline, _pictures(config, pipeline))
    if data.source == "samples":
        return sample_source(data.path)
    return emoji_source(
        config.model.image_size, data.min_scale, data.max_scale, data.rotation
    )


def without_data(config: Any) -> Any:
    """A copy for the modes that use a policy and no data: none need be there.

    The configuration itself where its prompts are the captions of the data.
    """
    if config.prompts.source == "data" or not config.policy.weight:
        return config
    config = config.copy_and_resolve_references()
    config.data.update(source="none", heldout=0)
    config.data_term.weight = 0.0
    return config


def _pictures(config: Any, pipeline: Pipeline) -> Pictures:
    """The pictures of a folder or a TFDS data set, in the size the model works on."""
    data = config.data
    resolution = jax.eval_shape(
        pipeline.decode, jax.ShapeDtypeStruct((1, *pipeline.latent_shape), np.float32)
    ).shape[1]
    if data.source == "folder":
        return read_folder(data.path, resolution, data.resample, data.on_bad)
    names = {"samples": ("train", "image", "caption")}
    split, image, caption = names.get(
        data.source, (data.split, data.image_feature, data.caption_feature)
    )
    return read_tfds(
        data.path, resolution, split, image, caption, data.tfds_dir, data.resample,
        data.on_bad,
    )  # fmt: skip


def _cached(config: Any, pipeline: Pipeline, pictures: Pictures) -> DataSource:
    """Their latents and embeddings, from a cache that is written once."""
    data, model = config.data, config.model
    folder = model_folder(model)
    encode = pipeline.encode_images
    assert encode is not None, "Stable Diffusion encodes pictures"
    posterior = jax.jit(lambda encode, pixels: encode(pixels))
    weights = [folder / "vae", folder / "text_encoder"]
    path = write_latents(
        Path(data.cache).expanduser(),
        pictures,
        lambda pixels: posterior(encode, pixels),
        pipeline.encode,
        data.cache_batch,
        {
            "weights": fingerprint(weights, model.variant),
            "tokenizer": _digest(folder / "tokenizer"),
        },
        dtype=data.cache_dtype,
        text_dtype=data.cache_text_dtype,
    )
    return _streamed(latent_source(path))


def _digest(folder: Path) -> str:
    """Of all files of a small folder, by name: a text's embedding depends on them."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def _streamed(cache: LatentSource) -> DataSource:
    captions = cache.captions

    def fetch(records: np.ndarray) -> dict[str, Any]:
        return {
            "latents": cache.fetch(records),
            "cond": cache.encode([captions[int(r)] for r in records]),
        }

    def latents(fetched: Any, keys: jax.Array) -> Any:
        return cache.latents(fetched["latents"], keys)

    def cond(fetched: Any) -> Cond:
        return fetched["cond"]

    ahead = ReadAhead(fetch)
    skipped = sum(cache.skipped.values())
    return DataSource(captions, latents, ahead, cond, ahead.announce, skipped)
