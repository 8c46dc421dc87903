"""The autoencoder against diffusers, tensor by tensor of a random checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.models import vae
from ddrl_jax.models.convert import to_jax, to_torch_names
from ddrl_jax.models.networks import network_shapes
from ddrl_jax.models.vae import AutoencoderKL, VaeConfig

# Networks of the reference, from its own defaults on.
SMALL = {"block_out_channels": (8, 12), "norm_num_groups": 4}
GRID = {
    "stable diffusion": {**SMALL, "block_out_channels": (8, 8, 12, 12)},
    "two layers a block": {**SMALL, "layers_per_block": 2},
    "16 channels, no quant conv": {
        **SMALL,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
        "scaling_factor": 0.3611,
    },
    "no attention": {**SMALL, "mid_block_add_attention": False, "norm_num_groups": 2},
    "one level": {"block_out_channels": (8,), "norm_num_groups": 1},
}
SD = VaeConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)


def theirs(name):
    """The network of the reference with random numbers, none of them 0, everywhere."""
    torch = pytest.importorskip("torch")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

    options = GRID[name]
    depth = len(options["block_out_channels"])
    network = Reference(
        **options,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return network


def converted(network):
    """(our network, its parameters) of theirs."""
    config = VaeConfig.from_json(network.config)
    tensors = {k: v.numpy() for k, v in network.state_dict().items()}
    return AutoencoderKL(config), to_jax("vae", tensors, config)


def call(network, method, params, x):
    go = jax.jit(lambda p, x: network.apply({"params": p}, x, method=method))
    return go(params, x)


def reference(network, method, x):
    """Their encode or decode on our layout; encode gives the mean and log-variance."""
    import torch

    with torch.no_grad():
        out = getattr(network, method)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    if method == "decode":
        return out.sample.numpy().transpose(0, 2, 3, 1)
    both = (out.latent_dist.mean, out.latent_dist.logvar)
    return tuple(y.numpy().transpose(0, 2, 3, 1) for y in both)


def pictures(*shape):
    return np.random.default_rng(7).uniform(-1, 1, shape).astype(np.float32)


def assert_close(found, wanted, relative=1e-5):
    """Largest error over the largest output."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape and found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < relative, error


@pytest.mark.parametrize("name", GRID)
def test_parity_both_ways(name):
    network = theirs(name)
    ours, params = converted(network)
    # Odd sides: the halving pads below and to the right, and only there.
    side = 10 * ours.config.downsampling // 2 + (2 if name == "no attention" else 0)
    x = pictures(2, side, side + ours.config.downsampling, 3)
    posterior = call(ours, "encode", params, x)
    for found, wanted in zip(posterior, reference(network, "encode", x), strict=True):
        assert_close(found, wanted)
    z = pictures(2, 4, 3, ours.config.latent_channels) * 2
    assert_close(call(ours, "decode", params, z), reference(network, "decode", z))


@pytest.fixture(scope="module")
def small():
    network = theirs("two layers a block")
    return network, *converted(network)


def test_the_tree_goes_back_to_the_same_file(small):
    network, ours, params = small
    tensors = {k: v.numpy() for k, v in network.state_dict().items()}
    back = to_torch_names("vae", params, ours.config)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_old_names_of_the_attention_are_read(small):
    network, ours, params = small
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in network.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        tensors[name] = tensor.numpy()
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    jax.tree.map(
        np.testing.assert_array_equal, to_jax("vae", tensors, ours.config), params
    )


def test_slices_equal_the_whole(small):
    _, ours, params = small
    z = jnp.asarray(pictures(4, 4, 3, 4))
    decode = lambda z: ours.apply({"params": params}, z, method="decode")  # noqa: E731
    encode = lambda x: ours.apply({"params": params}, x, method="encode")  # noqa: E731
    whole = jax.jit(decode)(z)
    for at_once in (1, 6):  # 6: its common divisor with the batch of 4 is 2
        found = jax.jit(lambda z, n=at_once: vae.decode_sliced(decode, z, n))(z)
        assert_close(found, whole)
    x = jnp.asarray(pictures(3, 8, 6, 3))
    sliced = jax.jit(lambda x: vae.decode_sliced(encode, x))(x)
    jax.tree.map(lambda a, b: assert_close(a, b), sliced, jax.jit(encode)(x))


