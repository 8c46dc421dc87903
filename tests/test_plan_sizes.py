"""What a leaf takes on a device: by its shape, or in whole tiles, by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planned_runs import ONE, tiny

from ddrl_jax.chips import CHIPS
from ddrl_jax.plan.lowered import describe
from ddrl_jax.plan.memory import resident
from ddrl_jax.plan.sizes import bytes_per_device, laid_out, padded
from ddrl_jax.plan.target import Target, unsaved
from ddrl_jax.sharding import make_mesh

TWO = ONE | {"data": 2}
KEY = jax.eval_shape(lambda: jax.random.key(0)).dtype
# Shape over two devices, dtype, and a TPU's layout; then the bytes of one device.
LEAVES = [
    # Latents of 64 x 64 x 4: the columns come last and fill half of 128.
    ((6, 8, 64, 64, 4), "float32", (0, 1, 2, 4, 3), (4, 128), 6 * 4 * 64 * 4 * 128 * 4),
    ((50, 8), "float32", (1, 0), (4, 128), 4 * 128 * 4),  # [4 50] in tiles of 4 x 128
    ((3, 4, 320, 4), "bfloat16", (0, 1, 3, 2), (4, 128), 3 * 2 * 4 * 384 * 2),
    ((7, 2), "bfloat16", (0, 1), None, 7 * 1 * 2),
    ((), "float32", (), (128,), 512),
    ((5, 8), KEY, (1, 0, 2), (2, 128), 4 * 6 * 128 * 4),  # two words each
]


def shaped(mesh, shape, dtype):
    spec = P(None, "data") if len(shape) > 1 else P()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize(("shape", "dtype", "order", "tile", "size"), LEAVES)
def test_a_part_in_whole_tiles_by_hand(shape, dtype, order, tile, size):
    layout = Layout(order, tiling=(tile, (2, 1)) if tile else None)
    assert padded(shaped(make_mesh(TWO), shape, dtype), layout) == size


def test_the_rows_are_those_of_the_compiler():
    """As if it had rounded each array of a chunk up to three times its shape."""
    run = describe(tiny())
    chunk = jax.tree.leaves(run.chunk)
    larger = run._replace(sizes={id(a): 3 * bytes_per_device(a) for a in chunk})
    name = "trajectories of the epoch"
    assert resident(larger) == resident(run) | {name: 3 * resident(run)[name]}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_compiler_of_tpus_agrees():
    mesh = make_mesh(TWO, Target("tpu", CHIPS["v6e"]).devices(TWO))
    leaves = [shaped(mesh, shape, dtype) for shape, dtype, *_ in LEAVES]
    found = laid_out(leaves)
    with unsaved():
        everything = jax.jit(lambda *a: jnp.zeros(()), keep_unused=True).lower(*leaves)
        memory = everything.compile().memory_analysis()
    assert sum(found.values()) == memory.argument_size_in_bytes
    assert found[id(leaves[0])] == 2 * bytes_per_device(leaves[0])
