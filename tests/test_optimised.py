"""What the tests are compiled with, and what that leaves as it is."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

OPTION = "jax_disable_most_optimizations"


def least() -> tuple[bool, str]:
    """In this process, and in the programs it starts."""
    return jax.config.read(OPTION), os.environ[OPTION.upper()]


def test_least_where_nothing_is_said():
    assert least() == (True, "1")


@pytest.mark.optimised
def test_as_shipped_where_it_is_marked():
    assert least() == (False, "0")


@pytest.mark.optimised
def test_hlo_memory_and_flops_are_those_of_the_program_as_shipped():
    """So that tests of them need no mark: the option concerns LLVM alone."""

    def loss(w, x):
        body = lambda h, _: (jnp.tanh(h @ w), jnp.sum(h))  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, length=3)[1])

    found = []
    for option in (False, True):
        jax.config.update(OPTION, option)
        jax.clear_caches()
        lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 8)), jnp.ones((4, 8)))
        program = lowered.compile()
        text = re.sub(r"metadata=\{[^}]*\}", "", program.as_text())
        found.append((text, str(program.memory_analysis()), program.cost_analysis()))
    assert "while" in found[0][0] and found[0] == found[1]
