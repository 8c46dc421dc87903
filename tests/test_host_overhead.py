"""What the benchmark of the program's own time books on what."""

import jax.numpy as jnp
import numpy as np
import pytest

import ddrl_jax.train as loop
from benchmarks.host_overhead import Clock, watched
from ddrl_jax import collect, distributed, preemption


@pytest.fixture
def clock(monkeypatch):
    """Around the run's functions, which are the old ones again after the test."""
    for place, name in (
        (loop, "build"),
        (loop, "collect"),
        (loop.RewardPool, "collect"),
        (distributed, "every"),
        (preemption, "every"),
        (collect, "to_host"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name), raising=False)
    found = Clock()
    watched(found)
    return found


def test_what_processes_tell_each_other_is_no_time_of_their_own(clock):
    """Stop flags, and which samples are finite: the latter as an array of all."""
    calls = (
        lambda: preemption.every(np.zeros(1)),
        lambda: collect.to_host([jnp.ones(4, bool)]),
    )
    for call in calls:
        clock.epoch()
        call()
        clock.epoch()
        assert clock.epochs[-1]["agreement"][0] > 0
