"""A small trained model in the layout of Stable Diffusion, and DDPO's rows on it.

    python -m benchmarks.latent_emoji        # builds, trains and compares all of it
    python -m ddrl_jax.main --config=configs/latent_emoji.py \
        --workdir=runs/latent/pretrain
    python -m ddrl_jax.main --config=configs/latent_emoji.py:is-compressibility \
        --workdir=runs/latent/is

32 captions of the emoji data, an autoencoder to 16x16x4 latents, a UNet that predicts
eps on Stable Diffusion's schedule. "pretrain" (no variant) fits the UNet to cached
latents. ALGORITHM-REWARD is a row of arXiv 2305.13301 with 1,280 reward calls:
"is", "sf", "rwr" or "sparse_rwr" against "compressibility" or "incompressibility".
The folder of the model is made by the benchmark; results are in
benchmarks/results/latent_emoji.md.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import check_variant, shrink

ALGORITHMS = ("is", "sf", "rwr", "sparse_rwr")
REWARDS = ("compressibility", "incompressibility")
HOME = "runs/latent"


def get_config(variant: str = "") -> ConfigDict:
    rows = tuple(
        f"{algorithm}-{reward}" for algorithm in ALGORITHMS for reward in REWARDS
    )
    check_variant(variant, ("smoke", *rows, *(f"{row}-smoke" for row in rows)))
    c = base.get_config()
    c.model.update(name="stable_diffusion", image_size=0)
    c.data.path = f"{HOME}/pictures"
    c.data.cache = f"{HOME}/cache"
    c.sampler.update(kernel="ddim", eta=1.0, steps=10, guidance_scale=1.0)
    c.evaluate.update(solver="rollout", steps=10, samples=128, pictures=32)
    if variant in ("", "smoke"):
        _pretrain(c)
        return shrink(c, variant)
    size = "smoke" if variant.endswith("-smoke") else ""
    algorithm, _, reward = variant.removesuffix("-smoke").partition("-")
    _row(c, algorithm, reward)
    return shrink(c, size)


def _pretrain(c: ConfigDict) -> None:
    c.name = "latent_emoji"
    c.model.init = f"{HOME}/random"
    c.policy.weight = 0.0
    c.rewards.weights = ConfigDict()
    c.data.source = "samples"
    c.data_term.update(weight=1.0, weighting="eps")
    c.prompts.update(per_epoch=3200, group_size=1)
    c.train.update(epochs=30, minibatches=100, microbatch=32)
    c.optimizer.update(lr=1e-3, b2=0.99, warmup=100, schedule="cosine", ema_decay=0.999)
    c.evaluate.update(every=10, data_samples=128)


def _row(c: ConfigDict, algorithm: str, reward: str) -> None:
    """Equal prompts, sampler and reward calls; only the fit of the policy differs."""
    c.name = f"latent_emoji:{algorithm}-{reward}"
    c.model.init = f"{HOME}/base"
    c.data.source = "none"
    c.prompts.update(source="file", path=f"{HOME}/captions.txt")
    c.rewards.weights = ConfigDict({reward: 1.0})
    c.prompts.update(per_epoch=8, group_size=8)
    c.advantages.update(kind="group", std="group")
    # 1.64 / 1,024 bounds the joint ratio as 1e-4 does for the latents of 512 px
    c.policy.update(clip_range=1.6e-3, train_steps=5, per_sample_steps=True)
    c.train.update(epochs=20, minibatches=4, microbatch=16)
    # Judged are averaged weights: the last update of a fit alone says little about it.
    c.optimizer.update(lr=3e-4, warmup=5, weight_decay=1e-4, ema_decay=0.9)
    c.evaluate.update(every=5, data_samples=0)
    if algorithm == "sf":
        c.policy.term = "reinforce"
        c.train.minibatches = 1
    if algorithm in ("rwr", "sparse_rwr"):
        # five rounds of 256 samples; kB differ by halves here, not by tens
        c.policy.update(term=algorithm, rwr_inverse_temperature=5.0, train_steps=0)
        c.policy.per_sample_steps = False
        c.prompts.update(per_epoch=32, group_size=8)
        c.train.update(epochs=5, minibatches=8, inner_epochs=4)
        c.optimizer.fresh = True
        c.evaluate.every = 1
