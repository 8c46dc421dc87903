"""On any mesh the same bits: a data mesh draws the samples of one device, and the
rollout, the replay and the update round alike."""

import pytest
from mesh_epochs import EDITS, compare, epoch
from tiny_runs import perturbed_state, same_bits, tiny_program

from ddrl_jax.self_test import ratio_deviations
from ddrl_jax.sharding import to_host

pytestmark = [pytest.mark.slow, pytest.mark.optimised]


def test_eight_devices_have_the_samples_of_one_to_the_bit():
    alone = epoch()
    found = epoch(**{"mesh.data": 8})
    assert len(found[0].mesh.devices.flat) == 8 and found[0].chunk == 8
    assert alone[0].chunk == 1
    assert same_bits(found[1], alone[1])
    assert same_bits(found[2], alone[2])  # states, log-probs, times, steps
    assert same_bits(found[3], alone[3])  # what the rewards are a function of
    compare(to_host(found[4].params), to_host(alone[4].params), 1e-6)
    compare(found[5], alone[5], 1e-6)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"data": 2, "context": 4},
    ],
    ids=str,
)
def test_on_policy_the_ratio_is_1_on_any_mesh(mesh):
    edits = {"mesh.data": 1} | {f"mesh.{axis}": size for axis, size in mesh.items()}
    program = tiny_program(EDITS | {"data_term.weight": 0.0} | edits)
    found = ratio_deviations(program, perturbed_state(program))
    assert {name: values.max() for name, values in found.items()} == {
        "replay": 0.0,
        "update": 0.0,
    }
