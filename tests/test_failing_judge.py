"""An epoch whose judge fails in every way: each is counted, and none has a score."""

import time

import numpy as np
import pytest
from tiny_runs import perturbed_state, tiny_program
from vlm_server import said, serving

from ddrl_jax.collect import collect
from ddrl_jax.errors import UserError
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.alignment import vlm_alignment
from ddrl_jax.rewards.pool import RewardPool

PATIENCE = 0.5  # seconds
REPLIES = (
    said("a cat and a dog, a red apple, shaved ice"),
    (500, "out of memory"),
    (200, "<html>welcome</html>"),
    (200, {"choices": []}),
    said("  "),
    "late",
    (200, {"error": "try again"}),
    said("a cat"),
)
COUNTED = {
    "failures/status_500": 1,
    "failures/not_json": 1,
    "failures/no_choices": 2,
    "failures/empty": 1,
    "failures/timeout": 1,
    "failures": 6,
    "requests": 8,
    "retries": 0,
    "missing": 6,
}


def reply(body, nth):
    if REPLIES[nth] == "late":
        time.sleep(4 * PATIENCE)
        return said("a cat")
    return REPLIES[nth]


@pytest.fixture(scope="module")
def run():
    program = tiny_program({"rewards.weights": {"vlm_alignment": 1.0}})
    return program, perturbed_state(program)


def epoch(run, url, on_failure):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.rewards.on_failure = on_failure
    settings = {"base_url": url, "model": "judge", "scorer": "words", "retries": 0}
    config.rewards.vlm.update(settings | {"timeout": PATIENCE, "threads": 1})
    judge = {"vlm_alignment": vlm_alignment(config.rewards)}
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    with RewardPool(judge, 2, 60.0, on_failure) as pool:
        program = program._replace(config=config)
        return collect(program, state, 0, pool, tracker, Timer(), Preemption())


def test_every_failure_is_counted_by_its_kind(run, monkeypatch, caplog):
    monkeypatch.setenv("no_proxy", "*")
    with serving(reply) as (url, _):
        found = epoch(run, url, "mask")
    assert found is not None
    name, metrics = "reward/vlm_alignment/", found.metrics
    assert {k: metrics[name + k] for k in COUNTED} == COUNTED
    assert metrics["reward/valid"] == 0.25
    advantages = np.concatenate([c.advantages for c in found.chunks])
    assert np.count_nonzero(advantages) <= 2 and np.isfinite(advantages).all()
    # The reason is told, not only the number.
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "no score" in told and "vlm_alignment" in told


def test_or_the_run_stops(run, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(reply) as (url, _), pytest.raises(UserError) as error:
        epoch(run, url, "error")
    assert "vlm_alignment" in str(error.value)
