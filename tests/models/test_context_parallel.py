"""Attention over tokens on several devices is the attention of one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.models import attention_kernels
from ddrl_jax.models.attention import attention
from ddrl_jax.models.context_parallel import on_shards, ulysses
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
    if mesh is not None:
        qkv, mask = jax.device_put(
            (qkv, mask), NamedSharding(mesh, P(("data", "fsdp")))
        )
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


@pytest.mark.parametrize("impl", ["ulysses", "ring"])
def test_lengths_that_do_not_divide_are_padded(impl):
    inputs = draw(length=13, heads=4)
    for mask in (None, padding(13)):
        expected = value_and_slopes("xla", None, inputs, mask)
        found = value_and_slopes(impl, mesh_of(1, 2, 1, 4), inputs, mask)
        assert_equal(found, expected, 2e-6)


@pytest.mark.parametrize("impl", ["ulysses", "ring", "auto", "xla", "chunked"])
@pytest.mark.parametrize("queries", [32, 13])
def test_attention_to_a_prompt(impl, queries):
    """Queries stay on their device; every device has all of the few keys."""
    q, _, _, w = draw(length=queries)
    inputs, mask = (q, *draw(length=7)[:2], w), padding(7)
    expected = value_and_slopes("xla", None, inputs, mask)
    found = value_and_slopes(impl, mesh_of(2, 1, 2, 2), inputs, mask)
    assert_equal(found, expected, 2e-6)


def test_a_sample_of_padding_is_that_of_one_device():
    """No key of it counts: values and slopes are finite, and the same everywhere."""
    inputs, mask = draw(length=16), padding(16).at[0].set(False)
    expected = value_and_slopes("xla", None, inputs, mask)
    for impl in ("ulysses", "ring"):
        found = value_and_slopes(impl, mesh_of(1, 1, 1, 8), inputs, mask)
        assert_equal(found, expected, 2e-6)


@pytest.mark.parametrize("impl", ["ulysses", "ring"])
def test_half_precision_is_as_close_as_on_one_device(impl):
    exact = value_and_slopes("xla", None, draw(), None)
    mesh, half = mesh_of(2, 1, 1, 4), draw(dtype="bfloat16")
    found = value_and_slopes(impl, mesh, half, None)
    assert found[1].dtype == jnp.bfloat16
    assert_equal(found, exact, 0.02)
    with pytest.raises(AssertionError):
        assert_equal(found, exact, 1e-4)


def test_queries_of_a_ring_go_in_chunks(monkeypatch):
    monkeypatch.setattr(attention_kernels, "QUERY_CHUNK", 4)
    monkeypatch.setattr(attention_kernels, "LEAST_CHUNK", 2)
    inputs, mask = draw(length=48, heads=3), padding(48)
    expected = value_and_slopes("xla", None, inputs, mask)
    found = value_and_slopes("ring", mesh_of(2, 1, 1, 4), inputs, mask)
    assert_equal(found, expected, 2e-6)


# ---- what the compiler made of it

LENGTH, SHARDS = 512, 8


def compiled(impl, heads):
    """The program of one device for the gradients, tokens over the devices."""
    mesh = mesh_of(1, 1, 1, SHARDS)
    inputs = draw(length=LENGTH, heads=heads, batch=1)
    place = NamedSharding(mesh, P(None, "context"))

    def total(q, k, v, w):
        return jnp.sum(jnp.sin(attention(q, k, v, impl=impl, mesh=mesh)) * w)

    slopes = jax.jit(jax.grad(total, (0, 1, 2)), out_shardings=place)
    return slopes.lower(*jax.device_put(inputs, place)).compile().as_text()


def sizes(text):
    """Every dimension of every array of numbers in a program."""
    shapes = re.findall(r"\b(?:f32|bf16|pred)\[([\d,]+)\]", text)
    return {int(n) for shape in shapes for n in shape.split(",")}


def test_a_ring_never_holds_all_tokens():
    text = compiled("ring", heads=3)
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
    assert LENGTH // SHARDS in sizes(text) and max(sizes(text)) < LENGTH
    assert max(sizes(compiled("xla", heads=3))) >= LENGTH  # keys are gathered there


def test_ulysses_holds_all_tokens_of_some_heads():
    text = compiled("ulysses", heads=8)
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 8
    assert "all-gather" not in text and "collective-permute" not in text
    weights = f"{LENGTH},{LENGTH}]"
    found = set(re.findall(rf"f32\[([\d,]*){weights}", text))
    assert found and found <= {"", "1,", "1,1,"}  # of one head


# ---- kernels of accelerators inside


@pytest.mark.slow
def test_splash_on_every_device_of_a_mesh():
    """Interpreted: what JAX can not see into has the right values and slopes too."""
    kernel = partial(attention_kernels.splash, interpret=True)
    bodies = {True: partial(ulysses, local=kernel), False: kernel}
    *qkv, w = draw(length=64, heads=4)
    expected = value_and_slopes("xla", None, (*qkv, w), None)
    for split_keys, body in bodies.items():

        def total(q, k, v, body=body, split_keys=split_keys):
            mesh, options = mesh_of(2, 1, 2, 2), {"checked": False}
            out = on_shards(body, q, k, v, None, mesh, split_keys=split_keys, **options)
            return jnp.sum(out * w), out

        found = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv)
        assert_equal(found, expected, 5e-6)


@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [
        ("splash", "tpu", "tpu_custom_call"),
        ("cudnn", "cuda", "__cudnn$fmhaSoftmaxBackward"),
    ],
)
@pytest.mark.parametrize("split_keys", [True, False])
def test_kernels_get_shards(name, platform, call, split_keys, monkeypatch):
    """8 heads over tensor 2 and context 2 are two each, of all 256 tokens; where the
    keys are gathered, four each, and 128 queries."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)
    kernel = attention_kernels.KERNELS[name]
    body = partial(ulysses, local=kernel) if split_keys else kernel
    *qkv, w = draw(length=256, dim=64, dtype="bfloat16")

    def total(q, k, v):
        mesh = mesh_of(2, 1, 2, 2)
        options = {"split_keys": split_keys, "checked": False}
        return jnp.sum(on_shards(body, q, k, v, None, mesh, **options) * w)

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*qkv)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in text.splitlines() if call in line]
    heads, queries = (2, 256) if split_keys else (4, 128)
    shard = {"splash": f"{heads}x{queries}x64x", "cudnn": f"1x{queries}x{heads}x64x"}
    assert calls and all(f"tensor<{shard[name]}bf16>" in line for line in calls)
