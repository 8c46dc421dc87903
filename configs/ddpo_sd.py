"""What the four DDPO tasks share on Stable Diffusion, and their variants.

No experiment itself: aesthetic.py, compressibility.py, incompressibility.py and
prompt_alignment.py are.

    python -m ddrl_jax.main --config=configs/aesthetic.py --workdir=runs/aesthetic
    python -m ddrl_jax.main --config=configs/aesthetic.py:paper --workdir=runs/paper

arXiv 2305.13301, table D.5: 50 DDIM steps with eta 1 and guidance 5, trained with the
same guidance, per-prompt running statistics, clip range 1e-4 of a log-prob that is a
mean over the latent, AdamW with weight decay 1e-4, global norm at most 1, 256 samples
an epoch.

| variant      | what is trained  | policy term           | rate | updates     |
|--------------|------------------|-----------------------|------|-------------|
| "", "lora"   | LoRA of rank 4   | clipped               | 3e-4 | the task's  |
| "paper"      | all of the UNet  | clipped               | 1e-5 | 4 an epoch  |
| "sf"         | all of the UNet  | REINFORCE             | 1e-5 | 1 an epoch  |
| "rwr"        | all of the UNet  | weighted denoising    | 1e-5 | 400 a round |
| "sparse_rwr" | all of the UNet  | the best, equal       | 1e-5 | 400 a round |
| "dpok"       | LoRA of rank 4   | clipped, step KL 0.01 | 3e-4 | the task's  |
| "ddrl"       | LoRA of rank 4   | clipped, data loss    | 3e-4 | the task's  |
| "strict"     | LoRA of rank 4   | clipped               | 3e-4 | the task's  |
| "smoke"      | tiny shipped one | clipped               | 3e-4 | seconds     |

"NAME-smoke" is any of them on the tiny shipped model. ddrl needs captioned pictures:
--config.data.path=FOLDER, a TFDS data set (--config.data.source=tfds), or the base
model's own, which --mode=sample writes and --config.data.source=samples reads.
The KL and data weights are starting points, not measured. Only prompt_alignment has
"strict", with another reward.

Where this differs from the paper and its two repositories:
- Prompts come pass after pass without replacement; there they are drawn with it.
- RWR fits the rollout's own latents; there the decoded pictures, encoded again.
- Weights of RWR are of a whole round, as there, but for aesthetic of each prompt
  (per_prompt_weights). The paper says of each prompt for all. With inverse temperature
  0.2 and scores that differ by less than 1 they are nearly equal: 1 +- 0.1 or so.
- Sparse RWR keeps what reaches the 90th percentile of 32 samples of one prompt, there
  the batch of a host: 4 of 32, 1,280 a round in place of 1,024.
- The LoRA of prompt alignment has 256 samples an epoch and updates of 128; there 288
  and 144.
- policy.train_steps below 50 is drawn once an epoch and all train.inner_epochs train
  the same steps; there each pass draws anew. By default all 50 are trained.
- A LoRA starts from v1-5 and computes in bfloat16; that of the PyTorch repository's
  dgx.py starts from v1-4 and computes in float16.
- Both moments of Adam are float32; in the JAX repository the first is bfloat16.
- The last 2 checkpoints are kept; there all of them (--config.checkpoint.keep).

policy.ratio_tolerance is 0. That the ratio is exactly 1 was shown on CPUs only; where
an accelerator's compiler rounds the rollout and the update differently, the self-test
at the start stops the run and says what to set. model.attention "auto" takes the
kernels of an accelerator, elsewhere 1,024 queries of a long picture at a time.
train.microbatch is 8: set 1 on a card of 24 GB (README, "Memory"). None of these has
been run at full size yet; memory by plan: benchmarks/results/sd_memory.md.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import check_variant, shrink

REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PAPER_REPO = "CompVis/stable-diffusion-v1-4"  # what the paper's runs started from
FULL = ("paper", "sf", "rwr", "sparse_rwr")  # the others train a LoRA
VARIANTS = ("lora", *FULL, "dpok", "ddrl")


def task(
    name: str, variant: str, updates: int, own: tuple[str, ...] = ()
) -> ConfigDict:
    """The configuration of a task before its reward and prompts are set.

    Args:
      name: of the task.
      variant: one of the table.
      updates: optimizer steps an epoch of the LoRA variants.
      own: LoRA variants that only this task has.
    """
    kinds = (*VARIANTS, *own)
    known = (*kinds, "smoke", *(f"{kind}-smoke" for kind in kinds))
    check_variant(variant, known)
    kind = variant.removesuffix("smoke").removesuffix("-") or "lora"
    c = base.get_config()
    c.name = name if kind == "lora" else f"{name}:{kind}"
    c.model.update(name="stable_diffusion", init=REPO, image_size=512)
    c.model.update(dtype="bfloat16", remat="full")
    c.data.source = "none"
    c.prompts.update(per_epoch=256, group_size=1)
    c.sampler.update(kernel="ddim", eta=1.0, steps=50, guidance_scale=5.0)
    c.evaluate.update(solver="ddim", steps=50, guidance_scale=5.0, every=10)
    c.evaluate.data_samples = 0
    c.rewards.update(jpeg_upscale=1, heldout=())
    c.advantages.update(kind="tracker", tracker_size=16, tracker_min=16)
    c.advantages.update(epsilon=1e-6, clip=5.0)
    c.policy.update(clip_range=1e-4, train_steps=0, per_sample_steps=True)
    c.train.update(epochs=100, minibatches=updates, microbatch=8)
    c.sample.update(steps=50, guidance_scale=5.0)
    c.optimizer.update(weight_decay=1e-4, grad_clip=1.0, ema_decay=0.0)
    if kind in FULL:
        _full(c, kind)
    else:
        c.lora.rank = 4
        c.optimizer.lr = 3e-4
    if kind == "dpok":
        c.policy.kl_weight = 0.01
    if kind == "ddrl":
        c.data.source = "folder"
        c.data.heldout = 64
        c.data_term.update(weight=0.01, weighting="eps", captions="own")
        c.evaluate.data_samples = 64
    return c


def _full(c: ConfigDict, kind: str) -> None:
    """All weights of the UNet, as the paper trains them."""
    c.model.init = PAPER_REPO
    c.model.dtype = "float32"
    c.optimizer.lr = 1e-5
    c.advantages.update(clip=10.0, tracker_size=32)
    c.train.update(epochs=200, minibatches=4)
    if kind == "sf":
        c.policy.term = "reinforce"
        c.train.minibatches = 1
    if kind in ("rwr", "sparse_rwr"):
        _rounds(c, kind)


def _rounds(c: ConfigDict, kind: str) -> None:
    """10 rounds: collect 10k, fit with 400 updates of 128 by fresh moments."""
    c.policy.update(term=kind, per_sample_steps=False)
    c.optimizer.fresh = True
    c.train.epochs = 10
    if kind == "sparse_rwr":
        c.advantages.kind = "group"
        c.prompts.update(per_epoch=320, group_size=32)
        c.train.update(minibatches=10, inner_epochs=40)
    else:
        c.advantages.kind = "batch"
        c.prompts.per_epoch = 10_240
        c.train.update(minibatches=80, inner_epochs=5)


def finish(c: ConfigDict, variant: str) -> ConfigDict:
    """The configuration itself, or in seconds where the variant says smoke."""
    return shrink(c, "smoke" if variant.endswith("smoke") else "")
