"""Bytes in the compiled HLO of an update against the formula, on each mesh axis."""

import pytest

from benchmarks.collectives import measure


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
def test_the_formula_describes_the_compiled_program(axis):
    total, formula, items, kinds = measure(axis)
    assert total == pytest.approx(formula.compiled, rel=0.1)
    assert formula.ideal < formula.compiled
    assert items == {"data": 4, "fsdp": 4, "tensor": 32, "context": 32}[axis]
    assert ("all-to-all" in kinds) == (axis in ("fsdp", "context"))
