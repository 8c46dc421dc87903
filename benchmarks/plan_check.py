"""What a plan says of a run beside what is measured of it, on the CPU of this machine.

    python -m benchmarks.plan_check

The rollout and the update of four small runs are planned as --mode=plan does, on one
device, and then called with real arrays of the same shapes, each run in a process of
its own. Peak: the compiler's temporaries and results beside the growth of the resident
set (VmHWM of /proc/self/status, reset before the call; Linux only). Time: the bound of
a roofline for a chip whose peaks are the matrix product and the copy measured on this
machine, beside the fastest of three calls. Writes benchmarks/results/plan_check.md.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.collectives import small
from benchmarks.sd_memory import write_model
from configs import aesthetic, quickstart
from ddrl_jax.chips import CHIPS, Chip
from ddrl_jax.models.sd_published import FILES
from ddrl_jax.plan.links import lay
from ddrl_jax.plan.lowered import Abstract, Compiled, compile_phase, describe
from ddrl_jax.plan.memory import own
from ddrl_jax.plan.roofline import bounds
from ddrl_jax.plan.sheet import network_items
from ddrl_jax.sharding import AXES

RESULTS = Path(__file__).resolve().parent / "results" / "plan_check.md"
ONE = dict.fromkeys(AXES, 1)
CALLS = 3
MB, GIGA = 1e6, 1e9
# What is freed goes back to the system, so that the next call's growth shows all of it.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


# The layout of Stable Diffusion 1.5 with a fifth of its widths, on latents of 16 x 16.
NARROW: dict[str, dict[str, Any]] = {
    "block_out_channels": (64, 128, 256, 256),
    "sample_size": 16,
}
UNET = {**FILES, "unet/config": FILES["unet/config"] | NARROW}


def transformer(folder: Path) -> Any:
    """The main job as it is; nothing is read from a folder."""
    return quickstart.get_config()


def unet(folder: Path) -> Any:
    """DDPO on a narrow Stable Diffusion, written to a folder without weights."""
    config: Any = aesthetic.get_config("paper")
    config.model.init = str(write_model(folder, UNET))
    config.model.image_size = 8 * NARROW["sample_size"]  # 512 in that variant
    config.prompts.update(per_epoch=4, group_size=1)
    config.train.update(minibatches=1, microbatch=2)
    config.sampler.steps = 4
    return config


def video(folder: Path) -> Any:
    """The video network of the collectives' table."""
    return small("data")


def bfloat16(folder: Path) -> Any:
    """The same with products in bfloat16."""
    config = small("data")
    config.model.dtype = "bfloat16"
    return config


RUNS: dict[str, Callable[[Path], Any]] = {
    "quickstart (transformer, float32)": transformer,
    "narrow Stable Diffusion (UNet, float32)": unet,
    "video, 16 blocks (float32)": video,
    "video, 16 blocks (bfloat16)": bfloat16,
}


def this_machine() -> Chip:
    """A row of the table of chips, measured: products and copies of large arrays."""
    a = jnp.ones((2048, 2048))
    product = _fastest(jax.jit(jnp.matmul), a, a)
    large = jnp.ones(2**27)  # 512 MiB: far beyond the caches
    copy = _fastest(jax.jit(lambda x: x + 1), large)
    return CHIPS["v5e"]._replace(
        name="this CPU", flops=2 * 2048**3 / product, hbm_bandwidth=2 * 2**29 / copy
    )


def _fastest(function: Callable, *arrays: Any) -> float:
    jax.block_until_ready(function(*arrays))
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def filled(tree: Any) -> Any:
    """Arrays for a tree of shapes: zeros, and keys."""

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, tree)


def measured(found: Compiled) -> tuple[float, int]:
    """Seconds of the fastest call, and bytes by which the resident set grew at most.

    An update takes the place of its state, so each call has arguments of its own.
    """
    seconds, grown = [], 0
    for call in range(CALLS + 1):
        arguments = filled(found.phase.arguments)
        jax.block_until_ready(arguments)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        start = time.perf_counter()
        results = jax.block_until_ready(found.phase.function(*arguments))
        if call:  # the first compiles
            seconds.append(time.perf_counter() - start)
            grown = max(grown, _resident("VmHWM") - before)
        del results, arguments
    return min(seconds), grown


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None, name
    return 1024 * int(found[1])


def check(name: str) -> list[dict[str, Any]]:
    """Plans one run and measures it: a row for each phase."""
    with tempfile.TemporaryDirectory() as folder:
        config = RUNS[name](Path(folder))
        config.mesh.update(ONE)
        chip, plan = this_machine(), describe(config)
    return [_row(plan, compile_phase(phase, plan.mesh), chip) for phase in plan.phases]


def _row(plan: Abstract, found: Compiled, chip: Chip) -> dict[str, Any]:
    parts = own(plan, found)
    weights = jax.tree.leaves(plan.weights.shapes["params"])
    bound = bounds(
        found,
        lay(chip, ONE),
        efficiency=1.0,
        widened=False,
        weights=4 * sum(a.size for a in weights),
        items=network_items(plan, found.phase.name),
    )
    seconds, grown = measured(found)
    return {
        "phase": found.phase.name,
        "flops": found.count.flops,
        "planned": found.temporaries + found.outputs,
        "temporaries": parts[f"temporaries of the {found.phase.name}"],
        "grown": grown,
        "bound": bound.seconds,
        "term": bound.term,
        "seconds": seconds,
        "peaks": [chip.flops, chip.hbm_bandwidth],
    }


COLUMNS = (
    "run", "phase", "planned MB", "measured MB", "measured / planned", "GFLOP",
    "bound s", "by", "measured s", "share of the bound",
)  # fmt: skip


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """As markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, rows in found.items():
        for r in rows:
            lines.append(
                f"| {name} | {r['phase']} | {r['planned'] / MB:.0f} | "
                f"{r['grown'] / MB:.0f} | {r['grown'] / r['planned']:.2f} | "
                f"{r['flops'] / GIGA:.0f} | {r['bound']:.2f} | {r['term']} | "
                f"{r['seconds']:.2f} | {r['bound'] / r['seconds']:.0%} |"
            )
    return lines


def main(arguments: Sequence[str]) -> None:
    """Checks every run in a process of its own and writes the table."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--only", choices=RUNS, help="one run, as JSON on stdout")
    flags.add_argument("--out", default=str(RESULTS))
    options = flags.parse_args(arguments)
    if options.only:
        print(json.dumps(check(options.only)))
        return
    found = {}
    for name in RUNS:
        command = [sys.executable, "-m", "benchmarks.plan_check", "--only", name]
        answer = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | RETURNED,
        )
        found[name] = json.loads(answer.stdout.splitlines()[-1])
        print("\n".join(table({name: found[name]})[2:]), flush=True)
    peaks = [row["peaks"] for rows in found.values() for row in rows]
    flops, bandwidth = (max(values) / GIGA for values in zip(*peaks, strict=True))
    head = [
        "# A plan beside measurement",
        "",
        "`python -m benchmarks.plan_check`",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}. Fastest of {CALLS} calls. Peaks measured in each "
        f"process, at most {flops:.0f} GFLOP/s in products of 2048 x 2048 and "
        f"{bandwidth:.1f} GB/s copying.",
        "",
    ]
    Path(options.out).write_text(
        "\n".join([*head, *table(found)]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
