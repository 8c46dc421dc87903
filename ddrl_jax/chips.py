"""Accelerators by name: what their vendors say they can do.

Sources, all of them the vendors' own pages: Google Cloud's documentation "TPU v5e",
"TPU v5p" and "TPU v6e"; NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core
GPU" and "H200 Tensor Core GPU" (SXM modules), "DGX A100" and "DGX H100/H200" for the
network of a host of eight. NVIDIA's tensor-core figures are with 2:4 sparsity; the
dense ones here are half of them.
"""

import difflib
from typing import NamedTuple

import jax

from ddrl_jax.errors import UserError


class Chip(NamedTuple):
    """One accelerator, figures per chip unless said otherwise.

    Attributes:
      name: as in --plan.chip.
      flops: dense bfloat16 FLOP/s, a multiply-add as 2.
      hbm_bytes: capacity, in the vendor's units (GB is 1e9 bytes).
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s to chips of the same slice or NVLink domain, all links
        together, one direction.
      ici_links: over which that is spread; one direction of one torus axis has one.
        1 where a switch gives the whole bandwidth to any pair.
      dcn_bandwidth: bytes/s of a host to other slices or hosts, one direction.
      chips_per_host: that share the host's network.
      slice_chips: at most, behind the fast links: a TPU's slice, a host of GPUs.
      kinds: what JAX calls it, `device_kind`.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    chips_per_host: int
    slice_chips: int
    kinds: tuple[str, ...]


_GIB = 2.0**30
_GBIT = 1e9 / 8  # bytes

_TABLE = (
    # "Bidirectional ICI bandwidth 400 GBps", 2D torus, pods of 256; "2 x 100 Gbps NIC"
    # a host of 8
    Chip(
        *("v5e", 197e12, 16e9, 819e9, 200e9, 4, 200 * _GBIT, 8, 256),
        ("TPU v5 lite", "TPU v5e"),
    ),
    # "1200 GBps" bidirectional, 3D torus, slices of up to 6,144 of a pod's 8,960; "DCN
    # bandwidth per chip 50 Gbps", hosts of 4
    Chip(
        *("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 6, 200 * _GBIT, 4, 6144),
        ("TPU v5", "TPU v5p"),
    ),
    # "800 GBps" bidirectional, 2D torus, pods of 256; "4 x 200 Gbps NIC" a host of 8
    Chip(
        *("v6e", 918e12, 32e9, 1600e9, 400e9, 4, 800 * _GBIT, 8, 256),
        ("TPU v6 lite", "TPU v6e"),
    ),
    # NVLink 600 GB/s both ways; 8 x 200 Gb/s
    Chip(
        *("A100-40", 312e12, 40e9, 1555e9, 300e9, 1, 1600 * _GBIT, 8, 8),
        ("NVIDIA A100-SXM4-40GB",),
    ),
    Chip(
        *("A100-80", 312e12, 80e9, 2039e9, 300e9, 1, 1600 * _GBIT, 8, 8),
        ("NVIDIA A100-SXM4-80GB",),
    ),
    # NVLink 900 GB/s both ways; 8 x 400 Gb/s
    Chip(
        *("H100", 989.4e12, 80e9, 3.35e12, 450e9, 1, 3200 * _GBIT, 8, 8),
        ("NVIDIA H100 80GB HBM3",),
    ),
    Chip(
        *("H200", 989.4e12, 141e9, 4.8e12, 450e9, 1, 3200 * _GBIT, 8, 8),
        ("NVIDIA H200",),
    ),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}
_OTHER_NAMES = {"a100": "A100-80"}  # what is rented most under the short name


def chip_named(name: str) -> Chip:
    """The chip of a name, in either case; "A100" is the one with 80 GB.

    Raises:
      UserError: there is no such chip in the table.
    """
    known = {key.lower(): key for key in CHIPS} | _OTHER_NAMES
    if name.lower() in known:
        return CHIPS[known[name.lower()]]
    matches = difflib.get_close_matches(name.lower(), list(known), 1, 0.4)
    hint = f'did you mean "{known[matches[0]]}"? ' if matches else ""
    raise UserError(
        "there is no such chip in the table",
        got=repr(name),
        wanted="one of " + ", ".join(CHIPS),
        way_out=hint + "a new one is a row of ddrl_jax/chips.py",
    )


def detect() -> Chip | None:
    """The chip of this process, or None on a CPU and on chips the table lacks."""
    kind = jax.devices()[0].device_kind
    return next((chip for chip in _TABLE if kind in chip.kinds), None)
