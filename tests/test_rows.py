"""Every row of the table of algorithms runs the whole loop, as a user would run it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import perturbed

from ddrl_jax.check_config import check_config
from ddrl_jax.command_line import load_config, override
from ddrl_jax.models.emoji import emoji_pipeline, write_params
from ddrl_jax.sample import sample_mode
from ddrl_jax.train import train

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("evaluate.every=0", "mesh.data=1", "log.progress=False", "log.tensorboard=0")
CLOCKS = ("time/", "perf/", "samples_per_second")
ROWS = {
    "ddpo_sf.py:smoke": (),
    "ddpo_is.py:smoke": (),
    "flow_grpo.py:smoke": (),
    "ddrl_paper.py:smoke": ("policy.transform=linear",),
    "ddrl_paper.py:smoke again": ("policy.transform=neg_exp",),
    "ddrl_cosmos.py:smoke": (),
    "emoji_pretrain.py:smoke": (),
    "quickstart.py:smoke": (),
    "hacking.py:control-smoke": (),
}

pytestmark = pytest.mark.slow


def read(spec: str, *keys: str, devices: int = 1):
    config = load_config(str(ROOT / "configs" / spec.split()[0]))
    override(config, ["", *(f"--config.{key}" for key in (*SHORT, *keys))])
    check_config(config, devices)
    return config


def trained(config, workdir: Path) -> list[dict]:
    train(config, str(workdir))
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()][1:]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains_to_its_report(row, tmp_path):
    config = read(row, *ROWS[row])
    epochs = trained(config, tmp_path / "run")
    assert [line["step"] for line in epochs] == [1, 2]
    terms = {"policy": config.policy.weight, "data": config.data_term.weight}
    for line in epochs:
        assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
        assert line["bad_updates"] == 0
        for term, weight in terms.items():
            assert (f"{term}/loss" in line) == bool(weight)
            assert not weight or np.isfinite(line[f"{term}/loss"])
        if config.policy.weight:
            assert line["policy/ratio_max_deviation"] == 0.0
    assert "data:image/png" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.optimised
def test_a_run_on_eight_devices_is_that_of_one(tmp_path):
    """The whole loop: what it draws and judges first to the bit, all else nearly."""
    spec, init = "ddrl_paper.py:smoke", tmp_path / "spoken.npz"
    params = jax.jit(emoji_pipeline(read(spec)).init)(jax.random.key(0))["params"]
    write_params(init, perturbed(params))
    keys = [f"model.init={init}", "train.microbatch=1", "evaluate.every=1"]
    keys += ["advantages.kind=tracker", "advantages.tracker_min=4"]
    keys += ["policy.transform=linear", "rewards.heldout=()"]
    one, eight = (
        trained(read(spec, *keys, f"mesh.data={n}", devices=n), tmp_path / str(n))
        for n in (1, 8)
    )
    rewards = [key for key in one[0] if key.startswith("reward/")]
    assert rewards and all(one[0][key] == eight[0][key] for key in rewards)
    for line, other in zip(one, eight, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if isinstance(value, float) and not key.startswith(CLOCKS):
                near = pytest.approx(value, rel=1e-5, abs=1e-6)
                assert other[key] == near, key


def test_samples_of_the_base_policy_anchor_a_run(tmp_path):
    spec = "ddrl_paper.py:smoke"
    sample_mode(read(spec), str(tmp_path / "base"))
    data = ("data.source=samples", f"data.path={tmp_path / 'base' / 'dataset'}")
    config = read(spec, *data, "evaluate.data_samples=0", "train.epochs=1")
    (line,) = trained(config, tmp_path / "run")
    assert np.isfinite(line["data/loss"]) and line["data/loss"] > 0
    assert line["policy/ratio_max_deviation"] == 0.0
