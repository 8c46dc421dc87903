"""What is said of a configuration that is allowed and may not be what was meant."""

import pytest
from edited_config import configured
from test_check_config import CONFIGS, EXPERIMENTS

from ddrl_jax.config_file import load_config
from ddrl_jax.config_notes import notes


def test_what_may_not_be_meant_is_noted():
    def told(**edits):
        return notes(configured({k.replace("__", "."): v for k, v in edits.items()}))

    assert told(optimizer__warmup=59) == []  # 30 epochs of 2 updates
    (warmup,) = told(optimizer__warmup=60)
    assert "optimizer.warmup 60" in warmup and "60 updates" in warmup
    (each,) = told(optimizer__warmup=2, optimizer__fresh=True)
    assert "2 updates" in each
    samples = {"data.source": "samples", "data_term.weight": 0.1}
    (loss,) = notes(configured(samples))
    assert "data/heldout_loss" in loss
    assert notes(configured(samples | {"data.heldout": 2})) == []
    assert notes(configured({"data_term.weight": 0.1})) == []  # emoji are drawn anew
    (large,) = told(model__image_size=64)
    assert "diversity" in large and "32" in large and "64" in large


def test_keys_that_nothing_reads_are_noted():
    def told(edits):
        return notes(configured({"advantages.kind": "batch"} | edits))

    rwr, clip = {"policy.term": "rwr"}, {"policy.clip_range": 1e-3}
    assert told({}) == told(rwr) == told(clip) == []
    (line,) = told(rwr | clip)
    assert "policy.clip_range 0.001" in line
    (line,) = told({"advantages.std": "none"})
    assert 'advantages.std "none"' in line and '"batch"' in line
    (line,) = told(rwr | {"advantages.std": "global", "advantages.kind": "group"})
    assert 'advantages.std "global"' in line and '"rwr"' in line
    assert told({"advantages.std": "none", "advantages.kind": "group"}) == []


def test_an_evaluation_by_the_sampler_has_the_samplers_steps_and_guidance():
    def told(edits):
        return notes(configured(edits))

    rollout, other = {"evaluate.solver": "rollout"}, {"evaluate.steps": 77}
    assert told(rollout) == told(other) == []
    (line,) = told(rollout | other)
    assert "evaluate.steps 77 has no effect" in line and "sampler.steps 10" in line
    (line,) = told(rollout | {"evaluate.guidance_scale": 3.0})
    assert "evaluate.guidance_scale 3.0" in line
    assert told(rollout | other | {"sampler.steps": 77}) == []
    unset = {"sampler.steps": 20, "sampler.guidance_scale": 5.0}
    assert told(rollout | unset) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_an_experiment_means_the_evaluation_that_it_asks_for(name, variant):
    found = notes(load_config(f"{CONFIGS / name}.py:{variant}"))
    assert not [note for note in found if "evaluate." in note]
