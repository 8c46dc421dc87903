"""The notebooks run from their first cell to the last, at the size of a smoke test."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ddrl_jax.rewards.registry import REWARDS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.fixture
def rewards():
    """The table of rewards, without what is added to it here."""
    kept = dict(REWARDS)
    yield
    REWARDS.clear()
    REWARDS.update(kept)


@pytest.mark.slow
@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {}
    for number, cell in enumerate(cells(path, "code")):
        code = cell.replace('f"runs/notebook_', f'f"{tmp_path}/run_')
        exec(compile(code, f"{path.name}[{number}]", "exec"), names)  # noqa: S102
    assert names["VARIANT"] == "smoke"  # as it is shipped
    assert names["WORKDIR"] == f"{tmp_path}/run_smoke"  # each variant has its own
    assert "heldout/retrieval/mean" in names["values"]
    pixels = np.asarray(names["both"])  # before above after
    assert pixels.shape[0] == 2 * names["first"].height and pixels.std() > 0
    line = json.loads(names["last"])
    assert np.isfinite(line["evaluation/redness/mean"])
    assert "heldout/compressibility/mean" in line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shipped_without_results(path):
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_there_is_one():
    assert NOTEBOOKS
