"""What people prefer, learned from their choices: PickScore v1 and HPSv2.

Both are a CLIP ViT-H/14 trained on further pairs of pictures, so both are an angle
between picture and prompt; they differ in training data, scale and picture processing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.models.clip_tokenizer import clip_tokenize
from ddrl_jax.models.convert import to_jax
from ddrl_jax.models.hub import resolve_file
from ddrl_jax.rewards.clip_folder import (
    CLIP_H,
    ClipJudge,
    Load,
    cosine,
    load_clip,
    make_judge,
    read_clip_files,
)
from ddrl_jax.rewards.open_clip import from_open_clip
from ddrl_jax.rewards.tensor_file import read_tensor_file

PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2 = "xswu/HPSv2:HPS_v2.1_compressed.pt"
HPS_SCALE = 100.0  # of the tables of its paper; its package returns the cosine itself


class Preference(NamedTuple):
    """A Reward: scale cos(CLIP(picture), CLIP(prompt)).

    Attributes:
      judge: see `load_clip`.
      scale: of the cosine.
    """

    judge: ClipJudge
    scale: float

    def __call__(
        self, images: UInt8[Any, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the score of each picture with its prompt."""
        assert self.judge.prompts is not None
        found = cosine(self.judge.pictures(images), self.judge.prompts(prompts))
        return np.float32(self.scale) * found


def pickscore(
    weights: str = PICKSCORE, clip: str = CLIP_H, load: Load = load_clip
) -> Preference:
    """PickScore (Kirstain 2023, arXiv 2305.01569): exp(logit_scale) cos.

    exp(logit_scale) is about 100, scores lie near 16 to 25. Flow-GRPO divides them by
    26; here the weight of the reward does that.

    Args:
      weights: folder or hub repository with config.json and safetensors.
      clip: folder or repository of the tokenizer and the picture processing.
      load: as `load_clip`.

    Raises:
      UserError: files that are missing, damaged or do not fit each other.
    """
    judge = load(weights, clip, keys=("rewards.pickscore", "rewards.clip_h"))
    return Preference(judge, judge.scale)


def hpsv2(weights: str = HPSV2, clip: str = CLIP_H) -> Preference:
    """HPSv2 (Wu 2023, arXiv 2306.09341): 100 cos(picture, prompt), about 20 to 35.

    Its pictures keep their whole area: the longer side becomes 224, the rest is black.

    Args:
      weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, a state dict of open_clip
        (read without running its pickle), or a .safetensors of it; a path, or
        "owner/name:file" of the hub.
      clip: folder or hub repository of config.json, tokenizer and picture processing.

    Raises:
      UserError: no file is named, or files that are missing, damaged or do not fit.
    """
    if not weights:
        raise UserError(
            "the reward hpsv2 needs the file of its weights",
            got="rewards.hpsv2=''",
            wanted="the path of HPS_v2.1_compressed.pt, or its place on the hub",
            way_out=f"--config.rewards.hpsv2={HPSV2}",
        )
    files = read_clip_files(clip, "rewards.clip_h")  # first: they are small
    tokenize = clip_tokenize(files.folder, files.config.text)
    content = read_tensor_file(resolve_file(weights, "rewards.hpsv2"))
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, np.ndarray) for tensor in tensors.values()
    ):
        raise UserError(
            f"{weights} holds no state dict",
            got=", ".join(map(str, content))[:200],
            wanted="tensors by name, alone or under 'state_dict'",
            way_out=f"--config.rewards.hpsv2={HPSV2}",
        )
    params = to_jax("clip", from_open_clip(tensors, weights), files.json)
    processor = files.processor._replace(
        shortest=None, exact=None, crop=None, longest=files.config.vision.image_size
    )
    judge = make_judge(files.config, params, processor, tokenize)
    return Preference(judge, HPS_SCALE)
