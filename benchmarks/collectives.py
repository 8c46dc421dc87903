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
from typing import Any, NamedTuple

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


class Measured(NamedTuple):
    """What the update on one mesh axis sends.

    Attributes:
      total: bytes.
      narrow: bytes of these in instructions that carry anything but float32.
      formula: for the same mesh.
      items: trained steps x microbatches of a device.
      kinds: how often instructions of each kind run.
    """

    total: float
    narrow: float
    formula: Traffic
    items: int
    kinds: dict[str, int]


def measure(axis: str, target: Target = HERE) -> Measured:
    """Reads the compiled update of the mesh that has all devices on one axis."""
    plan = describe(small(axis), target)
    found = compile_phase(plan.phases[-1], plan.mesh).collectives
    kinds: dict[str, int] = {}
    for c in found:
        kinds[c.kind] = kinds.get(c.kind, 0) + c.count
    total = sum(c.bytes for c in found)
    narrow = sum(c.bytes for c in found if not c.wide)
    items = network_items(plan, "update")
    return Measured(total, narrow, traffic(plan), items, kinds)


def row(axis: str, found: Measured) -> str:
    """A line of the table."""
    formula, ran = found.formula, sorted(found.kinds.items())
    sizes = (found.narrow, formula.compiled)
    off = found.total / formula.compiled - 1
    return (
        f"| {axis} {DEVICES} | {found.items} | {found.total / 1e6:.2f} | "
        f"{' | '.join(f'{size / 1e6:.2f}' for size in sizes)} | {off:+.1%} | "
        f"{formula.ideal / 1e6:.2f} | {', '.join(f'{n} {kind}' for kind, n in ran)} |"
    )


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
        "| mesh | items | compiled HLO | of it not float32 | formula | off by | ideal "
        "| instructions run |",
        "|---" * 8 + "|",
    ]


ENDING = (
    "The ideal sums the gradients of all items before they are sent (data, context), "
    "and reduces them into shards (fsdp): instructions of the kind reduce-scatter do "
    "that. Both formulas are of float32 throughout; what a compiler sends in bfloat16 "
    "is half of that, and can bring it below the ideal."
)


def main(arguments: Sequence[str]) -> None:
    """Compiles four meshes and writes the table."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--chip", help="a TPU, by its own compiler: needs libtpu")
    chip = flags.parse_args(arguments).chip
    target = choose("tpu", chip_named(chip), 0) if chip else HERE
    placeholders(1 if chip else DEVICES)
    lines = about(target, " ".join(("python -m benchmarks.collectives", *arguments)))
    for axis in AXES:
        lines.append(row(axis, measure(axis, target)))
        print(lines[-1], flush=True)
    lines += ["", ENDING]
    name = f"collectives_{chip}.md" if chip else "collectives.md"
    path = ROOT / "benchmarks" / "results" / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
