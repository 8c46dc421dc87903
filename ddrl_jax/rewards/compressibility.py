"""JPEG size as a reward, exactly as in DDPO (arXiv 2305.13301, section 5.1).

A picture is written by Pillow as JPEG of quality 95 with the default 4:2:0 chroma;
its size in kB (1000 bytes) is the incompressibility, and minus that the
compressibility. A 32 px picture is enlarged first: below about 64 px the header of
620 bytes hides the picture.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from ddrl_jax.errors import UserError

QUALITY = 95
BYTES_PER_KB = 1000.0


def jpeg_kilobytes(
    images: Shaped[np.ndarray, "*shape"], upscale: int = 1
) -> Float[np.ndarray, " b"]:
    """Measures the JPEG size of pictures.

    Args:
      images: uint8 [b h w 3].
      upscale: every pixel becomes a square of so many pixels a side.

    Returns:
      kB (1000 bytes) of each, float32.

    Raises:
      UserError: the pictures are not uint8 [b h w 3], or upscale is below 1.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            "the JPEG size of these pictures can not be measured",
            got=f"{images.dtype} {list(images.shape)}",
            wanted="uint8 [b h w 3], 0 to 255",
            way_out="round and convert the decoded pictures to uint8 first",
        )
    if not isinstance(upscale, int) or upscale < 1:
        raise UserError(
            "pictures can only be enlarged by whole pixels before JPEG",
            got=f"rewards.jpeg_upscale={upscale!r}",
            wanted="an integer of at least 1",
            way_out="set --config.rewards.jpeg_upscale=4 (32 px) or 1 (512 px)",
        )
    large = images.repeat(upscale, axis=1).repeat(upscale, axis=2)
    return np.array([_jpeg_bytes(x) / BYTES_PER_KB for x in large], np.float32)


def _jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


class JpegSize(NamedTuple):
    """A Reward: sign times the JPEG size in kB.

    Attributes:
      sign: +1 incompressibility, -1 compressibility.
      upscale: see `jpeg_kilobytes`.
      splittable: the pool may cut a batch into parts for its threads.
    """

    sign: float
    upscale: int = 1
    splittable: bool = True

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the signed size of each picture; the prompts play no part."""
        del prompts
        return np.float32(self.sign) * jpeg_kilobytes(images, self.upscale)


def compressibility(upscale: int = 1) -> JpegSize:
    """Returns the reward -kB: smaller files are better."""
    return JpegSize(-1.0, upscale)


def incompressibility(upscale: int = 1) -> JpegSize:
    """Returns the reward +kB: larger files are better."""
    return JpegSize(1.0, upscale)
