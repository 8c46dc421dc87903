"""Convolutions on a mesh, as the compiler divides them and as they are counted."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.flops import count
from ddrl_jax.models.resnet import Conv
from ddrl_jax.sharding import make_mesh

MESHES = [{"data": 2, "context": 2}, {"data": 4}]


def _layer(sizes, size) -> tuple[Any, Any, Any]:
    """A convolution, its weights and a batch of pictures, as shapes on a mesh."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes)
    layer = Conv(32, size=size, mesh=mesh)
    x = jax.ShapeDtypeStruct((4, 8, 6, 16), jnp.float32)
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))

    def placed(tree, spec):
        place = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
        )

    return layer.apply, placed(params, P()), placed(x, P("data"))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sizes", MESHES)
def test_what_all_devices_multiply_is_what_xla_gives_each_of_them(sizes, size):
    """Over a context axis pictures are whole: each of its devices does the same."""
    apply, params, x = _layer(sizes, size)
    analysis: Any = jax.jit(apply).lower(params, x).compile().cost_analysis()
    context = sizes.get("context", 1)
    biases = context * 4 * 8 * 6 * 32  # one addition a value
    found = count(apply, params, x)
    assert found.flops == 4 * analysis["flops"] - biases
    assert found.repeated == found.flops - found.flops // context


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_within_a_loop_and_a_checkpoint_are_repeated_too(size):
    """Forward, again for the gradient, and two gradients: four times the forward."""
    found = {}
    for sizes in MESHES:
        apply, params, x = _layer(sizes, size)

        @jax.checkpoint
        def step(total, _, apply=apply):
            params, x, seen = total
            return (params, x, seen + jnp.sum(jnp.tanh(apply(params, x)))), None

        def loss(params, x, step=step):
            return jax.lax.scan(step, (params, x, 0.0), None, length=3)[0][2]

        found[sizes.get("context", 1)] = count(jax.grad(loss, (0, 1)), params, x)
    one, two = found[1], found[2]
    assert two.flops == 2 * one.flops and one.repeated == 0
    assert two.recomputed == 2 * one.recomputed > 0
    assert two.dot_bytes == 2 * one.dot_bytes
    assert two.model_flops == one.model_flops == one.flops - one.recomputed
