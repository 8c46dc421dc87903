"""Small pictures drawn by formula, and folders of them: the same on every machine."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

EXTENSIONS = ("png", "jpg", "webp")


def drawing(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    """A colour ramp with a disc: uint8 [height width 3]."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    ramp = np.stack([x, y, 0.5 + 0.5 * np.sin(5 * x + seed)], -1)
    disc = (x - 0.3) ** 2 + (y - 0.3) ** 2 < 0.04
    colour = np.array([seed * 37 % 256, seed * 91 % 256, seed * 17 % 256]) / 255
    return np.round(np.where(disc[..., None], colour, ramp) * 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, form, **options)
    return file.getvalue()


def write_drawing(path: Path, seed: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(drawing(seed, **size)).save(path, **options)


def write_folder(root: Path, captions: tuple[str, ...]) -> None:
    """NAME.png|jpg|webp in turn, each with its NAME.txt."""
    for i, caption in enumerate(captions):
        write_drawing(root / f"{i:03d}.{EXTENSIONS[i % 3]}", i, width=20 + i)
        (root / f"{i:03d}.txt").write_text(caption, encoding="utf-8")
