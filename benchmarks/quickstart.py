"""The quickstart, as `make demo` runs it: its seconds, its curve and its pictures.

    python -m benchmarks.quickstart

Runs the command in a process of its own, in a new workdir, and writes quickstart.md and
quickstart_before_after.png below --out. Keys go to the run, as in
`--config.train.epochs=20`.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddrl_jax.pictures import save_png

ROOT = Path(__file__).resolve().parents[1]
GAP = 12  # pixels between the pictures before and after
COLUMNS = (
    ("JPEG kB", lambda e: f"{-e['evaluation/compressibility/mean']:.2f}"),
    ("held-out retrieval", lambda e: f"{100 * e['heldout/retrieval/mean']:.1f} %"),
    ("held-out data loss", lambda e: f"{e['data/heldout_loss']:.4f}"),
    ("diversity across prompts", lambda e: f"{e['diversity/across_prompts']:.3f}"),
)


def before_after(first: Path, last: Path) -> np.ndarray:
    """The two grids of a run, the first above the last.

    Args:
      first, last: PNG files of the same size.

    Returns:
      uint8 [h w 3].
    """
    above, below = (np.asarray(Image.open(p).convert("RGB")) for p in (first, last))
    line = np.full((GAP, above.shape[1], 3), 255, np.uint8)
    return np.concatenate([above, line, below])


def page(command: str, seconds: float, rows: list[dict], start: dict[str, Any]) -> str:
    """The whole of quickstart.md.

    Args:
      command: what was run.
      seconds: from its start to its end.
      rows: the lines of metrics.jsonl.
      start: the last line of starts.jsonl.
    """
    epochs = [row for row in rows if "time/epoch" in row]
    judged = [row for row in rows if "data/heldout_loss" in row]
    samples, worst = (
        start["samples"],
        max(row["policy/ratio_max_deviation"] for row in epochs),
    )
    rate = judged[0]["heldout/retrieval/mean"]
    error = 100 * math.sqrt(rate * (1 - rate) / samples)
    stages = ", ".join(
        f"{name} {statistics.median(row[f'time/{name}'] for row in epochs):.3f}"
        for name in ("rollout", "reward", "update", "rest")
    )
    names = [name for name, _ in COLUMNS]
    lines = [
        "# The quickstart, once",
        "",
        f"`python -m benchmarks.quickstart` (`{command}`), {start['date']}; "
        f"{start['cpu']}, {start['cores']} cores, {start['devices']}; jax "
        f"{start['versions']['jax']}: {seconds:.0f} seconds from start to report.",
        "",
        f"{samples} fixed prompts and noise, averaged weights, the sampler of training."
        f" One run, one seed: the standard error of the retrieval is {error:.1f}"
        f" points. `policy/ratio_max_deviation` was at most {worst:g} in {len(epochs)}"
        f" epochs. Median seconds an epoch: {stages}.",
        "",
        f"| epoch | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row in judged:
        cells = " | ".join(write(row) for _, write in COLUMNS)
        lines.append(f"| {row['step']} | {cells} |")
    below = "`quickstart_before_after.png`: the first of these prompts, above before"
    return "\n".join([*lines, "", f"{below} and below after training.", ""])


def last_line(path: Path) -> dict[str, Any]:
    """The last line of a .jsonl file."""
    return json.loads(path.read_text().splitlines()[-1])


def main() -> None:
    """Runs, writes the page and the picture, prints the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    now = time.strftime("%Y%m%d_%H%M%S")  # a run of its own each time
    parser.add_argument("--workdir", default=f"runs/quickstart_{now}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options, keys = parser.parse_known_args()
    home = ROOT / options.workdir
    if home.exists():
        parser.error(f"{home} exists: its seconds would be those of a part")
    flags = ["--config=configs/quickstart.py", f"--workdir={options.workdir}", *keys]
    command = ["python", "-m", "ddrl_jax.main", *flags]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # as for a new user: nothing compiled
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        run = [sys.executable, *command[1:]]
        subprocess.run(run, cwd=ROOT, env=environment, check=True)
        seconds = time.perf_counter() - begin
    rows = [json.loads(x) for x in (home / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((home / "config.json").read_text())
    if rows[-1]["step"] != config["train"]["epochs"]:  # it was told to stop
        parser.error(f"{home} is not finished: its seconds are those of a part")
    start = last_line(home / "starts.jsonl")
    start["samples"] = config["evaluate"]["samples"]
    text = page(shlex.join(command), seconds, rows, start)
    (options.out / "quickstart.md").write_text(text)
    grids = sorted((home / "samples").glob("evaluation_*.png"))
    picture = before_after(grids[0], grids[-1])
    save_png(options.out / "quickstart_before_after.png", picture)
    print(text)


if __name__ == "__main__":
    main()
