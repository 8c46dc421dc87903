"""Bytes of collectives in one update: compiled HLO beside the analytic formula.

    python -m benchmarks.collectives

Compiles the program's own update of a small float32 video network (16 blocks of width
128, remat full, two trained steps) for eight CPU devices on each axis of the mesh, and
reads its HLO; nothing is run. Writes benchmarks/results/collectives.md.
"""

import time
from pathlib import Path
from typing import Any

import jax

from configs import video_14b
from ddrl_jax.plan import placeholders
from ddrl_jax.plan.formula import AXES, Traffic, traffic
from ddrl_jax.plan.lowered import compile_phase, describe
from ddrl_jax.plan.sheet import network_items

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


def measure(axis: str) -> tuple[float, Traffic, int, dict[str, int]]:
    """Bytes sent in the compiled update, the formula, items, and what is sent."""
    plan = describe(small(axis))
    found = compile_phase(plan.phases[-1], plan.mesh)
    kinds: dict[str, int] = {}
    for c in found.collectives:
        kinds[c.kind] = kinds.get(c.kind, 0) + c.count
    total = sum(c.bytes for c in found.collectives)
    return total, traffic(plan), network_items(plan, "update"), kinds


def main() -> None:
    """Compiles four meshes and writes the table."""
    placeholders(DEVICES)
    lines = [
        "# Collective bytes of an update, by mesh axis",
        "",
        f"`python -m benchmarks.collectives`, {time.strftime('%Y-%m-%d')}, compiled "
        f"for {DEVICES} CPU devices, jax {jax.__version__}; nothing is run.",
        "MB that one device sends; the formulas are in `ddrl_jax/plan/formula.py`.",
        "",
        "| mesh | items | compiled HLO | formula | off by | ideal | instructions run |",
        "|---" * 7 + "|",
    ]
    for axis in AXES:
        total, formula, items, kinds = measure(axis)
        off = total / formula.compiled - 1
        ran = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        lines.append(
            f"| {axis} {DEVICES} | {items} | {total / 1e6:.2f} | "
            f"{formula.compiled / 1e6:.2f} | {off:+.1%} | {formula.ideal / 1e6:.2f} | "
            f"{ran} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "The ideal sums the gradients of all items before they are sent (data, "
        "context), and reduces them into shards (fsdp); XLA for CPU has no pass that "
        "makes a reduce-scatter, and none that moves the reduction out of the loop.",
    ]
    path = ROOT / "benchmarks" / "results" / "collectives.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
