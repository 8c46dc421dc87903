"""Bytes that a device sends in one update of the video network, on one mesh axis.

In closed form, with ring algorithms on n devices, i items (trained step x microbatch),
L blocks, W bytes of block weights, G of all weights and A of one activation [b l d] of
the samples of an item. `compiled` describes what XLA makes of the program for a CPU,
`ideal` what the same mesh needs at least:

    data     i 2 (n-1)/n G                          1 in place of i: sum, then send once
    fsdp     i (n-1)/n (3 W + 2 G)                  3 W + G: reduce-scatter halves it
    tensor   i 2 (n-1)/n (L (14 A + 2 T) + 3 A)     11 A: sum before q, k, v are sent,
                                                    skip what is recomputed and unread
    context  i (n-1)/n (L (16 A/n + 4 T) + 2 D)     2 D once in place of i times

Three gathers: forward, its recomputation for the ratio of exactly 1
(terms.policy_step), and the backward pass. 14: outputs of self-attention, prompt
attention and feed-forward in each of the three forward passes, and the gradients of
the inputs of q, k, v, up and prompt_q; T is an activation of the prompt [b k d]. 16:
q, k, v and the result are exchanged in three forward passes and the backward pass
(Jacobs 2023). D are the weights that multiply video tokens: the prompt is whole on
every device, so of prompt_k and prompt_v the gradients of k and v are summed (4 T)
and not those of the weights.
"""

from typing import Any, NamedTuple

import jax

from ddrl_jax.plan.lowered import Abstract
from ddrl_jax.plan.sheet import network_items
from ddrl_jax.program import chunk_size

AXES = ("data", "fsdp", "tensor", "context")


class Traffic(NamedTuple):
    """Bytes a device sends in an update."""

    compiled: float
    ideal: float


def traffic(plan: Abstract) -> Traffic:
    """The formula for a plan of the video network on a mesh of one axis, remat full.

    Args:
      plan: in float32, all weights trained.
    """
    mesh = dict(plan.mesh.shape)
    (axis,) = (name for name in AXES if mesh[name] > 1)
    n, items, config = mesh[axis], network_items(plan, "update"), plan.config
    tree = plan.weights.shapes["params"]
    blocks, whole = _bytes(tree["blocks"]), _bytes(tree)
    batch = chunk_size(config, plan.mesh)
    width, video, depth = config.model.width, config.model.video, config.model.depth
    tokens = video.frames * video.height * video.width // config.model.patch**2
    activation = 4 * batch * tokens * width
    prompt = 4 * batch * video.text_tokens * width
    part = (n - 1) / n
    if axis == "data":
        return Traffic(items * 2 * part * whole, 2 * part * whole)
    if axis == "fsdp":
        return Traffic(
            items * part * (3 * blocks + 2 * whole),
            items * part * (3 * blocks + whole),
        )
    if axis == "tensor":
        inside = [depth * (k * activation + 2 * prompt) for k in (14, 11)]
        sums = (items * 2 * part * (each + 3 * activation) for each in inside)
        return Traffic(*sums)
    swaps = items * part * depth * (16 * activation / n + 4 * prompt)
    of_tokens = blocks - _bytes([tree["blocks"][k] for k in ("prompt_k", "prompt_v")])
    sums = 2 * part * of_tokens
    return Traffic(swaps + items * sums, swaps + sums)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
