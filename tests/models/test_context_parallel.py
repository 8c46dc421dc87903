"""Attention over tokens on several devices is the attention of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.models.attention import attention
from ddrl_jax.sharding import make_mesh

AXES = ("data", "fsdp", "tensor", "context")
MESHES = [(1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 1, 4)]


def mesh_of(*shape):
    return make_mesh(dict(zip(AXES, shape, strict=True)))


def draw(length=32, heads=8, batch=2, dim=6, dtype="float32"):
    random = np.random.default_rng(7)
    return [
        jnp.asarray(random.normal(size=(batch, length, heads, dim)), dtype)
        for _ in range(4)
    ]


def padding(length=32, batch=2):
    """The first sample's last keys, and scattered ones of the others."""
    keep = np.random.default_rng(8).random((batch, length)) < 0.6
    keep[0], keep[:, 0] = np.arange(length) < length // 3, True
    return jnp.asarray(keep)


def value_and_slopes(impl, mesh, inputs, mask):
    """(output, gradients of <output, w>) with the inputs placed on the mesh."""
    *qkv, w = inputs

    def total(q, k, v, mask):
        out = attention(q, k, v, impl=impl, mask=mask, mesh=mesh)
        return jnp.sum(out * w), out

    go = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    if mesh is not None and qkv[0].shape[1] % mesh.shape["context"] == 0:
        place = NamedSharding(mesh, P(("data", "fsdp"), "context"))
        qkv, mask = jax.device_put((qkv, mask), place)
    return go(*qkv, mask)


def assert_equal(found, expected, tolerance):
    (slopes, out), (right_slopes, right) = found, expected
    for a, b in zip((out, *slopes), (right, *right_slopes), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(b).max() > 0.05
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("impl", ["ulysses", "ring", "chunked"])
def test_equal_to_full_attention_with_its_gradients(impl, shape, masked):
    heads = 8 * shape[2]
    inputs, mask = draw(heads=heads), padding() if masked else None
    expected = value_and_slopes("xla", None, inputs, mask)
    found = value_and_slopes(impl, mesh_of(*shape), inputs, mask)
    assert_equal(found, expected, 2e-6)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shape", MESHES)
def test_a_ring_needs_no_number_of_heads(shape, heads):
    inputs = draw(heads=heads)
    expected = value_and_slopes("xla", None, inputs, None)
    found = value_and_slopes("ring", mesh_of(*shape), inputs, None)
    assert_equal(found, expected, 2e-6)
