"""The LAION aesthetic predictor: how much people would like a picture, about 1 to 10.

CLIP ViT-L/14 sees the picture; five linear layers without activations between them
(Schuhmann, improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE) score the
direction of its embedding. The reward of DDPO (arXiv 2305.13301, section 5.1).
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.models.hub import resolve_file
from ddrl_jax.rewards.clip_folder import CLIP_L, PRECISION, ClipJudge, Load, load_clip
from ddrl_jax.rewards.tensor_file import read_tensor_file

LAYERS = (0, 2, 4, 6, 7)  # the linear ones; those between are dropout
# of sac+logos+ava1-l14-linearMSE.pth as its authors published it
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"  # the same, on the hub

Head = tuple[tuple[Array, Array], ...]  # (weight [o i], bias [o]) of each layer


def read_head(path: Path) -> Head:
    """Reads the five layers from the published .pth, or from a .safetensors of them.

    Args:
      path: of the file. A .pth is read without running its pickle; one of other bytes
        than the published gives a warning.

    Returns:
      float32 (weight [o i], bias [o]) from the first layer to the last.

    Raises:
      UserError: no such file, damaged, or not these five layers.
    """
    path = Path(path)
    layers = _layers(path, read_tensor_file(path))
    if path.suffix != ".safetensors":
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHA256:
            warnings.warn(
                f"{path} is not the published aesthetic head: sha256 {found[:16]}...,"
                f" not {SHA256[:16]}...; scores are not comparable with others'",
                stacklevel=2,
            )
    return layers


def _layers(path: Path, tensors: Mapping[str, Any]) -> Head:
    names = [f"layers.{i}.{leaf}" for i in LAYERS for leaf in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    extra = [str(name) for name in tensors if name not in names]
    if missing or extra:
        lists = (("missing: ", missing), ("extra: ", extra))
        raise _bad_head(path, "; ".join(t + ", ".join(n[:10]) for t, n in lists if n))
    layers, width = [], None
    for i in LAYERS:
        weight, bias = (
            np.asarray(tensors[f"layers.{i}.{leaf}"]) for leaf in ("weight", "bias")
        )
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or weight.shape[1] != (width or weight.shape[1]):
            raise _bad_head(path, f"layers.{i} of {weight.shape} and {bias.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise _bad_head(path, f"layers.{i} is not finite")
        width = weight.shape[0]
        layers.append(tuple(jnp.asarray(x, jnp.float32) for x in (weight, bias)))
    if width != 1:
        raise _bad_head(path, f"{width} outputs")
    return tuple(layers)


def aesthetic_score(head: Head, e: Float[Array, "b d"]) -> Float[Array, " b"]:
    """W5 (W4 (W3 (W2 (W1 e + b1) + b2) + b3) + b4) + b5 of unit vectors e.

    Dropout is off, as it is after training; there are no activations.
    """
    with jax.default_matmul_precision(PRECISION):
        for weight, bias in head:
            e = e @ weight.T + bias
    return e[:, 0]


class Aesthetic(NamedTuple):
    """A Reward: the aesthetic score of each picture; the prompts play no part.

    Attributes:
      judge: CLIP ViT-L/14, see `load_clip`.
      head: see `read_head`.
    """

    judge: ClipJudge
    head: Head

    def __call__(
        self, images: UInt8[Any, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the score of each picture."""
        del prompts
        features = self.judge.pictures(images)
        return np.asarray(aesthetic_score(self.head, jnp.asarray(features)))


def aesthetic(
    head: str = HEAD, clip: str = CLIP_L, load: Load = load_clip
) -> Aesthetic:
    """Returns the reward.

    Args:
      head: path of the head's file, or "owner/name:file" of the hub.
      clip: folder or hub repository of CLIP ViT-L/14.
      load: as `load_clip`.

    Raises:
      UserError: no head is named, or files that are missing, damaged or do not fit.
    """
    if not head:
        raise UserError(
            "the aesthetic reward needs the file of its head",
            got="rewards.aesthetic_head=''",
            wanted="the path of sac+logos+ava1-l14-linearMSE.pth (3.7 MB), or its place"
            " on the hub",
            way_out=f"--config.rewards.aesthetic_head={HEAD}",
        )
    # first: it is small, and CLIP is not
    layers = read_head(resolve_file(head, "rewards.aesthetic_head"))
    judge = load(clip, text=False)
    width = layers[0][0].shape[1]
    if width != judge.width:
        raise UserError(
            f"the aesthetic head {head} and the CLIP {clip} do not belong together",
            got=f"a head for {width} numbers, embeddings of {judge.width}",
            wanted=f"the same; the published head is for {CLIP_L}",
            way_out="change --config.rewards.clip or --config.rewards.aesthetic_head",
        )
    return Aesthetic(judge, layers)


def _bad_head(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not the head of the aesthetic predictor",
        got=reason,
        wanted=f"layers.i.weight and .bias for i in {LAYERS}, each fitting the next,"
        " one output",
        way_out=f"--config.rewards.aesthetic_head={HEAD}",
    )
