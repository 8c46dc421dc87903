"""The table of accelerators: its figures follow from others of the same vendor."""

from types import SimpleNamespace

import jax
import pytest

from ddrl_jax.chips import CHIPS, chip_named, detect
from ddrl_jax.errors import UserError


@pytest.mark.parametrize(
    "name, chips, petaflops",
    # "BF16 peak compute per Pod" of Google's pages. Of the petaFLOPS of NVIDIA's hosts
    # DGX A100's 5 are sparse, and DGX H100's 32 are sparse and in 8 bits.
    [
        ("v5e", 256, 50.63),
        ("v6e", 256, 234.9),
        ("A100-80", 8, 5 / 2),
        ("H100", 8, 32 / 4),
    ],
)
def test_peaks_add_up_to_those_of_whole_systems(name, chips, petaflops):
    assert chips * CHIPS[name].flops / 1e15 == pytest.approx(petaflops, rel=0.02)


@pytest.mark.parametrize(
    "name, hosts, terabits",
    [("v5e", 256 // 8, 6.4), ("v6e", 256 // 8, 25.6)],  # of a pod, to the data centre
)
def test_a_pods_network_is_that_of_its_hosts(name, hosts, terabits):
    assert hosts * CHIPS[name].dcn_bandwidth * 8 / 1e12 == pytest.approx(terabits)


@pytest.mark.parametrize(
    "name, bytes_per_second",
    [("v5e", 50e9), ("v5p", 100e9), ("v6e", 100e9), ("H100", 18 * 25e9)],
)
def test_bandwidth_of_a_link(name, bytes_per_second):
    chip = CHIPS[name]
    assert chip.ici_bandwidth / chip.ici_links == pytest.approx(bytes_per_second)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_units_are_plausible(chip):
    """Factors of 8 or 1,000 would leave these ranges, which hold for all of them."""
    assert 1e14 < chip.flops < 1e15
    assert 1.5e10 < chip.hbm_bytes < 1.5e11
    assert 8e11 < chip.hbm_bandwidth < 5e12
    assert 100 < chip.flops / chip.hbm_bandwidth < 600  # FLOPs a byte
    assert chip.dcn_bandwidth / chip.chips_per_host < chip.ici_bandwidth / 4


def test_no_device_has_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_names_are_found_in_either_case():
    assert chip_named("V5P") is CHIPS["v5p"]
    assert chip_named("h100") is CHIPS["H100"]
    assert chip_named("A100") is CHIPS["A100-80"]


@pytest.mark.parametrize("name, meant", [("v5", "v5"), ("H-100", "H100"), ("xyz", "")])
def test_an_unknown_name_is_an_error_with_a_near_one(name, meant):
    with pytest.raises(UserError, match="v5e, v5p, v6e, A100-40") as error:
        chip_named(name)
    assert ("did you mean" in error.value.way_out) == bool(meant)
    assert meant in error.value.way_out


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA H100 PCIe", None),  # slower: no peak is better than a wrong one
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_device_is_recognised(monkeypatch, kind, name):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert detect() is (CHIPS[name] if name else None)


def test_a_cpu_has_no_peak():
    assert detect() is None
