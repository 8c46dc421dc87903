"""LoRA trees: W + (alpha / rank) A B beside a frozen base (Hu 2021, Eq. 3)."""

from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from ddrl_jax.interfaces import Params


def merge_lora(params: Params, lora: Params, config: Any) -> Params:
    """Adds the low-rank products to the kernels they stand beside, in float32.

    Args:
      params: the base, nested dicts with "kernel" leaves [.. i o].
      lora: the same nesting with "a" [.. i r] and "b" [.. r o].
      config: config.lora.

    Returns:
      A tree like `params` that needs no LoRA.
    """
    flat = traverse_util.flatten_dict(params)
    factors = traverse_util.flatten_dict(lora)
    scale = (config.alpha or config.rank) / config.rank
    for path in {p[:-1] for p in factors}:
        a, b = factors[(*path, "a")], factors[(*path, "b")]
        product = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
        flat[(*path, "kernel")] = flat[(*path, "kernel")] + scale * product
    return traverse_util.unflatten_dict(flat)
