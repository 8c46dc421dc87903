"""config.data -> the captioned data of a run: drawn, stored, or latents of a cache."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddrl_jax.data.emoji import emoji_source
from ddrl_jax.data.images import Pictures
from ddrl_jax.data.latent_writer import FORMAT, tell_skipped, write_latents
from ddrl_jax.data.latents import LatentSource, latent_source
from ddrl_jax.data.picture_folder import UNREADABLE, read_folder
from ddrl_jax.data.picture_tfds import read_tfds, tfds_folder
from ddrl_jax.data.read_ahead import ReadAhead
from ddrl_jax.data.samples import sample_source
from ddrl_jax.data.seen import files_digest, recall, remember
from ddrl_jax.file_tree import spelt_out
from ddrl_jax.interfaces import Cond, DataSource, Pipeline
from ddrl_jax.models.folder import fingerprint
from ddrl_jax.models.sd_folder import described, read_source
from ddrl_jax.models.stable_diffusion import model_folder

ANY_PROMPT = "cat"  # which every model can read


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
        return _streamed(latent_source(_cached(config, pipeline)))
    if data.source == "samples":
        return sample_source(data.path, pipeline.latent_shape)
    return emoji_source(
        config.model.image_size, data.min_scale, data.max_scale, data.rotation
    )


def in_short(source: DataSource | None) -> dict[str, str]:
    """What names the contents of the data, for processes to compare."""
    captions = json.dumps(source.captions if source else ())
    return {
        "the data": source.digest if source else "none",
        "the captions of the data": hashlib.sha256(captions.encode()).hexdigest()[:16],
    }


def without_data(config: Any, mode: str) -> Any:
    """A copy for the modes that use a policy and no data: none need be there.

    What is exported has nothing to do with prompts either; to sample, it is the
    configuration itself where its prompts are the captions of the data.

    Args:
      config: the whole configuration.
      mode: "sample" or "export".
    """
    if mode == "sample" and config.prompts.source == "data":
        return config
    config = config.copy_and_resolve_references()
    config.data.update(source="none", heldout=0)
    config.data_term.weight = 0.0
    if mode == "export":
        config.prompts.update(source="list", list=(ANY_PROMPT,), limit=0)
    return config


def _resolution(pipeline: Pipeline) -> int:
    """Pixels of a side of the pictures that the model works on."""
    latent = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), np.float32)
    return jax.eval_shape(pipeline.decode, latent).shape[1]


def _features(data: Any) -> tuple[str, str, str]:
    """(split, image feature, caption feature) of a TFDS data set."""
    if data.source == "samples":
        return "train", "image", "caption"
    return data.split, data.image_feature, data.caption_feature


def _pictures(data: Any, resolution: int) -> Pictures:
    """The pictures of a folder or a TFDS data set, in the size the model works on."""
    if data.source == "folder":
        return read_folder(data.path, resolution, data.resample, data.on_bad)
    return read_tfds(
        data.path,
        resolution,
        *_features(data),
        data.tfds_dir,
        data.resample,
        data.on_bad,
    )


def _cached(config: Any, pipeline: Pipeline) -> Path:
    """The cache of their latents and embeddings, which is written once.

    Data whose files are as they were when it was written are not read again.
    """
    data, model = config.data, config.model
    folder = model_folder(model)
    caches = Path(spelt_out(data.cache, "--config.data.cache"))
    encode, resolution = pipeline.encode_images, _resolution(pipeline)
    assert encode is not None, "Stable Diffusion encodes pictures"
    source = read_source(folder, model.variant)
    weights = [folder / "vae", folder / "text_encoder"]
    whose = {
        "weights": fingerprint(weights, model.variant),
        "tokenizer": _digest(folder / "tokenizer"),
        "networks": described(source.vae, source.text),
        "vae_dtype": model.vae_dtype,
    }
    stored = Path(data.path)
    if data.source == "tfds":
        stored = tfds_folder(data.path, data.tfds_dir)
    key = {
        **whose,
        "source": [data.source, str(stored.resolve()), *_features(data)],
        "files": files_digest(stored),
        "pictures": [resolution, data.resample, data.on_bad],
        "dtypes": [data.cache_dtype, data.cache_text_dtype],
        "format": FORMAT,
    }
    known = recall(caches, key) if key["files"] else None
    if known is not None:
        tell_skipped(known)
        return known
    posterior = jax.jit(lambda encode, pixels: encode(pixels))
    pictures = _pictures(data, resolution)
    path = write_latents(
        caches,
        pictures,
        lambda pixels: posterior(encode, pixels),
        pipeline.encode,
        data.cache_batch,
        whose,
        dtype=data.cache_dtype,
        text_dtype=data.cache_text_dtype,
    )
    # Files that could not be read may be there for the next start, and what changed
    # since they were looked at may be put back: such data are read again.
    as_seen = files_digest(stored) == key["files"]
    if key["files"] and as_seen and UNREADABLE not in pictures.faults:
        remember(caches, key, path)
    return path


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
    announce, name = ahead.announce, cache.folder.name  # which has a digest
    return DataSource(captions, latents, ahead, cond, announce, skipped, name)
