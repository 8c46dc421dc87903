"""The layers against the same formulas in float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ddrl_jax.interfaces import Cond
from ddrl_jax.models.denoiser import make_denoiser
from ddrl_jax.models.layers import Dense, rms_norm, time_features
from ddrl_jax.sharding import RULES, make_mesh

RNG = np.random.default_rng(2)
X, W, A, B = (RNG.normal(size=s) for s in [(2, 5, 4), (4, 3), (4, 2), (2, 3)])
BIAS = RNG.normal(size=3)
PARAMS = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
LORA = {"a": jnp.asarray(A, jnp.float32), "b": jnp.asarray(B, jnp.float32)}


def run(layer, lora=None, x=X):
    trees = {"params": PARAMS} | ({"lora": lora} if lora else {})
    return np.asarray(layer.apply(trees, jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("x", [X, X[0], X[0, 0]])
def test_dense_acts_on_the_last_axis(x):
    np.testing.assert_allclose(run(Dense(3), x=x), x @ W + BIAS, atol=1e-5)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (6.0, 3.0), (1.0, 0.5)])
def test_low_rank_part_by_hand(alpha, scale):
    found = run(Dense(3, rank=2, alpha=alpha), LORA)
    np.testing.assert_allclose(found, X @ (W + scale * A @ B) + BIAS, atol=1e-5)


def test_without_its_tree_the_low_rank_part_is_off():
    np.testing.assert_array_equal(run(Dense(3, rank=2)), run(Dense(3)))


def test_a_new_layer():
    x = jnp.asarray(X, jnp.float32)
    layer = Dense(3, axes=("mlp", "embed"), rank=2)
    trees = layer.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, x)
    specs = nn.get_partition_spec(trees)
    assert specs["params"] == {"kernel": P("mlp", "embed"), "bias": P("embed")}
    assert specs["lora"] == {"a": P("mlp", None), "b": P(None, "embed")}
    found = nn.meta.unbox(trees)
    assert np.all(found["lora"]["b"] == 0) and np.abs(found["lora"]["a"]).max() > 0
    assert np.abs(found["params"]["kernel"]).max() > 0
    np.testing.assert_array_equal(layer.apply(trees, x), Dense(3).apply(trees, x))


def test_zero_starts_at_zero():
    x = jnp.asarray(X, jnp.float32)
    found, trees = Dense(3, zero=True).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(found, 0.0)
    assert trees["params"]["kernel"].unbox().shape == (4, 3)


def test_half_precision_is_of_the_product_only():
    layer = Dense(3, dtype="bfloat16", rank=2)
    x = jnp.asarray(X, jnp.float32)
    trees = layer.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, x)
    assert {a.dtype for a in jax.tree.leaves(trees)} == {jnp.dtype("float32")}
    found = layer.apply({"params": PARAMS, "lora": LORA}, x)
    assert found.dtype == jnp.bfloat16
    expected = X @ (W + A @ B) + BIAS
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert 1e-4 < error < 0.1


def test_rms_norm_by_hand():
    found = rms_norm(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(
        found, X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5
    )
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 4))), 0.0)
    large = rms_norm(jnp.full((1, 4), 1e4, jnp.bfloat16))  # its square has no bfloat16
    assert large.dtype == jnp.bfloat16 and np.all(np.asarray(large) == 1.0)


def test_time_features_by_hand():
    time = np.asarray([0.0, 0.25, 1.0])
    found = np.asarray(time_features(jnp.asarray(time, jnp.float32), 8))
    frequency = 10000.0 ** -(np.arange(4) / 4)
    angle = 1000.0 * time[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # angles reach 1000
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], [1.0] * 4 + [0.0] * 4)


class Called(nn.Module):
    """A layer under the arguments of a denoiser."""

    layer: Dense

    @nn.compact
    def __call__(self, z, time, text):
        return self.layer(z)


@pytest.mark.parametrize(
    ("rules", "kernel", "bias"),
    [
        (RULES, P(None, P.UNCONSTRAINED), P(P.UNCONSTRAINED)),
        ({"mlp": ("fsdp", "tensor")}, P(P.UNCONSTRAINED, "tensor"), P("tensor")),
        ({"mlp": ("fsdp",), "embed": ("fsdp",)}, P(None, None), P(None)),
    ],
)
def test_a_weight_is_whole_over_fsdp_by_the_table_of_the_run(rules, kernel, bias):
    """An axis that the table divides over fsdp as well keeps what else divides it."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    layer, z = Called(Dense(4, mesh=make_mesh(sizes))), jnp.zeros((2, 6))
    made = make_denoiser(layer, (z, z, z), rules)
    params = made.init(jax.random.key(0))["params"]
    jaxpr = jax.make_jaxpr(made.denoise)(params, None, z, z, Cond(z))
    placed = (e for e in jaxpr.eqns if e.primitive.name == "sharding_constraint")
    assert [e.params["sharding"].spec for e in placed] == [kernel, bias]
