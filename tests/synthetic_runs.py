"""Workdirs of runs that never ran: curves that are written down here."""

import json

from ddrl_jax import compare

PER_EPOCH = 64
# evaluations at 0, 9, 18, 27 epochs: 0, 576, 1152, 1728 reward calls
EPOCHS = (0, 9, 18, 27)
DDPO = {
    "size": (6.0, 5.4, 4.8, 3.0),
    "retrieval": (0.60, 0.42, 0.24, 0.06),
    "loss": (0.20, 0.24, 0.30, 0.50),
    "epochs": (0, 3, 6, 9),
}
DDRL = {
    "size": (6.0, 5.2, 5.0, 4.8),
    "retrieval": (0.60, 0.54, 0.50, 0.46),
    "loss": (0.20, 0.22, 0.24, 0.23),
}
WEIGHTS = {  # policy, KL, data
    "ddpo": (1.0, 0.0, 0.0),
    "ddpo_young": (1.0, 0.0, 0.0),
    "kl": (1.0, 0.1, 0.0),
    "ddrl": (1.0, 0.0, 0.01),
    "ddrl_more": (1.0, 0.0, 0.03),
    "control": (0.0, 0.0, 0.03),
}


def write(root, arm, curve, seed=0, **edits):
    """A workdir with these evaluations; returns its path."""
    path = root / arm / f"seed_{seed}"
    path.mkdir(parents=True)
    policy, kl, data = WEIGHTS[arm]
    epochs = curve.get("epochs", EPOCHS)
    config = {
        "name": arm,
        "seed": seed,
        "train": {"epochs": epochs[-1]},
        "policy": {"weight": policy, "kl_weight": kl},
        "data_term": {"weight": data},
        "model": {"image_size": 32},
        "evaluate": {"pictures": 3, "samples": 128, "steps": 10},
        "prompts": {"limit": 64},
    } | edits
    (path / "config.json").write_text(json.dumps(config))
    lines = []
    for i, epoch in enumerate(epochs):
        line = {
            "step": epoch,
            "evaluation/compressibility/mean": -curve["size"][i],
            "heldout/retrieval/mean": curve["retrieval"][i],
            "diversity/within_prompt": 0.2,
            "diversity/across_prompts": 0.7,
            "data/heldout_loss": curve["loss"][i],
        }
        if epoch:
            line |= {"samples_seen": epoch * PER_EPOCH, "time/epoch": 1800.0}
        lines.append(json.dumps(line))
    # an epoch without an evaluation, and a line that a kill has cut
    lines.insert(1, json.dumps({"step": 1, "reward/mean": -7.0, "samples_seen": 64}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "evalu')
    return path


def load(root, arms, seeds=(0,)):
    return compare.load_runs(
        {arm: [root / arm / f"seed_{seed}" for seed in seeds] for arm in arms}
    )


def shifted(curve, **changes):
    return curve | {key: tuple(value) for key, value in changes.items()}


def two_seeds(root):
    """Seed 1 is seed 0 with other retrieval, and for DDRL a lighter end."""
    write(root, "ddrl", DDRL)
    write(root, "ddpo", DDPO)
    other = shifted(DDRL, size=(6.0, 5.2, 4.8, 4.4), retrieval=(0.5, 0.5, 0.4, 0.3))
    write(root, "ddrl", other, seed=1)
    write(root, "ddpo", shifted(DDPO, retrieval=(0.5, 0.35, 0.2, 0.1)), seed=1)
    return load(root, ("ddrl", "ddpo"), (0, 1))
