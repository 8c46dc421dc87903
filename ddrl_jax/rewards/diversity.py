"""How different the pictures of a batch are, for judging runs (never trained on)."""

import numpy as np
from jaxtyping import Float, Int, Shaped

FLOOR = 1e-12  # shortest feature vector; one of zeros gets cosine 0 instead of NaN


def diversity(
    features: Shaped[np.ndarray, "b d"], group: Int[np.ndarray, " b"]
) -> dict[str, float]:
    """Mean distance 1 - cosine of pairs of pictures, by held-out features.

    Args:
      features: [b d], e.g. of `Judge.features`.
      group: [b], equal numbers share a prompt.

    Returns:
      "within_prompt" over pairs of one prompt (0 when each prompt shows one picture
      only) and "across_prompts" over pairs of two. A kind without pairs is left out.
    """
    x = np.asarray(features, np.float64)
    length = np.sqrt(np.sum(x * x, -1, keepdims=True))
    x = x / np.maximum(length, FLOOR)
    return _by_group(1.0 - x @ x.T, group)


def pixel_diversity(
    images: Shaped[np.ndarray, "b h w c"], group: Int[np.ndarray, " b"]
) -> dict[str, float]:
    """Mean root-mean-square difference of pairs of uint8 pictures, in units of 255.

    Args:
      images: uint8 [b h w c].
      group: see `diversity`.

    Returns:
      "pixel_within_prompt" and "pixel_across_prompts"; 0 is equal, 1 black and white.
    """
    x = np.asarray(images, np.float64).reshape(len(images), -1) / 255.0
    square = np.sum(x * x, -1)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab; rounding can leave it a hair below 0
    distance = np.maximum(square[:, None] + square[None] - 2.0 * x @ x.T, 0.0)
    found = _by_group(np.sqrt(distance / x.shape[1]), group)
    return {f"pixel_{name}": value for name, value in found.items()}


def _by_group(
    distance: Float[np.ndarray, "b b"], group: Int[np.ndarray, " b"]
) -> dict[str, float]:
    same = group[:, None] == group[None]
    pair = np.triu(np.ones_like(same), 1)
    chosen = {"within_prompt": pair & same, "across_prompts": pair & ~same}
    return {n: float(distance[c].mean()) for n, c in chosen.items() if c.any()}
