"""What a start ran on: date, command, machine and versions, one JSON line."""

import importlib.metadata as metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from ddrl_jax import __version__


def note_start(starts: Path, mode: str) -> None:
    """Appends a line on this start to the file of all starts in a workdir."""
    packages = (
        "ddrl_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
    )
    versions = {"ddrl_jax": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    start = {
        "mode": mode,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join(["python -m ddrl_jax.main", *sys.argv[1:]]),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "versions": versions,
    }
    with starts.open("a") as file:
        file.write(json.dumps(start) + "\n")


def of_the_run(starts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The starts that trained: what another mode ran on is not what the run ran on."""
    return [dict(start) for start in starts if start.get("mode", "train") == "train"]


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [
        line.split(":", 1)[1] for line in text.splitlines() if "model name" in line
    ]
    return names[0].strip() if names else platform.machine()
