"""The set-up of `make`: what is installed is not installed again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def planned(folder: Path, *arguments: str) -> str:
    """What `make demo` would run in a folder with this Makefile."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "-n", *arguments, "demo"]
    return subprocess.run(
        command, cwd=folder, env=clean, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("stamp", "extras", "installs"),
    [
        (None, "test", "test"),
        (None, "test,gpu", "test,gpu"),
        ("test", "test", None),
        ("test+parity", "test", None),
        ("test+parity", "parity,test", None),
        ("test", "test,gpu", "test,gpu"),
        ("test+gpu-cuda12", "test,gpu", "test,gpu"),  # another extra
        ("test+gpu-cuda12", "gpu-cuda12", None),
    ],
)
def test_what_is_there_is_not_installed_again(clone, stamp, extras, installs):
    if stamp:
        (clone / ".venv" / f".installed-{stamp}").touch()
    found = planned(clone, f"EXTRAS={extras}")
    assert "quickstart.py" in found
    assert ("pip install" in found) == (installs is not None)
    assert installs is None or f'-e ".[{installs}]"' in found


def test_a_newer_setup_installs_all_that_there_was(clone):
    stamp = clone / ".venv" / ".installed-test+parity"
    stamp.touch()
    os.utime(stamp, (0, 0))
    assert '-e ".[test,parity]"' in planned(clone)
