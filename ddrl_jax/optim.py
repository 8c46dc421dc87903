"""Configuration -> optax chain, and the dtypes of weights and moments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key
from optax import contrib

from ddrl_jax.interfaces import Params

WEIGHT_STREAM = 5_000_011  # keys of the rounding, apart from all other streams
STATE_STREAM = 5_000_077
ADAM_RMS = 0.2  # of the entries of an update of Adam, over its learning rate


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
    """AdamW, or Muon with NAdamW, behind a clip of the global gradient norm.

    Args:
      optimizer: config.optimizer; `grad_clip` 0 turns the clip off, `state_dtype` is
        that of the moments.
      total_steps: optimizer steps of the whole run, for the cosine.
    """
    make = {"adamw": _adamw, "muon": _muon}[optimizer.name]
    tx = make(optimizer, learning_rate(optimizer, total_steps))
    clip = optimizer.grad_clip
    tx = optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx
    if optimizer.master == optimizer.state_dtype == "float32":
        return tx
    return stored_in(optimizer.state_dtype, tx)


def _adamw(optimizer, lr: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        lr,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )


def _muon(optimizer, lr: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024) on matrices of stacked blocks, NAdamW on all else.

    W <- W - lr 0.2 sqrt(max(i, o)) U V^T of the momentum's U S V^T, nearly, so that the
    same rate suits both (Liu 2025, arXiv 2502.16982, Eq. 4).
    """
    return contrib.muon(
        lr,
        beta=optimizer.b1,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        adam_weight_decay=optimizer.weight_decay,
        muon_weight_dimension_numbers=_stacked_matrices,
        consistent_rms=ADAM_RMS,
    )


def _stacked_matrices(params: Params) -> Any:
    """Which leaves are matrices of stacked blocks [layers i o], each by itself."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))

    def choose(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return matrix if name == "kernel" and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(choose, params)


class StoredState(NamedTuple):
    """State of an optimizer that is kept in another dtype between steps."""

    count: Int[Array, ""]
    inner: Any


def stored_in(
    dtype: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Computes in float32 and keeps the moments in `dtype`, rounded at random.

    The second moment moves by a share 1 - b2 a step, 0.001 by default; the spacing of
    bfloat16 is 0.004 to 0.008, so that to the nearest it would never fall.

    Args:
      dtype: of the moments between steps.
      tx: the optimizer.
    """

    def init(params: Params) -> StoredState:
        inner = tx.init(_cast(params, jnp.dtype("float32")))
        return StoredState(jnp.zeros((), jnp.int32), _cast(inner, jnp.dtype(dtype)))

    def update(updates: Params, state: Any, params: Params | None = None):
        wide = _cast(state.inner, jnp.dtype("float32"))
        params = None if params is None else _cast(params, jnp.dtype("float32"))
        updates, inner = tx.update(updates, wide, params)
        key = jax.random.fold_in(jax.random.key(STATE_STREAM), state.count)
        return updates, StoredState(
            state.count + 1, round_at_random(inner, state.inner, key)
        )

    return optax.GradientTransformation(init, update)


def add_updates(params: Params, updates: Params, step: Int[Array, ""]) -> Params:
    """params + updates; weights narrower than float32 are rounded at random.

    Args:
      params: the weights.
      updates: float32.
      step: number of the update, of which the random numbers are a function.
    """
    wide = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, params, updates)
    key = jax.random.fold_in(jax.random.key(WEIGHT_STREAM), step)
    return round_at_random(wide, params, key)


def round_at_random(tree: Params, like: Params, key: Key[Array, ""]) -> Params:
    """Casts float32 to the dtypes of `like`, to bfloat16 with the right expectation.

    A number between two neighbours goes up with the probability of its distance from
    the lower one (Gupta 2015, Eq. 1): 16 random bits are added below the 16 bits that
    bfloat16 keeps, and the carry decides.

    Args:
      tree: float32 leaves, or of the dtype that `like` has.
      like: leaves of the wanted dtypes.
      key: of the random bits.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = [leaf.dtype for leaf in jax.tree.leaves(like)]
    out = [
        _rounded(leaf, jax.random.fold_in(key, i)) if dtype == jnp.bfloat16 else leaf
        for i, (leaf, dtype) in enumerate(zip(leaves, wanted, strict=True))
    ]
    return jax.tree.unflatten(structure, out)


def _rounded(x: Array, key: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + random) & jnp.uint32(0xFFFF0000)
    moved = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(x), moved, x).astype(jnp.bfloat16)


def _cast(tree: Any, dtype: Any) -> Any:
    """The floating-point leaves in a dtype; counters stay what they are."""
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: a.astype(dtype) if floating(a) else a, tree)
