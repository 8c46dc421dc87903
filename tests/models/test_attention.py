"""Attention against the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.models.attention import attention

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
