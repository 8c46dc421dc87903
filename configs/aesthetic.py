"""DDPO: the LAION aesthetic score of Stable Diffusion's pictures, on 45 animals.

    python -m ddrl_jax.main --config=configs/aesthetic.py --workdir=runs/aesthetic

arXiv 2305.13301, section 5.1. The score is a linear head on CLIP ViT-L/14, computed on
device. Variants and what they set: configs/ddpo_sd.py. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import ddpo_sd


def get_config(variant: str = "") -> ConfigDict:
    c = ddpo_sd.task("aesthetic", variant, updates=2)
    c.rewards.weights = ConfigDict({"aesthetic": 1.0})
    c.prompts.update(source="set", set="simple_animals")
    c.advantages.tracker_size = 32
    if variant.startswith("rwr"):  # weights of each prompt's own samples
        c.advantages.kind = "group"
        c.prompts.update(per_epoch=40, group_size=256)
    if not variant.startswith(("rwr", "sparse_rwr", "paper", "sf")):
        c.train.epochs = 200
    return ddpo_sd.finish(c, variant)
