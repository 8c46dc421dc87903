"""Bandwidth along mesh axes by hand, on hosts of GPUs and on slices of TPUs."""

import pytest

from ddrl_jax.chips import CHIPS
from ddrl_jax.errors import UserError
from ddrl_jax.plan.links import lay


def mesh(data=1, fsdp=1, tensor=1, context=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}


@pytest.mark.parametrize(
    ("sizes", "axes", "gigabytes"),
    [
        ({"fsdp": 8}, ("fsdp",), 450),  # within a host
        ({"fsdp": 32}, ("fsdp",), 400),  # all eight NICs of 50 GB/s of each host
        ({"data": 4, "fsdp": 8}, ("data",), 50),  # a member a host: a NIC each
        ({"data": 4, "fsdp": 8}, ("fsdp",), 450),
        ({"data": 4, "fsdp": 8}, ("data", "fsdp"), 400),
        ({"data": 16, "fsdp": 2}, ("data",), 200),  # four members a host
        ({"data": 4, "tensor": 2, "fsdp": 4}, ("fsdp",), 450),
    ],
)
def test_groups_of_gpus_use_a_nic_for_each_member_on_a_host(sizes, axes, gigabytes):
    links = lay(CHIPS["H100"], mesh(**sizes))
    assert links.bandwidth(axes) == pytest.approx(gigabytes * 1e9)


def test_an_exchange_of_all_leaves_the_host_from_every_chip():
    links = lay(CHIPS["H100"], mesh(fsdp=32))
    # 24 of the 31 others are on other hosts
    assert links.bandwidth(("fsdp",), "all-to-all") == pytest.approx(50e9 * 31 / 24)
    assert links.bandwidth(("fsdp",), "collective-permute") == 50e9


@pytest.mark.parametrize(("chip", "devices"), [("v5e", 512), ("v6e", 512)])
def test_two_pods_are_two_slices_and_data_crosses_them(chip, devices):
    c = CHIPS[chip]
    links = lay(c, mesh(data=2, fsdp=devices // 2))
    assert links.count == 2
    assert links.slices[0].max() == 0 and links.slices[1].min() == 1
    assert links.bandwidth(("data",)) == c.dcn_bandwidth / 8
    assert links.bandwidth(("fsdp",)) == c.ici_bandwidth / 2  # two of four links


def test_fsdp_crosses_where_data_is_too_small():
    links = lay(CHIPS["v5e"], mesh(fsdp=256, context=2))
    # 128 members a slice have 128 x 3.125 GB/s, more than their ring
    assert links.count == 2 and links.bandwidth(("fsdp",)) == 100e9
    few = lay(CHIPS["v5p"], mesh(fsdp=4, context=2), slices=2)
    assert few.bandwidth(("fsdp",)) == 2 * 25e9 / 4
    assert few.bandwidth(("context",)) == 200e9


def test_one_pod_of_v5p_is_one_slice_unless_told():
    assert lay(CHIPS["v5p"], mesh(data=16, fsdp=64)).count == 1
    assert lay(CHIPS["v5p"], mesh(data=16, fsdp=64), slices=4).count == 4


@pytest.mark.parametrize(
    ("chip", "sizes", "slices"),
    [
        ("H100", {"context": 16}, 0),  # over two hosts
        ("v5p", {"fsdp": 8}, 3),
        ("v5e", {"fsdp": 512}, 1),
    ],
)
def test_what_no_machine_can_lay_out_is_an_error(chip, sizes, slices):
    with pytest.raises(UserError, match="slices"):
        lay(CHIPS[chip], mesh(**sizes), slices)


def test_a_long_ring_slows_an_exchange():
    """Bytes go n / 4 links far: four of 16, one of 4."""
    long, short = (lay(CHIPS["v5p"], mesh(context=n)) for n in (16, 4))
    assert long.bandwidth(("context",), "all-to-all") == 200e9 / 4
    assert short.bandwidth(("context",), "all-to-all") == 200e9


@pytest.mark.parametrize(
    ("chip", "sizes", "torus", "whole"),
    [
        ("v5p", {"data": 4, "fsdp": 16, "context": 4}, (4, 8, 8), False),
        ("v5p", {"fsdp": 64, "context": 4}, (4, 8, 8), True),
        ("v5p", {"fsdp": 16, "context": 4}, (4, 4, 4), True),
        ("v5e", {"data": 16, "fsdp": 16}, (16, 16), True),
        ("v5e", {"data": 4, "fsdp": 64}, (16, 16), False),
        ("v6e", {"data": 2, "fsdp": 4}, (2, 4), True),
        ("v5e", {"data": 2, "fsdp": 256}, (16, 16), True),  # a pod each
        ("H100", {"data": 4, "fsdp": 2}, (), True),
    ],
)
def test_axes_that_have_a_torus_axis_to_themselves(chip, sizes, torus, whole):
    links = lay(CHIPS[chip], mesh(**sizes))
    assert links.torus() == torus and links.on_whole_axes() == whole
