"""Reward hacking and what holds it back: arms that differ in their anchor alone.

    python -m ddrl_jax.main --config=configs/hacking.py:ddrl_low --workdir=runs/one_arm
    python benchmarks/reward_hacking.py      # all arms and seeds, table and figures

JPEG compressibility of emoji, which a policy without an anchor maximises by wiping its
pictures. ddpo has the clipped importance-weighted objective and no anchor; like all
arms here it has the flow's SDE and group advantages (configs/ddpo_is.py: DDPO with DDIM
and a tracker). kl_* adds the exact KL of a step to the starting policy, ddrl_* the
diffusion loss on captioned emoji, control takes that loss alone for as many updates and
asks for no reward. Kernel, trained steps, prompts, noise, optimizer and evaluation are
the same for all, but that ddpo is evaluated oftener; and with the same seed the control
sees the emoji of the ddrl arms in the same order.

Numbers and hours are in benchmarks/results/reward_hacking.md; how the trained steps,
the evaluation and the data weights were chosen, in hacking_trials.md beside it.
"ARM-smoke" is an arm in seconds. Without a variant the arm is ddrl_low.
"""

from ml_collections import ConfigDict

from configs import base
from configs.smoke import check_variant, shrink

ARMS = {
    # arm: policy.weight, policy.kl_weight, data_term.weight
    "ddpo": (1.0, 0.0, 0.0),
    "kl_low": (1.0, 0.01, 0.0),
    "kl_high": (1.0, 0.1, 0.0),
    "ddrl_low": (1.0, 0.0, 0.01),
    "ddrl_high": (1.0, 0.0, 0.015),
    # AdamW divides by the size of the gradient, so the weight of an only term is free
    "control": (0.0, 0.0, 0.01),
}


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, (*ARMS, "smoke", *(f"{arm}-smoke" for arm in ARMS)))
    size = "smoke" if variant.endswith("smoke") else ""
    arm = variant.removesuffix("smoke").removesuffix("-")
    policy, kl, data = ARMS[arm or "ddrl_low"]
    c = base.get_config()
    c.name = f"hacking:{arm}" if arm else "hacking"
    c.policy.update(weight=policy, kl_weight=kl)
    c.data_term.weight = data

    # From here on the same for all arms. The unanchored one has collapsed by epoch
    # 18: 66 are more than three and a half times the calls that collapse it.
    c.train.epochs = 66
    c.prompts.update(limit=64, per_epoch=8, group_size=8)
    c.sampler.update(kernel="flow_grpo", steps=10, noise_level=0.7)
    c.sampler.update(last_step="deterministic", guidance_scale=1.0)
    c.advantages.update(kind="group", std="group")
    # of log-probs that are means over 3,072 pixels
    c.policy.update(term="clipped", clip_range=3e-3)
    # Of the early steps, which decide what is drawn and how large, every other. Later
    # ones teach a policy above all to remove the grain of the SDE, a third of the size
    c.policy.train_on = (0, 2, 4)
    c.train.update(minibatches=2, microbatch=16)
    c.optimizer.update(lr=4e-4, warmup=10, schedule="cosine", ema_decay=0.95)
    # Every prompt twice, so that the diversity within a prompt can be measured. DDPO
    # oftener: others are held against it at their sizes, and it falls off a cliff, on
    # which a straight line over seven epochs is up to 1.4 times too low.
    every = 2 if arm == "ddpo" else 6
    c.evaluate.update(every=every, samples=128, data_samples=64, pictures=16)
    c.checkpoint.every = 5
    c.evaluate.solver = "euler"  # without the SDE's grain, in as many steps
    c = shrink(c, size)
    if size:
        c.evaluate.samples = 2 * c.prompts.limit
    return c
