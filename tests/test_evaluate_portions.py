"""How many pictures of an evaluation a judge is given at once."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from edited_config import configured

from ddrl_jax import evaluate
from ddrl_jax.evaluate import Evaluation


@pytest.mark.parametrize(
    ("processes", "chunk", "sizes"),
    [(1, 8, [8, 8]), (2, 8, [4, 4]), (3, 8, [2, 2, 2]), (16, 8, [1]), (1, 32, [16])],
)
def test_portions_are_those_of_training(processes, chunk, sizes, monkeypatch):
    """Training hands a process's part of a chunk to its judges."""
    given = []

    def judge(images, prompts):
        given.append(len(images))
        return np.zeros(len(images), np.float32)

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(evaluate, "whole_scores", lambda found, rows, total: found)
    monkeypatch.setattr(evaluate, "leave_out", lambda found, *_: found)
    config, count = configured({"rewards.threads": 1}), 16
    program = SimpleNamespace(config=config, chunk=chunk)
    whole = SimpleNamespace(
        program=program,
        count=count,
        text=("a dog",) * count,
        judges={"compressibility": judge},
        features=None,
    )
    values = Evaluation.judged(whole, np.zeros((count, 8, 8, 3), np.uint8))  # type: ignore
    assert given == sizes
    assert values == {"evaluation/compressibility/mean": 0.0}
