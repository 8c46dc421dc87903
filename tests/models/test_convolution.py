"""The convolution's own gradient equals the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.models.convolution import convolve

RNG = np.random.default_rng(3)


def derived(x, kernel, stride):
    rim = kernel.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    window = ((stride, stride), [(rim, rim)] * 2)
    return jax.lax.conv_general_dilated(x, kernel, *window, dimension_numbers=numbers)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(6, 6), (7, 5), (8, 3)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_value_and_gradients(size, side, stride):
    x = jnp.asarray(RNG.normal(size=(2, *side, 3)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(size, size, 3, 4)), jnp.float32)
    assert jax.default_backend() == "cpu"  # elsewhere both are the same function
    y, want = convolve(x, kernel, stride), derived(x, kernel, stride)
    np.testing.assert_array_equal(y, want)
    cotangent = jnp.asarray(RNG.normal(size=want.shape), jnp.float32)

    def gradients(function):
        return jax.vjp(lambda x, k: function(x, k, stride), x, kernel)[1](cotangent)

    for found, expected in zip(gradients(convolve), gradients(derived), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "convolutions", "products"), [("cpu", 2, 9), ("tpu", 3, 0)]
)
def test_each_platform_has_its_own_weight_gradient(platform, convolutions, products):
    """On a CPU a kernel's gradient is products: none of its convolution in a loop."""
    x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
    loss = lambda k, x: jnp.sum(convolve(x, k) ** 2)  # noqa: E731
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(kernel, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == products
