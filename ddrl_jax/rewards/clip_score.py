"""CLIPScore: how well a picture fits its prompt, by the angle CLIP sees between them.

Hessel et al. 2021 (arXiv 2104.08718, eq. 1) define w max(cos(picture, prompt), 0) with
w = 2.5; diffusion papers report it with w = 100, as torchmetrics does, and so do we.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ddrl_jax.rewards.clip_folder import CLIP_L, ClipJudge, Load, cosine, load_clip

WEIGHT = 100.0  # 0 to 100; real pictures and their captions lie near 20 to 35


class ClipScore(NamedTuple):
    """A Reward: 100 max(cos(CLIP(picture), CLIP(prompt)), 0).

    Attributes:
      judge: see `load_clip`.
    """

    judge: ClipJudge

    def __call__(
        self, images: UInt8[Any, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the score of each picture with its prompt."""
        assert self.judge.prompts is not None
        found = cosine(self.judge.pictures(images), self.judge.prompts(prompts))
        return np.float32(WEIGHT) * np.maximum(found, np.float32(0.0))


def clip_score(clip: str = CLIP_L, load: Load = load_clip) -> ClipScore:
    """Returns the reward.

    Args:
      clip: folder or hub repository of a CLIP; others' numbers are of ViT-L/14.
      load: as `load_clip`.

    Raises:
      UserError: files that are missing, damaged or do not fit each other.
    """
    return ClipScore(load(clip))
