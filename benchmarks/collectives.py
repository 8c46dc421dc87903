"""Bytes of collectives in one update: compiled HLO beside the analytic formula.

    python -m benchmarks.collectives
    python -m benchmarks.collectives --chip v5e    # by the compiler of TPUs

Compiles the program's own update of a small float32 video network (16 blocks of width
128, remat full, two trained steps) for eight devices on each axis of the mesh, and
reads its HLO; nothing is run. Writes benchmarks/results/collectives.md, or
collectives_v5e.md.
"""

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from configs import video_14b
from ddrl_jax.chips import chip_named
from ddrl_jax.plan import placeholders
from ddrl_jax.plan.formula import AXES, Traffic, traffic
from ddrl_jax.plan.lowered import compile_phase, describe
from ddrl_jax.plan.sheet import network_items
from ddrl_jax.plan.target import HERE, Target, choose

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8


def small(axis: str) -> Any:
    """The video configuration at a size whose blocks outweigh its ends."""
    c = video_14b.get_config("smoke")
    c.model.update(width=128, depth=16, heads=8, remat="full", attention="auto")
    c.model.video.update(frames=4, height=16, width=16, mlp=512)
    c.model.video.update(text_tokens=8, text_width=16)
    c.prompts.update(per_epoch=2, group_size=8)
    c.train.microbatch = 1
    c.mesh.update({name: 1 for name in AXES} | {axis: DEVICES})
    return c


def measure(
    axis: str, target: Target = HERE
) -> tuple[float, Traffic, int, dict[str, int]]:
    """Bytes sent in the compiled update, the formula, items, and what is sent."""
    plan = describe(small(axis), target)
    found = compile_phase(plan.phases[-1], plan.mesh)
    kinds: dict[str, int] = {}
    for c in found.collectives:
        kinds[c.kind] = kinds.get(c.kind, 0) + c.count
    total = sum(c.bytes for c in found.collectives)
    return total, traffic(plan), network_items(plan, "update"), kinds


def about(target: Target, command: str) -> list[str]:
    """How the table came about."""
    compiler = f"{DEVICES} CPU devices"
    if target.chip is not None:
        libtpu = importlib.metadata.version("libtpu")
        compiler = f"{DEVICES} x {target.name} by libtpu {libtpu}"
    return [
        "# Collective bytes of an update, by mesh axis",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, compiled for {compiler}, jax "
        f"{jax.__version__}; nothing is run.",
        "MB that one device sends; the formulas are in `ddrl_jax/plan/formula.py`.",
        "",
        "| mesh | items | compiled HLO | formula | off by | ideal | instructions run |",
        "|---" * 7 + "|",
    ]


ENDINGS = {
    "cpu": "The ideal sums the gradients of all items before they are sent (data, "
    "context), and reduces them into shards (fsdp); XLA for CPU has no pass that makes "
    "a reduce-scatter, and none that moves the reduction out of the loop.",
    "tpu": "The ideal sums the gradients of all items before they are sent (data, "
    "context), and reduces them into shards (fsdp). The compiler of TPUs makes "
    "reduce-scatters, and does not move the reduction out of the loop either.",
}


def main(arguments: Sequence[str]) -> None:
    """Compiles four meshes and writes the table."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--chip", help="a TPU, by its own compiler: needs libtpu")
    chip = flags.parse_args(arguments).chip
    target = choose("tpu", chip_named(chip), 0) if chip else HERE
    placeholders(1 if chip else DEVICES)
    lines = about(target, " ".join(("python -m benchmarks.collectives", *arguments)))
    for axis in AXES:
        total, formula, items, kinds = measure(axis, target)
        off = total / formula.compiled - 1
        ran = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        lines.append(
            f"| {axis} {DEVICES} | {items} | {total / 1e6:.2f} | "
            f"{formula.compiled / 1e6:.2f} | {off:+.1%} | {formula.ideal / 1e6:.2f} | "
            f"{ran} |"
        )
        print(lines[-1], flush=True)
    lines += ["", ENDINGS[target.compiler]]
    name = f"collectives_{chip}.md" if chip else "collectives.md"
    path = ROOT / "benchmarks" / "results" / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
