"""DDPO: JPEG incompressibility of Stable Diffusion's pictures, on ImageNet animals.

    python -m ddrl_jax.main --config=configs/incompressibility.py \
        --workdir=runs/incompressibility

arXiv 2305.13301, section 5.1: plus the size in kB at quality 95 and 512 px; 398
prompts, the animal labels of ImageNet. Variants and what they set: configs/ddpo_sd.py.
Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import ddpo_sd


def get_config(variant: str = "") -> ConfigDict:
    c = ddpo_sd.task("incompressibility", variant, updates=4)
    c.rewards.weights = ConfigDict({"incompressibility": 1.0})
    c.prompts.update(source="set", set="imagenet_animals")
    return ddpo_sd.finish(c, variant)
