"""Attention against the formula in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from ddrl_jax.errors import UserError
from ddrl_jax.models.attention import (
    Call,
    attention,
    choose,
    describe,
    implementations,
    refusal,
)
from ddrl_jax.models.emoji import emoji_pipeline
from ddrl_jax.sharding import AXES, make_mesh

RNG = np.random.default_rng(3)
Q, K, V = RNG.normal(size=(2, 5, 3, 4)), *RNG.normal(size=(2, 2, 6, 3, 4))


def by_hand(q, k, v, mask=None):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(q.shape[:3]):
        score = k[b, :, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        weight = weight * (1.0 if mask is None else mask[b])
        out[b, i, h] = weight @ v[b, :, h] / weight.sum()
    return out


def run(dtype="float32", **options):
    return attention(*(jnp.asarray(a, dtype) for a in (Q, K, V)), **options)


def test_attention_by_hand():
    np.testing.assert_allclose(run(), by_hand(Q, K, V), atol=1e-5)


def test_padding_is_not_seen():
    mask = np.asarray([[1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)
    found = run(mask=jnp.asarray(mask))
    np.testing.assert_allclose(found, by_hand(Q, K, V, mask), atol=1e-5)
    assert np.abs(found - run()).max() > 0.05


def test_a_row_of_padding_stays_finite():
    assert np.isfinite(run(mask=jnp.zeros((2, 6), bool))).all()


def test_half_precision_keeps_its_weights_in_float32():
    found = run("bfloat16")
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - by_hand(Q, K, V)).max()
    assert 1e-5 < error < 0.05


def test_unknown_implementation():
    with pytest.raises(KeyError, match="none"):
        run(impl="none")


# ---- the choice

CPU = Call(
    backend="cpu",
    capability=None,
    dtype="float32",
    queries=70,
    keys=70,
    heads=6,
    dim=32,
    masked=False,
    context=1,
)
HOPPER = {"backend": "gpu", "capability": (9, 0), "dtype": "bfloat16"}
TPU = {"backend": "tpu", "dtype": "bfloat16"}
VIDEO = {"queries": 32_760, "keys": 32_760, "heads": 40, "dim": 128}
SD = {"queries": 4096, "keys": 4096, "heads": 8, "dim": 40}
PROMPT = {"keys": 77}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "xla"),
        (SD, "chunked"),  # 16.8 million weights a head
        (SD | PROMPT, "xla"),
        (VIDEO, "chunked"),
        # cuDNN: half precision, channels, generations
        (HOPPER, "cudnn"),
        (HOPPER | SD, "cudnn"),
        (HOPPER | SD | PROMPT, "cudnn"),
        (HOPPER | SD | {"dtype": "float16"}, "cudnn"),
        (HOPPER | SD | {"dtype": "float32"}, "chunked"),
        (HOPPER | {"dim": 36}, "xla"),
        (HOPPER | {"dim": 160}, "cudnn"),
        (HOPPER | {"dim": 264}, "xla"),
        (HOPPER | {"dim": 160, "capability": (8, 0)}, "xla"),
        (HOPPER | {"dim": 128, "capability": (8, 0)}, "cudnn"),
        (HOPPER | {"capability": (7, 5)}, "xla"),
        (HOPPER | {"capability": None}, "xla"),  # another maker's
        (HOPPER | {"masked": True}, "xla"),
        # splash: long on both sides
        (TPU, "xla"),
        (TPU | VIDEO, "splash"),
        (TPU | VIDEO | {"masked": True, "dtype": "float32"}, "splash"),
        (TPU | SD | PROMPT, "xla"),
        (TPU | {"queries": 1024, "keys": 1024}, "splash"),
        (TPU | {"queries": 1023, "keys": 1024}, "xla"),
        # tokens over several devices
        ({"queries": 72, "keys": 72, "context": 2}, "ulysses"),
        ({"queries": 72, "keys": 72, "context": 4}, "ring"),  # of 6 heads
        ({"context": 4}, "xla"),  # 70 tokens
        (HOPPER | VIDEO | {"context": 8}, "ulysses"),
        (HOPPER | VIDEO | {"context": 8, "heads": 20}, "ring"),
        (TPU | VIDEO | {"context": 4, "heads": 10}, "ring"),
        (TPU | VIDEO | {"context": 4, "keys": 512}, "xla"),
        (HOPPER | VIDEO | {"context": 4, "keys": 512}, "cudnn"),
        (VIDEO | {"context": 8, "keys": 512}, "xla"),  # 4,095 queries a device
        (VIDEO | {"keys": 512}, "chunked"),
    ],
)
def test_choices_by_hand(facts, expected):
    call = CPU._replace(**facts)
    assert choose(call) == expected
    assert refusal(expected, call) is None


def test_a_function_tells_which_attention_it_runs():
    @jax.jit
    def mix(x):
        body = lambda x, _: (attention(x, x, x, impl="auto"), None)  # noqa: E731
        return attention(jax.lax.scan(body, x, length=2)[0], x[:, :2], x[:, :2])

    long, short = (jax.ShapeDtypeStruct((1, n, 1, 4), "float32") for n in (3000, 30))
    assert implementations(mix, long) == ("chunked", "xla")  # 9 million weights a head
    assert implementations(mix, short) == ("xla",)
    mesh = make_mesh(dict(zip(AXES, (1, 1, 1, 2), strict=True)))
    spread = lambda x: attention(x, x, x, impl="auto", mesh=mesh)  # noqa: E731
    assert implementations(spread, short) == ("ring",)  # 1 head
    two = jax.ShapeDtypeStruct((1, 30, 2, 4), "float32")
    assert implementations(spread, two) == ("ulysses", "xla")
    odd = jax.ShapeDtypeStruct((1, 31, 1, 4), "float32")
    assert implementations(spread, odd) == ("xla_whole",)  # on both devices the same
    padded = lambda x: attention(x, x, x, impl="ring", mesh=mesh)  # noqa: E731
    assert implementations(padded, odd) == ("ring",)


@pytest.mark.parametrize(
    ("name", "facts", "got", "wanted"),
    [
        ("cudnn", {}, "cpu", "NVIDIA"),
        ("cudnn", HOPPER | {"capability": (7, 5)}, r"\(7, 5\)", "Ampere"),
        ("cudnn", HOPPER | {"dtype": "float32"}, "float32", "bfloat16"),
        ("cudnn", HOPPER | {"dim": 36}, "36 channels", "multiple of 8 up to 256"),
        ("cudnn", HOPPER | {"masked": True}, "padding", "no padding"),
        ("splash", HOPPER, "gpu", "a TPU"),
        ("ulysses", {}, "mesh.context 1", "divides the sequence"),
        ("ring", TPU, "mesh.context 1", "divides the sequence"),
        ("ulysses", {"context": 4}, "6 heads.* 4", "heads that mesh.context divides"),
    ],
)
def test_refusals_say_why(name, facts, got, wanted):
    reason = refusal(name, CPU._replace(**facts))
    assert reason and re.search(got, reason[0]) and re.search(wanted, reason[1])


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_two_run_everywhere(name):
    for facts in ({}, HOPPER, TPU, VIDEO | {"context": 8}):
        assert refusal(name, CPU._replace(**facts)) is None


def mesh_of(*shape):
    return make_mesh(dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("shape", "heads", "context"),
    [((1, 1, 1, 8), 6, 8), ((2, 1, 2, 2), 3, 2), ((1, 1, 4, 1), 6, 1)],
)
def test_what_is_known_of_a_call(shape, heads, context):
    """6 heads over 2 tensor shards are 3; 4 shards do not divide them."""
    q, k = jnp.zeros((2, 70, 6, 32)), jnp.zeros((2, 77, 6, 32))
    found = describe(q, k, None, mesh_of(*shape))
    assert found == CPU._replace(heads=heads, context=context, keys=77)
    assert describe(q, q, None, None) == CPU


# ---- what was asked for by name and can not be is refused at the start


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cudnn", (1, 1, 1, 1)),
        ("splash", (8, 1, 1, 1)),
        ("ring", (8, 1, 1, 1)),
        ("ulysses", (1, 1, 1, 4)),  # six heads
        ("ulysses", (1, 1, 2, 2)),  # three a tensor shard
    ],
)
def test_a_pipeline_refuses(name, shape):
    config = get_config()
    config.model.update(attention=name, init="random", width=24)
    with pytest.raises(UserError, match=f'the attention "{name}" can not run here'):
        emoji_pipeline(config, mesh_of(*shape))
    config.model.attention = "auto"
    emoji_pipeline(config, mesh_of(*shape))
