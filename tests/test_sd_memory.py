"""What the memory benchmark counts as a float32 copy of a weight, and where it goes."""

from benchmarks.sd_memory import named, widened

PROGRAM = """HloModule jit_update, is_scheduled=true

%body (p.0: bf16[8]) -> f32[8] {
  %p.0 = bf16[8]{0} parameter(0)
  ROOT %convert.9 = f32[8]{0} convert(%p.0)
}

ENTRY %main.1 (w.1: bf16[64], x.1: f32[8]) -> f32[8] {
  %w.1 = bf16[64]{0} parameter(0), metadata={op_name="frozen"}
  %x.1 = f32[8]{0} parameter(1)
  %convert_fusion.1 = f32[64]{0} fusion(%w.1), kind=kLoop, calls=%body
  %convert.2 = f32[64]{0} convert(%w.1)
  %transpose_fusion.3 = f32[64]{0} fusion(%w.1), kind=kLoop, calls=%body
  %convert_fusion.4 = f32[8]{0} fusion(%transpose_fusion.3), kind=kLoop, calls=%body
  ROOT %add.5 = f32[8]{0} add(%convert_fusion.4, %x.1)
}
"""
PLAN = """HloLiveRange (max 9):
  BufferLiveRange:
    convert.2{}:1-3
  Live ranges at 4 (peak):
    convert_fusion.1{}: 256 bytes (cumulative: 256 bytes)
    transpose_fusion.3{}: 256 bytes (cumulative: 512 bytes)
    convert_fusion.4{}: 32 bytes (cumulative: 544 bytes)
  Stack trace breakdown for peak usage: 544 bytes
    convert.2{}: 999 bytes (cumulative: 999 bytes)
"""


def test_only_copies_of_arguments_that_are_alive_at_the_peak_count():
    assert widened(PROGRAM, PLAN) == 256
    both = PLAN.replace("    convert_fusion.4{}: 32", "    convert.2{}: 128")
    assert widened(PROGRAM, both) == 256 + 128
    assert widened(PROGRAM, "") == 0


def test_the_table_of_a_chip_has_a_file_of_its_own():
    assert named(None).name == "sd_memory.md"
    assert named("v6e").name == "sd_memory_v6e.md"
