"""Flow-GRPO without KL on a text-to-video transformer of 14.3 billion weights, to plan.

    python -m ddrl_jax.main --mode=plan --config=configs/video_14b.py:pod \
        --plan.devices=256 --plan.chip=v5p

40 blocks of width 5,120 on 32,760 video tokens and 512 text tokens: the shape of the
14 B open video models at 832 x 480 and 81 frames. No weights of ours exist, so only
`--mode=plan` runs it at this size; there are no data for it either, so DDRL can be
planned (`--config.data_term.weight=0.01` adds the cost of its data term), not trained.
`:pod` divides weights by 16 and videos by 4, for 64, 128, 256, 512 or 1,024 chips;
`:lora` trains factors of rank 32; `:smoke` is the same row on a random tiny network.
Rollout of 20 steps, 10 of them trained, 16 prompts of 16 videos an epoch.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("pod", "lora", "smoke"))
    c = base.get_config()
    c.name = "video_14b"
    c.model.update(name="video_dit", init="random", patch=2)
    c.model.update(width=5120, depth=40, heads=40)
    c.model.update(dtype="bfloat16", remat="full")
    c.lora.rank = 32 if variant == "lora" else 0
    c.data.source = "none"
    c.prompts.update(source="list", list=("a cat walks", "a dog runs"))
    c.prompts.update(per_epoch=16, group_size=16)
    c.sampler.update(steps=20, shift=5.0)
    c.policy.train_steps = 10
    c.train.update(epochs=100, minibatches=1, microbatch=1)
    c.optimizer.lr = 1e-5
    c.evaluate.update(solver="rollout")
    if variant == "pod":
        c.mesh.update(fsdp=16, context=4)
    return _shrink(c) if variant == "smoke" else c


def _shrink(c: ConfigDict) -> ConfigDict:
    c.name = "video_14b:smoke"
    c.model.update(width=32, depth=2, heads=4, dtype="float32", attention="xla")
    c.model.video.update(frames=2, height=8, width=8, channels=4)
    c.model.video.update(mlp=64, text_tokens=4, text_width=16)
    c.prompts.update(per_epoch=2, group_size=4)
    c.sampler.steps = 4
    c.policy.train_steps = 2
    c.train.update(epochs=2, microbatch=4)
    c.rewards.heldout = ()
    c.evaluate.update(every=1, samples=4, data_samples=0, pictures=4)
    c.checkpoint.every = 1
    return c