def test_a_slice_needs_the_memory_of_one(small):
    _, ours, params = small

    def temporary(run, samples):
        z = jax.ShapeDtypeStruct((samples, 16, 16, 4), jnp.float32)
        return jax.jit(run).lower(z).compile().memory_analysis().temp_size_in_bytes

    decode = lambda z: ours.apply({"params": params}, z, method="decode")  # noqa: E731
    sliced = lambda z: vae.decode_sliced(decode, z)  # noqa: E731
    one, many = temporary(decode, 1), temporary(decode, 8)
    assert many > 5 * one  # without slices it does grow
    assert temporary(sliced, 8) < 2 * one


@pytest.mark.parametrize("chunk", [4, 5, 12, 100])
def test_attention_in_chunks_by_hand(chunk):
    q, k, v = np.random.default_rng(1).normal(size=(3, 2, 12, 6))
    scores = np.einsum("bld,bmd->blm", q, k) / np.sqrt(6)
    weights = np.exp(scores)
    wanted = weights @ v / weights.sum(-1, keepdims=True)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    np.testing.assert_allclose(vae.chunked_attention(q, k, v, chunk), wanted, atol=1e-5)
    slope = lambda c: jax.grad(  # noqa: E731
        lambda q: jnp.sum(vae.chunked_attention(q, k, v, c) ** 2)
    )(q)
    np.testing.assert_allclose(slope(chunk), slope(12), atol=1e-5)


def test_large_pictures_attend_in_chunks(small, monkeypatch):
    """The network itself cuts its queries, and the result is the same."""
    _, ours, params = small
    z = pictures(1, 36, 36, 4)  # 1296 positions, more than one chunk
    assert vae.QUERY_CHUNK < 36 * 36
    found = call(ours, "decode", params, z)
    whole = vae.chunked_attention
    monkeypatch.setattr(vae, "chunked_attention", lambda *a: whole(*a, chunk=36 * 36))
    assert_close(found, call(ours, "decode", params, z))


def test_bfloat16_returns_float32(small):
    _, ours, params = small
    half = AutoencoderKL(ours.config, "bfloat16")
    x, z = pictures(1, 8, 8, 3), pictures(1, 4, 4, 4)
    calls = [("encode", x), ("decode", z)]
    for method, value in calls:
        found = jax.tree.leaves(call(half, method, params, value))
        wanted = jax.tree.leaves(call(ours, method, params, value))
        assert all(y.dtype == jnp.float32 for y in found)
        errors = [
            float(abs(a - b).max() / abs(b).max())
            for a, b in zip(found, wanted, strict=True)
        ]
        assert all(1e-4 < error < 0.1 for error in errors), errors


def test_the_log_variance_is_clipped_as_in_the_reference(small):
    network, ours, params = small
    x = pictures(1, 8, 8, 3)
    bias = jnp.asarray([0, 0, 0, 0, 1e3, -1e3, 0, 0], jnp.float32)
    wild = {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}
    logvar = call(ours, "encode", wild, x).logvar
    assert logvar[..., 0].min() == 20.0 and logvar[..., 1].max() == -30.0


def test_the_parameters_of_stable_diffusion():
    shapes = network_shapes("vae", SD)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert count == 83_653_863
    assert SD.downsampling == 8


def test_scales():
    config = VaeConfig(scaling_factor=0.5, shift_factor=2.0)
    z = jnp.asarray([[4.0, -2.0]])
    np.testing.assert_array_equal(config.scale(z), [[1.0, -2.0]])
    np.testing.assert_array_equal(config.unscale(config.scale(z)), z)


# ---- config.json

# What the file of Stable Diffusion 1.5 says, and nothing about newer keys.
JSON = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
NEWER = {
    "shift_factor": None,
    "scaling_factor": 0.18215,
    "norm_num_groups": 32,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def test_old_and_new_files_say_the_same():
    assert VaeConfig.from_json(JSON) == SD == VaeConfig.from_json(JSON | NEWER)
    assert hash(SD) == hash(dataclasses.replace(SD))


REFUSED = {
    "act_fn": "relu",
    "down_block_types": ["AttnDownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "norm_num_groups": 33,
    "layers_per_block": 0,
    "latent_channels": "4",
    "block_out_channels": 128,
    "scaling_factor": 0,
    "shift_factor": True,
    "use_quant_conv": 1,
    "spatial_norm": True,
    "_class_name": "AutoencoderTiny",
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(key):
    with pytest.raises(UserError, match=key) as error:
        VaeConfig.from_json(JSON | {key: REFUSED[key]})
    assert "autoencoder" in str(error.value) and "way out" in str(error.value)


def test_all_that_is_refused_is_listed():
    several = {"act_fn": "relu", "layers_per_block": 0, "spatial_norm": True}
    with pytest.raises(UserError, match="act_fn.*layers_per_block.*spatial_norm"):
        VaeConfig.from_json(JSON | several)
