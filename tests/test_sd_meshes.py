"""Stable Diffusion on meshes: an epoch of the tiny UNet has the numbers of one device.

Small pictures are what XLA got wrong: the latents are 8 x 8, the lowest level 4 x 4.
"""

import jax
import numpy as np
import optax
import pytest
from mesh_epochs import compare, diffused_epoch
from tiny_runs import same_bits

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.sharding import to_host

pytestmark = pytest.mark.slow

RATIO = "policy/ratio_max_deviation"
MESHES = {
    "fsdp, tensor": {"fsdp": 4, "tensor": 2},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data, tensor, context": {"data": 2, "tensor": 2, "context": 2},
}


def gradient(epoch):
    """Of the one update: a tenth of it is Adam's first moment."""
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    parts = jax.tree.leaves(epoch[4].opt_state, is_leaf=is_adam)
    return to_host(next(part.mu for part in parts if is_adam(part)))


def on(**sizes):
    edits = {f"mesh.{axis}": n for axis, n in ({"data": 1} | sizes).items()}
    found = diffused_epoch(**edits)
    assert len(found[0].mesh.devices.flat) == np.prod([*sizes.values()], dtype=int)
    return found


@pytest.fixture(scope="module")
def alone():
    return on()


@pytest.fixture(scope="module")
def divided():
    """name -> epoch, each run once."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = on(**MESHES[name])
        return found[name]

    return get


def test_eight_devices_have_the_samples_of_one_to_the_bit(alone):
    found = on(data=8)
    assert found[0].chunk == 8 and alone[0].chunk == 1
    assert same_bits(found[1], alone[1])
    assert same_bits(found[2], alone[2])  # states, log-probs, times, steps
    assert same_bits(found[3], alone[3])  # what the rewards are a function of
    compare(to_host(found[4].params), to_host(alone[4].params), 1e-6)
    compare(found[5], alone[5], 1e-6)
    assert found[5][RATIO] == alone[5][RATIO] == 0.0


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_no_number(name, alone, divided):
    _, before, trajectory, images, after, metrics = divided(name)
    assert same_bits(before, alone[1])
    compare(trajectory._replace(index=0), alone[2]._replace(index=0), 1e-5)
    np.testing.assert_array_equal(trajectory.index, alone[2].index)
    assert np.abs(images.astype(int) - alone[3]).max() <= 1  # of 255
    moved = jax.tree.map(lambda a, b: a - b, to_host(alone[4].params), alone[1][0])
    assert max(np.abs(a).max() for a in jax.tree.leaves(moved)) > 1e-6
    compare(to_host(after.params), to_host(alone[4].params), 1e-5)
    compare(metrics, alone[5], 1e-5)
    slopes = jax.tree.leaves(gradient(alone))
    for a, b in zip(jax.tree.leaves(gradient(divided(name))), slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    assert metrics[RATIO] == 0.0


def test_what_one_mesh_saves_another_restores_to_the_bit(divided, tmp_path):
    *_, state, _ = divided("fsdp, tensor")
    program, *_ = divided("data, fsdp, tensor")
    checkpoints = Checkpoints(tmp_path, 1, 9)
    checkpoints.save(1, {"train": state}, {"epoch": 1})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 1, 9)
    like = abstract({"train": program.abstract_state()})
    found = checkpoints.restore(like)
    checkpoints.close()
    assert found is not None and same_bits(
        to_host(found.state["train"]), to_host(state)
    )
    kernel = found.state["train"].params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    shape = kernel.shape
    shard = (*shape[:2], shape[2] // 2, shape[3] // 2)
    assert kernel.sharding.shard_shape(shape) == shard
