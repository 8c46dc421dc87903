"""States and checkpoints that the tests of checkpoints share."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddrl_jax.checkpoint import Checkpoints, abstract


class State(NamedTuple):
    """The kinds of leaves that a run has."""

    step: Any
    params: Any
    opt: Any
    key: Any
    ema: Any = None


def make_state(seed: int, width: int = 5) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt = tx.update(params, tx.init(params), params)
    return State(jnp.int32(seed), params, opt, jax.random.key(seed))


def bits(tree) -> list[tuple[str, str, bytes]]:
    """Name, type and bytes of every leaf: what "equal to the bit" means here."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = str(getattr(leaf, "dtype", type(leaf)))
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.append((jax.tree_util.keystr(path), kind, np.asarray(leaf).tobytes()))
    return found


def save_epochs(root: Path, epochs, keep: int = 9) -> None:
    checkpoints = Checkpoints(root, 1, keep)
    for epoch in epochs:
        checkpoints.save(epoch, make_state(epoch), {"epoch": epoch})
    checkpoints.close()


def restore(root: Path, which: str = "latest", state: State | None = None):
    checkpoints = Checkpoints(root, 1, 9)
    try:
        return checkpoints.restore(abstract(state or make_state(0)), which)
    finally:
        checkpoints.close()
