"""Attention in chunks of queries is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.models import attention_kernels as module
from ddrl_jax.models.attention import attention

RNG = np.random.default_rng(1)


def draw(length, keys):
    shapes = ((2, length, 2, 3), (2, keys, 2, 3), (2, keys, 2, 3))
    return [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes]


@pytest.mark.parametrize(
    ("length", "chunk"),
    [(936, 936), (1024, 1024), (4096, 1024), (32_760, 936), (1031, 1031), (2062, 2062)],
)
def test_chunks_divide_and_are_no_slivers(length, chunk):
    assert module.chunk_of(length) == chunk


@pytest.mark.parametrize("length", [4, 8, 12, 13])
def test_values_and_gradients_are_those_of_full_attention(length, monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)
    monkeypatch.setattr(module, "LEAST_CHUNK", 2)  # 13 is a prime: all at once
    q, k, v = draw(length, 7)
    mask = jnp.asarray(RNG.random((2, 7)) < 0.7).at[:, 0].set(True)

    def both(impl):
        def total(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v, impl=impl, mask=mask)))

        return attention(q, k, v, impl=impl, mask=mask), jax.grad(total, (0, 1, 2))(
            q, k, v
        )

    found, expected = both("chunked"), both("xla")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected
    )


def test_the_gradient_never_holds_the_weights_of_all_queries(monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 128)
    inputs = draw(1024, 1024)

    def memory(impl):
        total = lambda q, k, v: attention(q, k, v, impl=impl).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights = 2 * 2 * 1024 * 1024 * 4
    assert memory("xla") >= weights and memory("chunked") < 0.5 * weights
