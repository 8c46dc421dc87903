"""What lies on a device while a phase runs: what stays, and its own part.

What stays is known from shapes and shardings: the state, frozen and reference weights,
every chunk of the epoch (trajectories of all minibatches, not only of the one at work),
prompt embeddings, autoencoder, text encoder and the judges' networks. For a TPU the
arguments of the phases are as its compiler lays them out, in whole tiles; the last four
are as their shapes say. A phase adds its copy of the weights, its results and the
compiler's temporaries. Pictures, and what a judge needs while it looks at them, are not
in it.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from ddrl_jax.chips import Chip
from ddrl_jax.plan.judges import judge_bytes
from ddrl_jax.plan.lowered import Abstract, Compiled
from ddrl_jax.plan.sizes import bytes_per_device

MARGIN = 0.92  # of the memory: the rest is the runtime's, and fragments


def fits(peak: float | int, chip: Chip) -> bool:
    """Whether a program of this peak in bytes fits into a chip's memory."""
    return peak <= MARGIN * chip.hbm_bytes


def chunks_of_epoch(plan: Abstract) -> int:
    """Chunks that an epoch samples, also those that sparse RWR drops before it fits."""
    prompts = plan.config.prompts
    return prompts.per_epoch * prompts.group_size // plan.chunk.keys.shape[0]


def resident(plan: Abstract) -> dict[str, int]:
    """Bytes a device that stay for the whole epoch, by name."""
    state, (_, _, reference, _) = plan.weights.abstract, plan.phases[-1].arguments
    size = partial(bytes_per_device, sizes=plan.sizes)
    return {
        "parameters": size(state.params),
        "frozen base": size(plan.frozen),
        "reference policy": size(reference[0]) if reference else 0,
        "optimizer": size(state.opt_state),
        "average of the weights": size(state.ema),
        "trajectories of the epoch": chunks_of_epoch(plan) * size(plan.chunk),
        "prompt embeddings": plan.texts.count * embedding_bytes(plan),
        "autoencoder": _whole(
            (plan.weights.pipeline.decode, plan.weights.pipeline.encode_images)
        ),
        "text encoder": _whole(plan.weights.pipeline.encode),
        "judges": sum(size or 0 for size in judge_bytes(plan.config.rewards).values()),
    }


def uncounted(plan: Abstract) -> list[str]:
    """What `resident` lacks: prompts that were not read, judges of unknown size.

    Such a judge is a repository of the hub that is no folder here.
    """
    judges = judge_bytes(plan.config.rewards)
    found = [
        f"no folder with its config.json is here: {name}"
        for name, size in judges.items()
        if size is None
    ]
    count, unread = plan.texts
    if unread:
        each = f"{embedding_bytes(plan):,} bytes each"
        found.append(f"prompts beyond the {count} of an epoch, {each}: {unread}")
    return found


def own(plan: Abstract, found: Compiled) -> dict[str, int]:
    """Bytes a device that only one phase needs, by name.

    Args:
      plan: the run.
      found: a compiled phase of it.
    """
    name = found.phase.name
    staying = jax.tree.leaves((plan.weights.abstract, plan.frozen, plan.chunk))
    known = {id(leaf) for leaf in staying}
    added = [a for a in jax.tree.leaves(found.phase.arguments) if id(a) not in known]
    # The transitions a rollout hands out are counted with those of the epoch.
    kept = (plan.chunk.trajectory, plan.chunk.x0) if name == "rollout" else ()
    size = partial(bytes_per_device, sizes=plan.sizes)
    return {
        "weights of the rollout": size(added),
        f"results of the {name}": max(found.outputs - size(kept), 0),
        f"temporaries of the {name}": found.temporaries,
    }


def peak(plan: Abstract, found: Compiled) -> int:
    """Bytes a device while a phase runs: what stays and its own."""
    return sum(resident(plan).values()) + sum(own(plan, found).values())


def embedding_bytes(plan: Abstract) -> int:
    """Bytes of the embedding of one prompt, which is as large as that of none."""
    return _whole(plan.weights.pipeline.uncond)


def _whole(tree: Any) -> int:
    """Bytes of the arrays, or shapes, of a tree; every device has them whole."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
