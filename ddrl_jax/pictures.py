"""Picture grids with captions, on the host, and PNG files of them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between two pictures
_BACKGROUND = 255
_INK = (60, 60, 60)
LINE = 12  # pixels of a line of captions, PIL's default font at size 10


def grid(
    images: UInt8[np.ndarray, "b h w c"],
    columns: int,
    upscale: int = 1,
    captions: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays pictures out row by row.

    Args:
      images: at least one picture, one or three channels.
      columns: pictures a row.
      upscale: nearest-neighbour factor.
      captions: one a picture, written under it and cut to its width.

    Returns:
      One picture, uint8 [H W 3].
    """
    pictures = np.repeat(np.repeat(_rgb(images), upscale, 1), upscale, 2)
    count, height, width, _ = pictures.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    cell_h = height + GAP + (LINE if captions is not None else 0)
    cell_w = width + GAP
    sheet = (rows * cell_h + GAP, columns * cell_w + GAP, 3)
    canvas = np.full(sheet, _BACKGROUND, np.uint8)
    corners = [
        (GAP + (i // columns) * cell_h, GAP + (i % columns) * cell_w)
        for i in range(count)
    ]
    for picture, (top, left) in zip(pictures, corners, strict=True):
        canvas[top : top + height, left : left + width] = picture
    if captions is None:
        return canvas
    places = [(left, top + height, width) for top, left in corners]
    return _write_captions(canvas, captions, places)


def before_after(
    before: UInt8[np.ndarray, "b h w c"],
    after: UInt8[np.ndarray, "b h w c"],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    upscale: int = 1,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays out pairs of pictures: a row before, and below it the same prompts after.

    Args:
      before: pictures of the first policy.
      after: pictures of the same prompts and noise from the last policy.
      captions: one a pair, under the lower picture.
      columns: pairs a row.
      upscale: nearest-neighbour factor.

    Returns:
      One picture, uint8 [H W 3].
    """
    gap = np.full((len(before), 1, *before.shape[2:]), _BACKGROUND, np.uint8)
    # One picture a pair, joined before the upscaling: the gap is scaled with it.
    return grid(np.concatenate([before, gap, after], 1), columns, upscale, captions)


def save_png(path: str | os.PathLike, array: UInt8[np.ndarray, "h w c"]) -> Path:
    """Writes a PNG so that a reader never sees half of it; makes its folder.

    Returns:
      The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    Image.fromarray(_rgb(array[None])[0]).save(draft, format="PNG")
    draft.replace(path)
    return path


def _rgb(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _write_captions(
    canvas: np.ndarray, captions: Sequence[str], places: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for caption, (left, top, width) in zip(captions, places, strict=True):
        while caption and draw.textlength(caption, font=font) > width:
            caption = caption[:-1]
        draw.text((left, top), caption, fill=_INK, font=font)
    return np.asarray(sheet)
