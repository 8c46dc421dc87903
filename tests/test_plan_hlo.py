"""Collectives read from HLO, by hand: bytes, loops, and the axes of their groups."""

import pytest

from ddrl_jax.plan.hlo import collectives

MESH = {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
PROGRAM = """HloModule jit_update
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%inner (p: f32[8]) -> f32[8] {
  %g = bf16[16,4]{1,0} all-gather(%x), GROUPS, dimensions={0}
  %r = f32[2]{0} reduce-scatter(%y), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
to_apply=%add
}
%outer (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%c, body=%inner, backend_config={\
"known_trip_count":{"n":"5"}}
  %t = (f32[3]{0}, f32[3]{0}) all-to-all(%a, %b), replica_groups=[4,2]<=[2,4]T(1,0)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %v = f32[8] while(%p), condition=%c, body=%outer, backend_config={\
"known_trip_count":{"n":"3"}}
  %s = f32[10]{0} all-reduce(%q), replica_groups={}, to_apply=%add, \
metadata={op_name="jit(update)/sum"}
  %c = f32[7]{0} collective-permute(%z), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""
FSDP = (
    "replica_groups={{0,1,2,3},{4,5,6,7}}",
    "replica_groups=[2,4]<=[8]",
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
    "replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}",
)


@pytest.mark.parametrize("groups", FSDP)
def test_bytes_counts_and_axes_by_hand(groups):
    found = {c.kind: c for c in collectives(PROGRAM.replace("GROUPS", groups), MESH)}
    gather = found["all-gather"]
    assert gather.axes == ("fsdp",) and gather.count == 15 and not gather.wide
    assert gather.bytes == 15 * 3 / 4 * 16 * 4 * 2
    scatter = found["reduce-scatter"]
    assert scatter.axes == ("data",) and scatter.bytes == 15 * 1 * 2 * 4
    exchange = found["all-to-all"]
    assert exchange.axes == ("data",) and exchange.bytes == 3 / 2 * 2 * 3 * 4
    total = found["all-reduce"]
    assert total.axes == ("data", "fsdp") and total.count == 1 and total.wide
    assert total.bytes == 2 * 7 / 8 * 10 * 4 and total.source == "jit(update)/sum"
    permute = found["collective-permute"]
    assert permute.axes == ("fsdp",) and permute.bytes == 7 * 4


@pytest.mark.parametrize("handles", ["", ", u32[]{:S(2)}, u32[]{:S(2)}"])
def test_an_async_permute_sends_its_result_and_no_handle(handles):
    shape = "f32[1,32,256]{2,1,0}"
    line = (
        f"%a = ({shape}, {shape}{handles}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    )
    (found,) = collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}", MESH)
    assert found.axes == ("fsdp",) and found.bytes == 32 * 256 * 4


def test_a_loop_of_unknown_length_is_an_error():
    text = PROGRAM.replace("GROUPS", FSDP[0]).replace('"known_trip_count"', '"other"')
    with pytest.raises(ValueError, match="unknown length"):
        collectives(text, MESH)


def test_groups_across_two_axes():
    line = "%a = f32[4]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%f"
    (found,) = collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}", MESH)
    assert found.axes == ("data", "fsdp")


# What libtpu writes: the end of a loop stands in its condition, and an all-reduce whose
# result is cut at once is a computation of that name.
OF_A_TPU = """HloModule jit_update
%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %r = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[2,4]<=[8], \
to_apply=%add
  ROOT %cut = bf16[16,8]{1,0:T(8,128)(2,1)} dynamic-slice(%r, %i, %zero)
}
%region_2.cond (wide.p: (s32[], bf16[64,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(40)
  %i = s32[]{:T(128)} get-tuple-element(%wide.p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}
%region_1.body (wide.p: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %f = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.1
}
ENTRY %main (p: bf16[64,8]) -> bf16[64,8] {
  %w = (s32[]{:T(128)}, bf16[64,8]{1,0:T(8,128)(2,1)}) while(%t), \
condition=%region_2.cond, body=%region_1.body, metadata={op_name="jit(update)/while"}
}
"""


def test_a_loop_and_a_reduce_scatter_as_a_tpu_has_them():
    (found,) = collectives(OF_A_TPU, MESH)
    assert (found.kind, found.axes, found.count) == ("reduce-scatter", ("fsdp",), 40)
    assert found.bytes == 40 * 3 / 4 * 64 * 8 * 2


def test_a_condition_that_is_no_count_is_an_error():
    with pytest.raises(ValueError, match="unknown length"):
        collectives(OF_A_TPU.replace("direction=LT", "direction=NE"), MESH)


# What `lax.cond(good, apply, skip)` becomes, by a number and, as of old, by a truth.
BRANCHES = """HloModule jit_update
%skip (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8] parameter(0)
}
%apply (p: f32[8]) -> f32[8] {
  %s = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[8] conditional(%i, %p, %p), CALLS
}
"""


@pytest.mark.parametrize(
    "calls",
    [
        "branch_computations={%skip, %apply}",
        "true_computation=%apply, false_computation=%skip",
    ],
)
def test_every_branch_is_read(calls):
    (found,) = collectives(BRANCHES.replace("CALLS", calls), MESH)
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("fsdp",), 1)
    assert found.bytes == 2 * 3 / 4 * 8 * 4


# One all-gather beside two products in a loop, and two exchanges of `shard_map`, which
# are all on channel 1.
BESIDE = """HloModule jit_update
%fused_computation.1 (p.0: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %all-gather.1 = GATHER
  ROOT %s = (f32[2,8], f32[8,8], u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.2 (p.0: f32[2,8], p.1: f32[8,8]) -> (f32[4], f32[8,8]) {
  %convolution.1 = f32[4]{0} convolution(%a, %b), dim_labels=bf_io->bf
  %all-gather.2 = GATHER
  ROOT %t = (f32[4], f32[8,8]) tuple(%convolution.1, %all-gather.2)
}
%async_collective_fusion.3 (p.0: f32[2,8], p.1: f32[8,8]) -> (f32[4], f32[8,8]) {
  %all-gather.3 = GATHER
  ROOT %t = (f32[4], f32[8,8]) tuple(%p.0, %all-gather.3)
}
%fused_computation.4 (p.0: f32[2,8], p.1: f32[8,8]) -> f32[8,8] {
  %all-gather.4 = GATHER
  ROOT %d = f32[8,8] custom-call(%p.0, %p.1, %all-gather.4), \
custom_call_target="AsyncCollectiveDone"
}
%body (p: f32[2,8]) -> f32[2,8] {
  %start = (f32[2,8], f32[8,8], u32[]) fusion(%p), calls=%fused_computation.1
  %f = (f32[4], f32[8,8]) fusion(%x, %y), calls=%async_collective_fusion.2
  %g = (f32[4], f32[8,8]) fusion(%x, %y), calls=%async_collective_fusion.3
  %done = f32[8,8] fusion(%x, %y), calls=%fused_computation.4
  %q = f32[8,2]{1,0} all-to-all(%k), channel_id=1, replica_groups=[2,4]<=[8]
  %r = f32[8,2]{1,0} all-to-all(%q), channel_id=1, replica_groups=[2,4]<=[8]
}
ENTRY %main (p: f32[2,8]) -> f32[2,8] {
  %w = f32[2,8] while(%p), condition=%c, body=%body, backend_config={\
"known_trip_count":{"n":"5"}}
}
""".replace(
    "GATHER",
    "f32[8,8]{1,0} all-gather(%p.0), channel_id=7, replica_groups=[2,4]<=[8], "
    'frontend_attributes={chain_id="1"}, backend_config={"async_collective_fusion_'
    'config":{"flag_start":"2","flag_end":"8"}}',
)


def test_a_collective_beside_products_is_one_though_a_tpu_writes_it_often():
    gather, *exchanges = collectives(BESIDE, MESH)
    assert (gather.kind, gather.axes, gather.count) == ("all-gather", ("fsdp",), 5)
    assert gather.bytes == 5 * 3 / 4 * 8 * 8 * 4
    assert [(c.kind, c.bytes) for c in exchanges] == [
        ("all-to-all", 5 * 3 / 4 * 8 * 2 * 4)
    ] * 2
