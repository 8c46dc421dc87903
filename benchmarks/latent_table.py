"""The table and the curves of benchmarks/latent_emoji.py, read from its runs."""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from configs.latent_emoji import REWARDS  # noqa: E402

NAMES = {"is": "DDPO-IS", "sf": "DDPO-SF", "rwr": "RWR", "sparse_rwr": "sparse RWR"}


class Row(NamedTuple):
    """One run: its reward calls, its reward and the held-out retrieval at each."""

    calls: list[int]
    reward: list[float]
    retrieval: list[float]
    seconds: float


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_run(workdir: Path, reward: str) -> Row:
    """The evaluations of a run over its reward calls."""
    lines = read_rows(workdir)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    each = config["prompts"]["per_epoch"] * config["prompts"]["group_size"]
    if lines[-1]["step"] != config["train"]["epochs"]:
        raise SystemExit(f"{workdir} is not finished: start the same command again")
    key = f"evaluation/{reward}/mean"
    found = [line for line in lines if key in line]
    return Row(
        [line["step"] * each for line in found],
        [line[key] for line in found],
        [line["heldout/retrieval/mean"] for line in found],
        sum(line.get("time/epoch", 0.0) for line in lines),
    )


def write_results(
    home: Path, out: Path, command: Sequence[str], algorithms: Sequence[str]
) -> Path:
    """Writes latent_emoji.md and its figure; returns the path of the table."""
    runs = {
        (algorithm, reward): read_run(home / f"{algorithm}-{reward}", reward)
        for reward in REWARDS
        for algorithm in algorithms
    }
    out.mkdir(parents=True, exist_ok=True)
    figure = draw(runs, out / "latent_emoji.png")
    path = out / "latent_emoji.md"
    lines = [*head(home, command), f"![curves]({figure.name})", "", *table(runs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def head(home: Path, command: Sequence[str]) -> list[str]:
    """What was run, on what, and how good the base is."""
    built = json.loads((home / "autoencoder.json").read_text(encoding="utf-8"))
    last = read_rows(home / "pretrain")[-1]
    seconds = sum(r.get("time/epoch", 0.0) for r in read_rows(home / "pretrain"))
    return [
        "# DDPO and RWR on a small latent diffusion model",
        "",
        f"- command: `python -m {' '.join(command)}`",
        f"- date {time.strftime('%Y-%m-%d')}, {jax.default_backend()} "
        f"({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}",
        f"- autoencoder: mean squared error {built['error']:.4f} in [-1, 1], "
        f"scaling factor {built['scaling_factor']:.3f}",
        f"- UNet: {last['step'] * 100} updates of 32 in {seconds / 60:.0f} minutes, "
        f"data loss on the same pictures with other noise "
        f"{last['data/heldout_loss']:.4f}, held-out retrieval "
        f"{last['heldout/retrieval/mean']:.1%} among 256 captions",
        "- rows: equal prompts, sampler (10 DDIM steps, eta 1) and reward calls, one "
        "seed; evaluation on 128 samples of fixed prompts and noise",
        "",
    ]


def table(runs: dict[tuple[str, str], Row]) -> list[str]:
    """Before and after, for each row."""
    lines = [
        "| reward | row | reward calls | kB before | kB after | change | "
        "retrieval before | after | seconds, compiling included |",
        "|---" * 9 + "|",
    ]
    for (algorithm, reward), run in runs.items():
        first, last = (abs(run.reward[i]) for i in (0, -1))
        lines.append(
            f"| {reward} | {NAMES[algorithm]} | {run.calls[-1]:,} | {first:.2f} | "
            f"{last:.2f} | {last / first - 1:+.1%} | {run.retrieval[0]:.1%} | "
            f"{run.retrieval[-1]:.1%} | {run.seconds:.0f} |"
        )
    return lines


def draw(runs: dict[tuple[str, str], Row], path: Path) -> Path:
    """Size over reward calls, a panel for each direction."""
    figure, panels = plt.subplots(1, len(REWARDS), figsize=(9, 3.2))
    for panel, reward in zip(np.atleast_1d(panels), REWARDS, strict=True):
        for (algorithm, other), run in runs.items():
            if other == reward:
                sizes = np.abs(run.reward)
                panel.plot(run.calls, sizes, marker="o", label=NAMES[algorithm])
        panel.set(title=reward, xlabel="reward calls", ylabel="JPEG kB")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
