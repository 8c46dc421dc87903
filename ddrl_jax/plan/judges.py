"""The networks of a run's judges as shapes: what they keep on a device all the time.

Towers of CLIP and the aesthetic head, in float32. What a judge needs while it looks at
its pictures is not counted, nor the emoji's own judge (3 MB).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddrl_jax.models.folder import read_json
from ddrl_jax.models.networks import network_shapes
from ddrl_jax.rewards.aesthetic import LAYERS
from ddrl_jax.rewards.clip_folder import CLIP_H, CLIP_L
from ddrl_jax.rewards.preference import PICKSCORE
from ddrl_jax.rewards.registry import TINY
from ddrl_jax.rewards.tensor_file import read_tensor_file

PICTURE = ("vision_model", "visual_projection")
PROMPT = ("text_model", "text_projection")
SCALE = 4  # bytes of the temperature that each tower has of its own
HEAD = 4 * 927_969  # bytes of the published aesthetic head
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
VIT_L = {
    "projection_dim": 768,
    "text_config": _TEXT,
    "vision_config": _VISION | {"num_hidden_layers": 24, "patch_size": 14},
}
VIT_H = {
    "projection_dim": 1024,
    "text_config": _VISION | {"num_hidden_layers": 24},
    "vision_config": _VISION
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    | {"patch_size": 14},
}
# config.json of what the defaults name: their sizes are known without a download.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    CLIP_L: VIT_L,
    CLIP_H: VIT_H,
    PICKSCORE: VIT_H,
}


def judge_bytes(rewards: Any) -> dict[str, int | None]:
    """Bytes a device of each judge network; None where its sizes are not known.

    Args:
      rewards: the section of the configuration.
    """
    names = {*rewards.weights, *rewards.heldout}
    towers: dict[tuple[str, str], tuple[str, ...]] = {}
    if "aesthetic" in names:
        towers["CLIP", rewards.clip] = PICTURE
    if "clip_score" in names:  # shares the towers of the same folder
        towers["CLIP", rewards.clip] = PICTURE + PROMPT
    if "pickscore" in names:
        towers["PickScore", rewards.pickscore] = PICTURE + PROMPT
    if "hpsv2" in names:
        towers["HPSv2", rewards.clip_h] = PICTURE + PROMPT
    found: dict[str, int | None] = {
        f"{kind} of {place}": _clip_bytes(place, parts)
        for (kind, place), parts in towers.items()
    }
    if "aesthetic" in names:
        found["aesthetic head"] = _head_bytes(rewards.aesthetic_head)
    return found


def _clip_bytes(place: str, parts: tuple[str, ...]) -> int | None:
    """Of some parts of a CLIP: by the JSON of a folder, or as the name is known."""
    folder = TINY if place == "assets" else Path(place)
    known = read_json(folder / "config.json") if folder.is_dir() else KNOWN.get(place)
    if known is None:
        return None
    shapes = network_shapes("clip", known)
    leaves = jax.tree.leaves([shapes[part] for part in parts])
    towers = len(parts) // len(PICTURE)
    return 4 * sum(leaf.size for leaf in leaves) + SCALE * towers


def _head_bytes(place: str) -> int:
    path = TINY / "head.safetensors" if place == "assets" else Path(place)
    if not path.is_file():
        return HEAD
    tensors = read_tensor_file(path)
    layers = [f"layers.{i}.{leaf}" for i in LAYERS for leaf in ("weight", "bias")]
    return 4 * sum(np.size(tensors[name]) for name in layers)
