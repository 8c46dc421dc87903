"""What an optimizer, its schedule and what it trains must satisfy together."""

from typing import Any

from ddrl_jax.config_rules import require


def total_updates(config: Any) -> int:
    """Optimizer steps of the whole run."""
    train = config.train
    return train.epochs * train.inner_epochs * train.minibatches


def check_optimizer(config: Any) -> None:
    """Refuses schedules that never end, and an optimizer that can not train this.

    Raises:
      UserError: the first combination that is wrong.
    """
    optimizer = config.optimizer
    updates = total_updates(config)
    if optimizer.name == "muon":
        _check_muon(config)
    require(
        not optimizer.fresh or optimizer.schedule == "constant",
        "a schedule that begins anew each epoch never gets to its end",
        got=f'optimizer.schedule "{optimizer.schedule}" with optimizer.fresh True',
        wanted='"constant", or fresh False',
        way_out='set optimizer.schedule to "constant"',
    )
    require(
        optimizer.schedule != "cosine" or optimizer.warmup < updates,
        "the warm-up is not over before the cosine ends",
        got=f"optimizer.warmup {optimizer.warmup} of {updates} updates",
        wanted=f"fewer than {updates} (epochs x inner_epochs x minibatches)",
        way_out="lower optimizer.warmup or raise train.epochs",
    )


def _check_muon(config: Any) -> None:
    """Muon is of matrices of stacked blocks, and rounds nothing it keeps."""
    model, lora, optimizer = config.model.name, config.lora.rank, config.optimizer
    kept = (optimizer.master, optimizer.state_dtype)
    require(
        model != "stable_diffusion" and not lora and set(kept) == {"float32"},
        'optimizer.name "muon" can not train this',
        got=f'model.name "{model}", lora.rank {lora}, optimizer.master "{kept[0]}", '
        f'optimizer.state_dtype "{kept[1]}"',
        wanted="emoji or video_dit, lora.rank 0, and both dtypes float32",
        way_out='set optimizer.name to "adamw"',
    )
