"""Configuration -> optax chain."""

import optax


def learning_rate(optimizer, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine to 0 at the last step.

    Args:
      optimizer: config.optimizer.
      total_steps: optimizer steps of the whole run.
    """
    lr, warmup = optimizer.lr, optimizer.warmup
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, max(1, total_steps - warmup))
    else:
        after = optax.constant_schedule(lr)
    if not warmup:
        return after
    rise = optax.linear_schedule(lr / warmup, lr, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm.

    Args:
      optimizer: config.optimizer; `grad_clip` 0 turns the clip off.
      total_steps: optimizer steps of the whole run, for the cosine.
    """
    tx = optax.adamw(
        learning_rate(optimizer, total_steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    clip = optimizer.grad_clip
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx
