"""Where an epoch's time goes, what compiling costs, and whether anything recompiles.

    python -m benchmarks.profile_epoch

Runs the quickstart twice, each in a process of its own, saving after every epoch: a few
epochs with an empty compilation cache, then one epoch with the cache that the first has
filled. Writes profile.md below --out and prints it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("rollout", "reward", "update", "rest")
BAR = 5.0  # percent of an epoch that may lie in no stage
EVENTS = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def child(begin: float, argv: list[str]) -> None:
    """Trains as main does, and writes WORKDIR/profile.json beside its files.

    Args:
      begin: time.time() when this process was started.
      argv: as of ddrl_jax.main, with --workdir=WORKDIR last.
    """
    import jax

    import ddrl_jax.train as loop
    from ddrl_jax.main import run

    seconds: dict[str, Any] = dict.fromkeys(EVENTS.values(), 0.0)
    found: dict[str, Any] = {"programs": 0, "late": 0, "first": None}
    write = loop.Metrics.write

    def listen(event: str, duration: float, **_: Any) -> None:
        if event not in EVENTS:
            return
        seconds[EVENTS[event]] += duration
        if EVENTS[event] == "compile":
            found["programs"] += 1
            found["late"] += found["first"] is not None

    def written(metrics: Any, step: int, values: Any) -> None:
        write(metrics, step, values)
        if step == 1:
            found["first"] = time.time() - begin

    jax.monitoring.register_event_duration_secs_listener(listen)
    loop.Metrics.write = written
    asides: dict[str, list[float]] = {"saves": [], "evaluations": []}
    loop.save = timed(loop.save, asides["saves"])
    loop.Evaluation.run = timed(loop.Evaluation.run, asides["evaluations"])
    status = run(["profile_epoch", *argv])
    workdir = Path(argv[-1].removeprefix("--workdir="))
    if status == 0:
        (workdir / "profile.json").write_text(json.dumps(found | seconds | asides))
    sys.exit(status)


def timed(work: Callable, spent: list[float]) -> Callable:
    """The function itself; the seconds of each call are added to `spent`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = work(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    return call


def measure(variant: str, epochs: int, cache: Path, workdir: Path) -> dict[str, Any]:
    """One run in a process of its own.

    Returns:
      What `child` found, the metrics of each epoch and the machine.
    """
    config = f"{ROOT}/configs/quickstart.py" + (f":{variant}" if variant else "")
    arguments = [
        f"--config={config}",
        f"--config.train.epochs={epochs}",
        "--config.evaluate.every=0",  # before the first epoch and after the last
        "--config.checkpoint.every=1",  # as is the default
        f"--workdir={workdir}",
    ]
    command = [sys.executable, "-m", "benchmarks.profile_epoch", "--child"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [*command, str(time.time()), *arguments], cwd=ROOT, env=environment, check=False
    )
    if result.returncode != 0:
        sys.exit(result.returncode)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = json.loads((workdir / "profile.json").read_text())
    start = (workdir / "starts.jsonl").read_text().splitlines()[-1]
    return found | {
        "epochs": [json.loads(line) for line in lines][1:],
        "machine": json.loads(start),
    }


def stage_table(epochs: list[dict[str, Any]]) -> list[str]:
    """Median seconds and share of each stage over all epochs but the first."""
    steady = epochs[1:]
    whole = statistics.median(e["time/epoch"] for e in steady)
    rows = ["| stage | seconds an epoch | share |", "|---|---|---|"]
    for stage in STAGES:
        seconds = statistics.median(e[f"time/{stage}"] for e in steady)
        share = 100 * statistics.median(
            e[f"time/{stage}"] / e["time/epoch"] for e in steady
        )
        bar = f" (bar: at most {BAR:g} %)" if stage == "rest" else ""
        rows.append(f"| {stage} | {seconds:.3f} | {share:.1f} %{bar} |")
    rows.append(f"| epoch | {whole:.3f} | 100 % |")
    return rows


def aside_table(cold: dict[str, Any]) -> list[str]:
    """Seconds of what the loop does between two epochs.

    The first save opens Orbax, and the last call finds its epoch saved; the first
    evaluation compiles.
    """
    found = {
        "one save": cold["saves"][1:-1],
        "one evaluation": cold["evaluations"][1:],
    }
    rows = ["| between epochs | seconds |", "|---|---|"]
    return rows + [f"| {k} | {statistics.median(v):.3f} |" for k, v in found.items()]


def compile_table(cold: dict[str, Any], warm: dict[str, Any]) -> list[str]:
    """What each start pays before its second epoch."""
    rows = ["| | cold | persistent cache |", "|---|---|---|"]
    names = {
        "compile": "compiling, or reading the cache: seconds",
        "lower": "lowering: seconds",
        "first": "from start to the end of the first epoch: seconds",
    }
    for key, name in names.items():
        rows.append(f"| {name} | {cold[key]:.1f} | {warm[key]:.1f} |")
    rows.append(f"| programs | {cold['programs']} | {warm['programs']} |")
    return rows


def page(command: str, cold: dict[str, Any], warm: dict[str, Any]) -> str:
    """The whole of profile.md."""
    machine, epochs = cold["machine"], cold["epochs"]
    known = {k: v for k, v in machine["versions"].items() if v != "not installed"}
    versions = ", ".join(f"{k} {v}" for k, v in known.items())
    return "\n".join(
        [
            "# Profile of the quickstart",
            "",
            f"`{command}`, {machine['date']}",
            "",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
            f"{machine['devices']}",
            "",
            versions,
            "",
            f"## An epoch: median of epochs 2 to {len(epochs)}",
            "",
            *stage_table(epochs),
            "",
            "Judging overlaps the rollout: under reward is only what the loop waits.",
            "The rest: drawing prompts and data, advantages, logging the epoch before.",
            "Evaluation and saving are no part of an epoch's time:",
            "",
            *aside_table(cold),
            "",
            "The saves are those of `checkpoint.every=1` and `checkpoint.wait=True`:",
            "the loop goes on when they are on disk.",
            "",
            "## Compiling",
            "",
            *compile_table(cold, warm),
            "",
            f"Recompilations after the first epoch: {cold['late']}",
            "",
        ]
    )


def main() -> None:
    """Measures, prints and writes the page."""
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="", help="smoke: in seconds, on noise")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", default="", help="benchmarks/results, of smoke here")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one compiles")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        cache = base / "cache"
        cold = measure(options.variant, options.epochs, cache, base / "cold")
        warm = measure(options.variant, 1, cache, base / "warm")
    command = " ".join(["python -m benchmarks.profile_epoch", *sys.argv[1:]])
    text = page(command, cold, warm)
    out = Path(options.out or ("." if options.variant else "benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
