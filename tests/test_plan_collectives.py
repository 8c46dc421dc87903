"""Bytes in the compiled HLO of an update against the formula, on each mesh axis."""

import pytest

from benchmarks.collectives import Measured, measure, row
from ddrl_jax.plan.formula import Traffic


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
def test_the_formula_describes_the_compiled_program(axis):
    found = measure(axis)
    formula = found.formula
    assert found.total == pytest.approx(formula.compiled, rel=0.1)
    assert formula.ideal < formula.compiled and not found.narrow
    assert found.items == {"data": 4, "fsdp": 4, "tensor": 32, "context": 32}[axis]
    assert ("all-to-all" in found.kinds) == (axis == "context")


def test_a_line_says_what_travels_in_less_than_float32():
    kinds = {"reduce-scatter": 2, "all-gather": 3}
    line = row("fsdp", Measured(90e6, 40e6, Traffic(120e6, 100e6), 4, kinds))
    assert line == (
        "| fsdp 8 | 4 | 90.00 | 40.00 | 120.00 | -25.0% | 100.00 | "
        "3 all-gather, 2 reduce-scatter |"
    )
