"""A Flax network as the plain functions and trees of a Pipeline."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ddrl_jax.interfaces import Params
from ddrl_jax.sharding import RULES, Rules


class Denoiser(NamedTuple):
    """What a Pipeline knows of its network.

    Attributes:
      init: key -> {"params": ..., "lora": ... or None}.
      denoise: (params, lora, z, time, cond) -> prediction.
      axes: logical axes of each leaf of `init`.
      shapes: its abstract leaves.
    """

    init: Callable[[Array], Params]
    denoise: Callable[..., Any]
    axes: Params
    shapes: Params


def make_denoiser(network: nn.Module, example: tuple, rules: Rules = RULES) -> Denoiser:
    """Wraps a network; traces it and computes nothing.

    Args:
      network: of (z, time, text), its weights in "params" and "lora".
      example: inputs of the shapes that the shapes of its weights depend on.
      rules: the table by which its weights are laid out; its layers go by it.
    """

    def boxed(key: Array) -> Params:
        params_key, lora_key = jax.random.split(key)
        trees = network.init({"params": params_key, "lora": lora_key}, *example)
        return {"params": trees["params"], "lora": trees.get("lora")}

    def denoise(params, lora, z, time, cond) -> Any:
        table: Any = tuple(rules.items())
        trees = {"params": params} | ({} if lora is None else {"lora": lora})
        with nn.logical_axis_rules(table):
            return network.apply(trees, z, time, cond.emb)

    shapes = jax.eval_shape(boxed, jax.random.key(0))
    specs = nn.get_partition_spec(shapes)
    return Denoiser(
        init=lambda key: nn.meta.unbox(boxed(key)),
        denoise=denoise,
        axes=jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, P)),
        shapes=nn.meta.unbox(shapes),
    )
