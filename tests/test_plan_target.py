"""Whose compiler a plan asks; with libtpu installed, what the one of TPUs answers."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import video_14b
from ddrl_jax.chips import CHIPS
from ddrl_jax.errors import UserError
from ddrl_jax.models.attention import attention, implementations
from ddrl_jax.plan.lowered import Phase, compile_phase, describe
from ddrl_jax.plan.memory import peak
from ddrl_jax.plan.sizes import bytes_per_device
from ddrl_jax.plan.target import HERE, Target, choose
from ddrl_jax.sharding import make_mesh

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
INSTALLED = importlib.util.find_spec("libtpu") is not None
tpu = pytest.mark.skipif(not INSTALLED, reason="needs libtpu: pip install jax[tpu]")


def found(monkeypatch, installed: bool) -> None:
    spec = lambda name: object() if installed else None  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", spec)


def test_unset_it_is_the_chips_own_where_that_is_installed(monkeypatch):
    found(monkeypatch, True)
    assert choose(None, CHIPS["v5e"], 2) == Target("tpu", CHIPS["v5e"], 2)
    assert choose(None, CHIPS["H100"], 0) == HERE
    assert choose("cpu", CHIPS["v5e"], 0) == HERE
    found(monkeypatch, False)
    assert choose(None, CHIPS["v5e"], 0) == HERE


@pytest.mark.parametrize(
    ("wanted", "chip", "installed", "word"),
    [
        ("gpu", "v5e", True, "tpu or cpu"),
        ("tpu", "H100", True, "cpu for this chip"),
        ("tpu", "v5e", False, "pip install"),
    ],
)
def test_what_can_not_be_asked(monkeypatch, wanted, chip, installed, word):
    found(monkeypatch, installed)
    with pytest.raises(UserError, match=word):
        choose(wanted, CHIPS[chip], 0)


def test_only_slices_of_a_power_of_two():
    with pytest.raises(UserError, match="power of 2"):
        Target("tpu", CHIPS["v5p"]).devices(ONE | {"data": 96})


@tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 256])
def test_devices_of_a_slice_that_is_not_here(chip, count):
    devices = Target("tpu", CHIPS[chip]).devices(ONE | {"data": count})
    assert len(devices) == count and devices[0].device_kind in CHIPS[chip].kinds


@tpu
def test_slices_are_joined_along_the_data_axis():
    sizes = ONE | {"data": 2, "fsdp": 4}
    mesh = make_mesh(sizes, Target("tpu", CHIPS["v5e"], 2).devices(sizes))
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]


def tiny(**mesh):
    c: Any = video_14b.get_config("smoke")
    c.mesh.update(ONE | mesh)
    c.prompts.update(per_epoch=4, group_size=4)
    c.train.microbatch = 1
    return c


@tpu
@pytest.mark.slow
def test_a_run_compiles_for_tpus_and_for_the_cpu_alike():
    """The same work, sent along the same axes; arguments are those of the shapes in the
    tiles of 8 x 128 that they lie in."""
    plans = [describe(tiny(fsdp=4), t) for t in (Target("tpu", CHIPS["v5e"]), HERE)]
    seen = [compile_phase(p.phases[-1], p.mesh) for p in plans]
    axes = [{c.axes for c in found.collectives} for found in seen]
    assert axes[0] == axes[1] == {("fsdp",)}
    assert seen[0].count.flops == seen[1].count.flops
    shapes = bytes_per_device(seen[0].phase.arguments)
    planned = seen[0].phase.bytes
    # The compiler drops what the update does not read.
    assert planned - 2**14 <= seen[0].arguments <= planned and planned > 2 * shapes
    assert peak(plans[0], seen[0]) > planned


@tpu
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["named", "offload"])
def test_what_a_policy_keeps_in_the_host_is_told_by_the_compiler(remat):
    """Both keep the same of each block; one of them keeps it outside the device."""
    config = tiny()
    config.model.remat = remat
    plan = describe(config, Target("tpu", CHIPS["v5e"]))
    found = compile_phase(plan.phases[-1], plan.mesh)
    assert (found.host > 0) == (remat == "offload")


@tpu
def test_what_does_not_fit_is_said_with_its_size():
    mesh = make_mesh(ONE, Target("tpu", CHIPS["v5e"]).devices(ONE))
    large = jax.ShapeDtypeStruct((2**16, 2**16), "float32", sharding=on(mesh))
    phase = Phase("update", jax.jit(lambda x: (x + 1, x * 2)), (large,), 1, 2**34)
    refused = compile_phase(phase, mesh)
    assert "RESOURCE_EXHAUSTED" in refused.refusal
    assert refused.arguments == 2**34
    assert refused.arguments + refused.temporaries >= 3 * 2**34


def on(mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


@tpu
@pytest.mark.slow
def test_splash_attention_compiles_for_a_tpu_with_its_gradients():
    """The kernel itself, by the compiler of the chip, and not only its lowering."""
    mesh = make_mesh(ONE, Target("tpu", CHIPS["v5e"]).devices(ONE))
    q = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16, sharding=on(mesh))

    def loss(q, k, v):
        return attention(q, k, v, impl="auto", mesh=mesh).astype(jnp.float32).sum()

    assert implementations(loss, q, q, q) == ("splash",)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().as_text()
    assert text is not None and text.count('custom_call_target="tpu_custom_call"') >= 2
