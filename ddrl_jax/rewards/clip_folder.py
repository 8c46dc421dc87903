"""A CLIP model as the judges use it: pictures and prompts in, unit vectors out.

Everything comes from one folder or hub repository in the transformers layout; weights
and processing files may lie in two, as with PickScore.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params
from ddrl_jax.models.clip import Clip, ClipConfig
from ddrl_jax.models.clip_tokenizer import Tokenize, clip_tokenize
from ddrl_jax.models.convert import to_jax
from ddrl_jax.models.folder import read_json, read_tensors
from ddrl_jax.models.hub import ROOT, resolve
from ddrl_jax.rewards.preprocess import Processor

CLIP_L = "openai/clip-vit-large-patch14"  # of the aesthetic score and CLIPScore
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what PickScore and HPSv2 start from
KEYS = ("rewards.clip", "rewards.clip")  # of weights, and of processing files
CHUNK = 16  # pictures or prompts a call: one shape, so each compiles once
# Products in full float32: a judge must not depend on the fast modes of a device.
PRECISION = "highest"

Features = Float[np.ndarray, "b d"]
See = Callable[[Any], Features]
Load = Callable[..., "ClipJudge"]  # `load_clip`, or `RewardNetworks.clip`


class ClipJudge(NamedTuple):
    """A frozen CLIP on the default device.

    Attributes:
      pictures: uint8 [b h w 3], NumPy or on a device -> unit vectors [b d] float32.
      prompts: b prompts -> unit vectors [b d] float32; None without the text tower.
      scale: exp(logit_scale), 1 / temperature of its training.
      width: d.
    """

    pictures: See
    prompts: Callable[[Sequence[str]], Features] | None
    scale: float
    width: int


class ClipFiles(NamedTuple):
    """What the files of a CLIP folder say besides its weights."""

    folder: Path
    json: Mapping[str, Any]
    config: ClipConfig
    processor: Processor


def read_clip_files(path_or_repo_id: str, key: str = "") -> ClipFiles:
    """Reads config.json and the picture processing of a folder or hub repository.

    Args:
      path_or_repo_id: of the model.
      key: of the configuration that names it, for messages.

    Raises:
      UserError: not there, not a CLIP, or a setting that can not be honoured.
    """
    folder = resolve(path_or_repo_id, key=key)
    found = read_json(folder / "config.json")
    return ClipFiles(folder, found, ClipConfig.from_json(found), read_processor(folder))


def read_processor(folder: Path) -> Processor:
    """The picture processing of a folder: preprocessor_config.json, or the newer
    processor_config.json, which holds it as one of its parts.

    Raises:
      UserError: neither is there, or it asks for something else than CLIP does.
    """
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    if older.is_file() or not newer.is_file():
        return Processor.from_json(read_json(older), str(older))
    part = read_json(newer).get("image_processor")
    if not isinstance(part, Mapping):
        raise UserError(
            f"{newer} does not say how pictures are processed",
            got="no image_processor",
            wanted="the settings of CLIPImageProcessor",
            way_out="download the model again, with its preprocessor_config.json",
        )
    return Processor.from_json(part, str(newer))


class RewardNetworks:
    """The CLIPs of a run's rewards: each tower of a folder is on the device once."""

    def __init__(self):
        self._clips: dict[tuple[str, str], ClipJudge] = {}

    def clip(
        self,
        path_or_repo_id: str,
        processing: str = "",
        *,
        text: bool = True,
        keys: Sequence[str] = KEYS,
    ) -> ClipJudge:
        """As `load_clip`, or what an earlier call loaded."""
        key = (path_or_repo_id, processing)
        known = self._clips.get(key)
        if known is None or (text and known.prompts is None):
            seen = known and known.pictures
            known = load_clip(
                path_or_repo_id, processing, text=text, pictures=seen, keys=keys
            )
            self._clips[key] = known
        return known


