"""A run of the video network whose tokens lie on two devices: the ring of keys."""

import json

import numpy as np
import pytest
from tiny_runs import perturbed_state

from configs import video_14b
from ddrl_jax.check_config import check_config
from ddrl_jax.program import build
from ddrl_jax.self_test import ratio_deviations
from ddrl_jax.train import train


def settings(epochs: int = 1):
    """The smoke configuration with every video over two devices."""
    c = video_14b.get_config("smoke")
    c.mesh.update(data=1, context=2)
    c.model.attention = "ring"
    c.train.epochs = epochs
    c.log.update(tensorboard=False, progress=False)
    check_config(c, 2)
    return c


@pytest.mark.slow
@pytest.mark.optimised
def test_on_policy_the_ratio_is_1():
    program = build(settings())
    for name, found in ratio_deviations(program, perturbed_state(program, 0.2)).items():
        assert found.shape == (program.kernel.stochastic.sum(),)
        np.testing.assert_array_equal(found, 0.0, err_msg=name)


@pytest.mark.slow
def test_it_trains_an_epoch(tmp_path, capsys):
    train(settings(), str(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert "attention: ring, xla (cpu, float32)" in said  # xla is the prompt's
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["step"] == 1 and last["reward/valid"] == 1.0
    assert last["policy/ratio_max_deviation"] == 0.0
    assert last["grad_norm"] > 0
