"""How exactly an accelerator multiplies, which the command line decides for all modes.

Read from what is lowered: on a CPU the products are the same.
"""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ddrl_jax.main import run
from ddrl_jax.models.convolution import convolve

ROOT = Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"


def precisions() -> set[str]:
    """Of every product of a layer, a convolution and their gradients, as lowered."""

    def loss(kernel, x):
        y = convolve(x, kernel)
        return jnp.sum(y @ jnp.swapaxes(y, -1, -2))

    shapes = jnp.ones((3, 3, 4, 4)), jnp.ones((2, 8, 8, 4))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).as_text()
    found = re.findall(r"precision(?:_config)? = \[(.*?)\]", lowered)
    assert len(found) >= 5  # two forward, and those of the gradients
    return {re.sub("#stablehlo<precision |>", "", pair) for pair in found}


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ([], "HIGHEST, HIGHEST"),
        (["--config.model.matmul_precision=high"], "HIGH, HIGH"),
        (["--config.model.matmul_precision=default"], "DEFAULT, DEFAULT"),
        (["--config.model.dtype=bfloat16"], "DEFAULT, DEFAULT"),
    ],
)
def test_float32_networks_multiply_in_float32_unless_told(keys, wanted, monkeypatch):
    found = []
    fake = types.SimpleNamespace(train=lambda *_: found.append(precisions()))
    monkeypatch.setitem(sys.modules, "ddrl_jax.train", fake)
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore
    try:
        assert run(["main", SMOKE, "--workdir=w", *keys]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert found == [{wanted}]
    assert precisions() == {"DEFAULT, DEFAULT"}  # of one command only
