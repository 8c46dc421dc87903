"""The base policy of the emoji model: flow matching on the emoji, no rollouts.

    python -m ddrl_jax.main --config=configs/emoji_pretrain.py --workdir=runs/pretrain
    python -m ddrl_jax.main --config=configs/emoji_pretrain.py --workdir=runs/pretrain \
        --mode=export
    python -m ddrl_jax.main --config=configs/emoji_pretrain.py:second \
        --workdir=runs/second    # then --mode=export again
    python -m ddrl_jax.main --config=configs/emoji_pretrain.py:third \
        --workdir=runs/third     # and once more

The same loop as every other row, with policy.weight 0. An epoch is 100 batches of 32
emoji, each drawn anew at a random size, place and angle; the caption is left out of one
in ten, so that guidance can be used. The averaged weights are what is exported; the
second stage starts from those of the first with a smaller learning rate, the third from
those of the second, with Muon in place of AdamW on the matrices of the blocks.

The shipped weights (ddrl_jax/assets/emoji_base.npz) are the third stage's. Seed 0 for
8,500 steps, seed 1 for 2,800, then seed 2 for 9,200: 1.48 + 0.53 + 1.59 hours of
training time on 2 CPU cores that were shared with other work, 2026-11-23 and 29. Loss
of the last epoch of each stage 0.0871, 0.0838 and 0.0734, held-out data loss 0.122,
0.115 and 0.099. benchmarks/results/base_policy.md judges them.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import check_variant, shrink


def get_config(variant: str = "") -> ConfigDict:
    """Returns the first stage, ":second", ":third", or the small one (":smoke")."""
    check_variant(variant, ("second", "third", "smoke"))
    c = base.get_config()
    c.name = "emoji_pretrain"
    c.model.init = "random"
    c.policy.weight = 0.0
    c.rewards.weights = ConfigDict()
    c.data_term.weight = 1.0
    c.data_term.time = "logit_normal"
    c.prompts.update(per_epoch=3200, group_size=1)
    c.train.update(epochs=85, minibatches=100, microbatch=32)
    c.optimizer.update(lr=2e-3, b2=0.99, warmup=100, schedule="cosine", ema_decay=0.999)
    c.evaluate.update(every=20, steps=20, guidance_scale=2.0)
    c.checkpoint.every = 5
    if variant == "second":
        c.name = "emoji_pretrain:second"
        c.seed = 1
        c.model.init = "runs/pretrain/export/000085.npz"
        c.train.epochs = 28
        c.optimizer.update(lr=8e-4, warmup=50)
        return c
    if variant == "third":
        c.name = "emoji_pretrain:third"
        c.seed = 2
        c.model.init = "runs/second/export/000028.npz"
        c.train.epochs = 92
        c.optimizer.update(name="muon", lr=3e-3, b1=0.95, warmup=100)
        return c
    return shrink(c, variant)
