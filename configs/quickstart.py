"""DDRL on the emoji model: smaller JPEG files, anchored to the emoji themselves.

    python -m ddrl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The main job of this repository and what `make demo` runs, meant for two cores and ten
minutes. Group advantages, the clipped surrogate on three of the nine noisy steps of the
Flow-GRPO sampler, and the diffusion loss on captioned emoji in every update. The judge
(retrieval among all captions) is held out: nothing is trained on it.

Keys to turn first: data_term.weight (0 lets the pictures go blank; 0.003 to 0.02 is the
range of interest at this log-prob scale) and rewards.weights.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import shrink


def get_config(variant: str = "") -> ConfigDict:
    c = base.get_config()
    c.name = "quickstart"
    c.data_term.weight = 0.005
    # wide, for log-probs that are means over 3,072 pixels and a few updates an epoch
    c.policy.clip_range = 3e-3
    c.optimizer.warmup = 10  # five epochs: Adam's first steps are its largest
    return shrink(c, variant)
