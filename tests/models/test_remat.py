"""Remat policies: the same numbers from less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import perturbed

from ddrl_jax.errors import UserError
from ddrl_jax.models import remat as remat_module
from ddrl_jax.models.dit import DiT
from ddrl_jax.models.remat import POLICIES, check_offload, mark, remat
from ddrl_jax.models.unet import UNet2DConditionModel
from ddrl_jax.models.unet_config import UNetConfig
from ddrl_jax.models.video_dit import VideoDiT
from ddrl_jax.models.video_layout import Layout

TIME = jnp.asarray([0.2, 0.7])
SIZES = {"width": 32, "heads": 2, "patch": 4}
TOKENS = jnp.ones((2, 3), jnp.int32)
UNET = UNetConfig.from_json(
    {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        # One level: all levels mark and wrap their layers in the same two functions.
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    }
)


def noise(*shape: int):
    return jax.random.normal(jax.random.key(1), shape)


def dit(policy: str, depth: int = 3):
    network = DiT(**SIZES, depth=depth, vocabulary=4, length=3, remat=policy)
    return network, (noise(2, 16, 16, 3), TIME, TOKENS)


def unet(policy: str):
    network = UNet2DConditionModel(UNET, remat=policy)
    return network, (noise(2, 8, 8, 4), 999 * TIME, noise(2, 3, 8))


def video(policy: str):
    layout = Layout(None, "xla")
    network = VideoDiT(**SIZES, depth=2, mlp=64, layout=layout, remat=policy)
    return network, (noise(2, 2, 8, 8, 4), TIME, noise(2, 3, 8))


def weights(make):
    network, inputs = make("none")
    trees = jax.jit(network.init)(jax.random.key(0), *inputs)
    return perturbed(nn.meta.unbox(trees)["params"])


def gradient_of(make, policy, **options):
    """A jitted (params) -> (loss, gradient)."""
    network, inputs = make(policy, **options)

    def loss(params):
        again = jax.checkpoint(lambda p: network.apply({"params": p}, *inputs))
        return jnp.mean(again(params) ** 2)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.slow
@pytest.mark.parametrize("make", [dit, unet, video])
def test_every_policy_gives_the_same_gradient(make):
    params = weights(make)
    loss, plain = gradient_of(make, "none")(params)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    assert largest > 1e-3
    for policy in POLICIES[1:]:
        again, found = gradient_of(make, policy)(params)
        np.testing.assert_allclose(again, loss, rtol=1e-6, err_msg=policy)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, 1e-6, 1e-6 * largest, err_msg=policy)


def temporaries(policy: str) -> int:
    """Bytes that the compiler sets aside for a gradient of twelve blocks."""
    network, inputs = dit("none", depth=12)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    step = gradient_of(dit, policy, depth=12)
    memory = step.lower(nn.meta.unbox(shapes)["params"]).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_the_less_a_policy_keeps_the_less_memory_it_takes():
    none, dots, named, full = map(temporaries, ("none", "dots", "named", "full"))
    assert none > 1.5 * dots and dots > named > 1.1 * full, (none, dots, named, full)


def test_names_and_policies_are_known():
    with pytest.raises(ValueError, match="attention, mlp, convolution"):
        mark(jnp.zeros(1), "atention")
    with pytest.raises(KeyError):
        remat(DiT, "most")
    assert remat(DiT, "none") is DiT


def test_a_backend_without_host_memory_is_one_message(monkeypatch):
    check_offload()  # the CPU has one

    def refuse(*_, **__):
        raise ValueError("Could not find memory kind pinned_host\nmore")

    monkeypatch.setattr(remat_module, "_policy", refuse)
    with pytest.raises(UserError, match="(?s)pinned_host\n.*named"):
        check_offload()
