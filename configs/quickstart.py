"""DDRL on the emoji model: smaller JPEG files, anchored to the emoji themselves.

    python -m ddrl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The main job of this repository and what `make demo` runs, meant for two cores and ten
minutes. Group advantages, the clipped surrogate on three of the nine noisy steps of the
Flow-GRPO sampler, and the diffusion loss on captioned emoji in every update. The judge
(retrieval among all captions) is held out: nothing is trained on it.

One run of it: 373 seconds on 2 CPU cores, benchmarks/results/quickstart.md.

Keys to turn first: data_term.weight (0 gives up the pictures for the reward) and
rewards.weights.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import shrink


def get_config(variant: str = "") -> ConfigDict:
    c = base.get_config()
    c.name = "quickstart"
    c.train.epochs = 60
    c.prompts.limit = 64
    c.data_term.weight = 0.03
    # wide, for log-probs that are means over 3,072 pixels and a few updates an epoch
    c.policy.clip_range = 3e-3
    # ten updates are five epochs: Adam's first steps are its largest
    c.optimizer.update(lr=3e-4, warmup=10)
    c.evaluate.update(every=10, samples=64, solver="rollout")
    c.checkpoint.every = 10
    return shrink(c, variant)
