"""The embedded data: Noto emoji drawn at a random size, position and rotation.

One caption has many valid pictures, so that "a smaller file" has honest answers (draw
it small) beside the dishonest one (draw nothing). Everything is drawn on device from
one stack of 64 px pictures; a record and a key give the same picture anywhere.
"""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import DataSource

ASSETS = Path(__file__).parent.parent / "assets"
_SHIPPED = "reinstall ddrl_jax, or rebuild it with ddrl_jax/assets/build_emoji.py"
_OWN = "correct --config.data.path; --mode=sample writes such a set and prints its path"
SUPERSAMPLING = 2  # samples a pixel and axis: without it a small emoji aliases


def read_emoji(
    root: Path = ASSETS / "emoji" / "1.0.0",
) -> tuple[UInt8[np.ndarray, "r h w 3"], tuple[str, ...]]:
    """Reads the pictures [r h w 3], all of one size, and captions of a TFDS data set.

    Raises:
      UserError: the folder is missing or can not be read, lacks pictures or captions,
        or its pictures differ in size.
    """
    import tensorflow_datasets as tfds  # slow import, only where data is read

    try:
        builder = cast(Any, tfds.builder_from_directory(str(root)))
        # Decoded here: TFDS would ask every user to install OpenCV.
        skip = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source("train", decoders=skip)
        rows = records.__getitems__(list(range(len(records))))
        pictures = [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in rows]
        captions = tuple(row["caption"].decode() for row in rows)
    except Exception as e:
        raise UserError(
            f"the data set {root} can not be read ({type(e).__name__}: {e})",
            got=f"{'a folder' if root.is_dir() else 'nothing'} at {root}",
            wanted="a TFDS data set over array_record with 'image', a picture, and "
            "'caption', UTF-8 text",
            way_out=_SHIPPED if root.is_relative_to(ASSETS) else _OWN,
        ) from e
    shapes = sorted({picture.shape for picture in pictures})
    if len(shapes) != 1:
        raise UserError(
            f"the pictures of the data set {root} are not of one size",
            got=", ".join(map(as_size, shapes[:5])) or "no picture",
            wanted="one height and width for all of them",
            way_out="write the set anew, as --mode=sample does",
        )
    return np.stack(pictures), captions


def as_size(shape: tuple[int, ...]) -> str:
    """(32, 32, 3) -> "32 x 32 x 3"."""
    return " x ".join(map(str, shape))


def _grid(size: int) -> Float[Array, "h w ss 2"]:
    """Sub-pixel centres of the output in [0, 1]^2, (y, x) order."""
    n = size * SUPERSAMPLING
    centre = (jnp.arange(n) + 0.5) / n
    yx = jnp.stack(jnp.meshgrid(centre, centre, indexing="ij"), -1)
    cells = yx.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 2)
    return cells.transpose(0, 2, 1, 3, 4).reshape(size, size, -1, 2)


def _bilinear(picture: Float[Array, "h w c"], yx: Float[Array, "*p 2"]) -> Array:
    """Samples a picture at pixel coordinates; outside is white (1)."""
    padded = jnp.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=1.0)
    limit = picture.shape[0]
    yx = jnp.clip(yx, -1.0, limit)  # beyond the white border everything is white
    low = jnp.clip(jnp.floor(yx), -1, limit - 1)
    fraction = yx - low
    y, x = (low.astype(jnp.int32) + 1)[..., 0], (low.astype(jnp.int32) + 1)[..., 1]
    fy, fx = fraction[..., :1], fraction[..., 1:]
    top = padded[y, x] * (1 - fx) + padded[y, x + 1] * fx
    bottom = padded[y + 1, x] * (1 - fx) + padded[y + 1, x + 1] * fx
    return top * (1 - fy) + bottom * fy


def draw(
    picture: Float[Array, "h h c"],
    key: Key[Array, ""],
    *,
    size: int,
    min_scale: float,
    max_scale: float,
    rotation: float,
) -> Float[Array, "{size} {size} c"]:
    """Draws one picture at a random size, rotation and position on white.

    Args:
      picture: values in [-1, 1], white background.
      key: decides size, angle and place.
      size: pixels of the result.
      min_scale: smallest width as a share of the page.
      max_scale: largest.
      rotation: degrees either way.

    Returns:
      The page, values in [-1, 1].
    """
    scale_key, angle_key, place_key = jax.random.split(key, 3)
    scale = jax.random.uniform(scale_key, (), minval=min_scale, maxval=max_scale)
    angle = jnp.deg2rad(rotation) * jax.random.uniform(angle_key, (), minval=-1.0)
    place = jax.random.uniform(place_key, (2,))
    centre = scale / 2 + place * (1 - scale)
    offset = (_grid(size) - centre) / scale
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack(
        [
            cos * offset[..., 0] - sin * offset[..., 1],
            sin * offset[..., 0] + cos * offset[..., 1],
        ],
        -1,
    )
    source = (turned + 0.5) * picture.shape[0] - 0.5
    return _bilinear(picture, source).mean(axis=2)


def emoji_source(
    size: int,
    min_scale: float,
    max_scale: float,
    rotation: float,
    root: Path = ASSETS / "emoji" / "1.0.0",
) -> DataSource:
    """Returns the emoji as a data source whose pictures live on device.

    Args:
      size: pixels of a training picture.
      min_scale: see `draw`.
      max_scale: see `draw`.
      rotation: see `draw`, degrees.
      root: the TFDS data set.
    """
    pictures, captions = read_emoji(root)
    stack = jnp.asarray(pictures, jnp.float32) / 127.5 - 1.0
    one = partial(
        draw, size=size, min_scale=min_scale, max_scale=max_scale, rotation=rotation
    )

    def latents(
        records: Int[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        return jax.vmap(one)(stack[records], keys)

    digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    return DataSource(captions=captions, latents=latents, digest=digest)