def load_clip(
    path_or_repo_id: str,
    processing: str = "",
    *,
    text: bool = True,
    pictures: See | None = None,
    keys: Sequence[str] = KEYS,
) -> ClipJudge:
    """Loads a CLIP for judging.

    Args:
      path_or_repo_id: folder or hub repository with config.json and safetensors.
      processing: folder or repository of tokenizer and picture processing; "" where
        they lie beside the weights.
      text: False leaves the text tower out of memory.
      pictures: of a judge that was loaded without its text tower; in place of another
        copy of the picture tower.
      keys: of the configuration that name the two, for messages.

    Raises:
      UserError: files that are missing, damaged or do not fit each other.
    """
    folder = resolve(path_or_repo_id, parts=(ROOT,), key=keys[0])
    found = read_json(folder / "config.json")
    config = ClipConfig.from_json(found)
    sources = resolve(processing, key=keys[1]) if processing else folder
    params = to_jax("clip", read_tensors(folder, judge=True), found)
    tokenize = clip_tokenize(sources, config.text) if text else None
    return make_judge(config, params, read_processor(sources), tokenize, pictures)


def make_judge(
    config: ClipConfig,
    params: Params,
    processor: Processor,
    tokenize: Tokenize | None,
    pictures: See | None = None,
) -> ClipJudge:
    """A ClipJudge of weights at hand; without `tokenize` the text tower is dropped.

    `pictures` stands in for the picture tower where that is on the device already.

    Raises:
      UserError: the processor makes pictures of another size than the tower takes.
    """
    side = config.vision.image_size
    if processor.size != (side, side):
        raise UserError(
            "picture processing and weights of CLIP do not belong together",
            got=f"pictures of {processor.size}",
            wanted=f"{(side, side)}, the image_size of config.json",
            way_out="name the folder of tokenizer and preprocessor_config.json that"
            " belongs to the weights",
        )
    network = Clip(config.text, config.vision, config.projection_dim)
    scale = np.asarray(params["logit_scale"], np.float32)

    def tower(method: str, parts: Sequence[str], prepare: Callable[[Any], Array]):
        weights = {part: params[part] for part in parts} | {"logit_scale": scale}
        weights = jax.device_put(jax.tree.map(np.float32, weights))
        return partial(_in_chunks, partial(_unit(network, method, prepare), weights))

    if pictures is None:
        parts = ("vision_model", "visual_projection")
        see = tower("image_features", parts, processor)
        pictures = lambda images: see(_checked(images))  # noqa: E731
    prompts = None
    if tokenize is not None:
        parts = ("text_model", "text_projection")
        read = tower("text_features", parts, lambda ids: ids)
        prompts = partial(_read_once, tokenize, read, config.projection_dim)
    temperature = float(np.exp(scale.astype(np.float64)))
    return ClipJudge(pictures, prompts, temperature, config.projection_dim)


def _read_once(
    tokenize: Tokenize, read: See, width: int, texts: Sequence[str]
) -> Features:
    """Unit vectors [b width]; the samples of a group share a prompt, read once."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if not index:
        return np.zeros((0, width), np.float32)
    vectors = read(tokenize(list(index)))
    return vectors[[index[text] for text in texts]]


def _unit(
    network: Clip, method: str, prepare: Callable[[Any], Array]
) -> Callable[[Params, Array], Array]:
    """A jitted (weights, inputs) -> e / |e|, in full float32."""

    @jax.jit
    def apply(weights: Params, inputs: Array) -> Array:
        with jax.default_matmul_precision(PRECISION):
            e = network.apply({"params": weights}, prepare(inputs), method=method)
            return e / jnp.linalg.norm(e, axis=-1, keepdims=True)

    return apply


def _checked(images: Any) -> Shaped[np.ndarray, "b h w c"]:
    """Pictures on the host, or a UserError."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            "CLIP can not look at these pictures",
            got=f"{images.dtype} {list(images.shape)}",
            wanted="uint8 [b h w 3], 0 to 255",
            way_out="round and convert the decoded pictures to uint8 first; floats in"
            " [0, 1] would be scaled twice and look black",
        )
    return np.asarray(images)


def _in_chunks(
    function: Callable[[Any], Array], rows: Shaped[np.ndarray, "b ..."]
) -> Features:
    """Applies a jitted function to chunks of one shape; the padding is cut off."""
    found = []
    for start in range(0, max(len(rows), 1), CHUNK):  # once for an empty batch too
        chunk = rows[start : start + CHUNK]
        pad = [(0, CHUNK - len(chunk))] + [(0, 0)] * (rows.ndim - 1)
        found.append(np.asarray(function(np.pad(chunk, pad)))[: len(chunk)])
    return np.concatenate(found)


def cosine(a: Features, b: Features) -> Float[np.ndarray, " b"]:
    """cos of each row of unit vectors with the same row of the other, in [-1, 1]."""
    return np.asarray(np.sum(a * b, axis=-1, dtype=np.float32))
