"""How exactly an accelerator multiplies, in each mode, by command line and from Python.

Read from what is lowered: on a CPU the products are the same.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ddrl_jax import evaluate, export, sample, train, workdir
from ddrl_jax.config_file import load_config
from ddrl_jax.errors import UserError
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


@pytest.fixture
def traced(monkeypatch):
    """The precisions in which a mode begins its work, which then ends."""
    found = []

    def begin(*arguments, **named):
        found.append(precisions())
        raise UserError("enough", got="", wanted="", way_out="")

    for module in (workdir, train, sample, export):
        monkeypatch.setattr(module, "open_workdir", begin)
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore
    yield found
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ([], "HIGHEST, HIGHEST"),
        (["--config.model.matmul_precision=high"], "HIGH, HIGH"),
        (["--config.model.matmul_precision=default"], "DEFAULT, DEFAULT"),
        (["--config.model.dtype=bfloat16"], "DEFAULT, DEFAULT"),
    ],
)
def test_float32_networks_multiply_in_float32_unless_told(keys, wanted, traced):
    assert run(["main", SMOKE, "--workdir=w", *keys]) == 2
    assert traced == [{wanted}]
    assert precisions() == {"DEFAULT, DEFAULT"}  # of one command only


@pytest.mark.parametrize(
    "mode",
    [train.train, evaluate.evaluate_mode, sample.sample_mode, export.export_mode],
)
def test_so_they_do_in_every_mode_called_from_python(mode, traced):
    with pytest.raises(UserError, match="enough"):
        mode(load_config(SMOKE.removeprefix("--config=")), "w")
    assert traced == [{"HIGHEST, HIGHEST"}]
    assert precisions() == {"DEFAULT, DEFAULT"}
