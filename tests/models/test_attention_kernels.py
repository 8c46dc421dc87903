"""Attention in chunks of queries is attention."""

from functools import partial

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

        slopes = jax.grad(total, (0, 1, 2))(q, k, v)
        return attention(q, k, v, impl=impl, mask=mask), slopes

    found, expected = (jax.jit(both, static_argnums=0)(n) for n in ("chunked", "xla"))
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


# ---- splash, in Pallas's interpreter and lowered for a TPU


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(256, 128), (100, 130)])
def test_splash_is_attention(queries, keys, masked):
    q, k, v = draw(queries, keys)
    mask = jnp.asarray(RNG.random((2, keys)) < 0.7) if masked else None

    def total(run, q, k, v):
        out = run(q, k, v, mask)
        return jnp.sum(jnp.sin(out)), out

    def both(run):
        slopes = jax.grad(partial(total, run), (0, 1, 2), has_aux=True)
        return jax.jit(slopes)(q, k, v)

    interpreted = partial(module.splash, interpret=True)
    found, expected = both(interpreted), both(module.xla)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected
    )


def lowered(kernel, platform, shapes, dtype):
    """StableHLO of value and gradients for a machine that is not here."""
    inputs = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]

    def total(q, k, v):
        out = kernel(q, k, v, None)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*inputs)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [128, 64, 40])
def test_splash_is_lowered_for_a_tpu(dim, dtype):
    """Mosaic accepts the blocks and layouts; forward and two backward kernels."""
    shapes = ((1, 1100, 2, dim), *((1, 1024, 2, dim),) * 2)
    text = lowered(module.splash, "tpu", shapes, dtype)
    assert text.count("tpu_custom_call") == 3


def test_cudnn_is_lowered_for_a_gpu(monkeypatch):
    """Asks for the fused kernels; only the look at the installed library is faked."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)
    text = lowered(module.cudnn, "cuda", ((2, 70, 6, 32),) * 3, "bfloat16")
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
