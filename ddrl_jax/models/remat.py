"""What a block of a network keeps for its backward pass, by the name of a policy.

| policy    | kept of a block                             | computed again             |
|-----------|---------------------------------------------|----------------------------|
| "none"    | everything the gradient needs               | nothing                    |
| "dots"    | results of products with weights            | all else: attention, norms |
| "named"   | what `mark` names: the output of each layer | all else                   |
| "offload" | the same, in the memory of the host         | all else                   |
| "full"    | its input                                   | all of it                  |
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from ddrl_jax.errors import UserError

POLICIES = ("none", "full", "dots", "named", "offload")
NAMES = ("attention", "mlp", "convolution")  # what `mark` may call a layer's output


def mark(x: Array, name: str) -> Array:
    """Names the output of a layer, one of NAMES, for "named" and "offload"."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not one of {', '.join(NAMES)}")
    return checkpoint_name(x, name)


def remat(block: Any, policy: str) -> Any:
    """The class of a block whose backward pass computes again what it did not keep.

    Args:
      block: a Flax module class.
      policy: one of POLICIES.

    Raises:
      KeyError: an unknown policy.
    """
    return _remat(block, policy, prevent_cse=True)


def stack(block: Any, depth: int, policy: str, inputs: int) -> Any:
    """The class of `depth` such blocks in a row, each with weights of its own, scanned.

    Args:
      block: a Flax module class, (x, *inputs) -> (x', None).
      depth: number of blocks; the first axis of every weight.
      policy: one of POLICIES.
      inputs: how many further inputs all blocks share.

    Raises:
      KeyError: an unknown policy.
    """
    return nn.scan(
        # A scan keeps the compiler from merging the second computation with the first.
        _remat(block, policy, prevent_cse=False),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "lora": True},
        in_axes=cast(Any, (nn.broadcast,) * inputs),  # Flax's annotation forgets it
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _remat(block: Any, policy: str, prevent_cse: bool) -> Any:
    if policy == "none":
        return block
    return nn.remat(block, prevent_cse=prevent_cse, policy=_policy(policy))


def _policy(name: str) -> Any:
    """What jax.checkpoint wants to be told; None keeps nothing."""
    known = jax.checkpoint_policies
    return {
        "full": lambda: None,
        "dots": lambda: known.save_from_both_policies(
            known.dots_with_no_batch_dims_saveable,
            known.save_only_these_names("convolution"),
        ),
        "named": lambda: known.save_only_these_names(*NAMES),
        "offload": lambda: known.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(NAMES),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[name]()


def check_offload() -> None:
    """Compiles a small gradient that keeps a value in the memory of the host.

    Raises:
      UserError: the backend can not.
    """

    def loss(x: Array) -> Array:
        kept = jax.checkpoint(
            lambda x: jnp.sin(mark(jnp.sin(x), "mlp")), policy=_policy("offload")
        )
        return jnp.sum(kept(x))

    try:
        jax.jit(jax.grad(loss)).lower(jnp.zeros(8)).compile()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            "this backend can not keep values in the memory of the host",
            got=f'model.remat "offload" on {jax.default_backend()}: '
            + str(error).splitlines()[0][:200],
            wanted="a GPU or TPU with pinned host memory",
            way_out='set model.remat to "named" or "full"',
        ) from None
