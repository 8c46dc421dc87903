"""Judges the shipped base policy: held-out retrieval with and without guidance.

    python -m benchmarks.base_policy --out benchmarks/results

Two samples of each of the 256 captions, deterministic ODE, fixed noise; top-1 among
ALL captions and the reject class by the held-out judge. Writes base_policy.md and a
contact sheet of the first samples.
"""

import argparse
import datetime
import platform
import time
from pathlib import Path

import jax
import numpy as np

from configs import base
from ddrl_jax.evaluate import chunks_of, make_sampler
from ddrl_jax.pictures import grid, save_png
from ddrl_jax.program import Program, build
from ddrl_jax.rewards.compressibility import jpeg_kilobytes
from ddrl_jax.rewards.retrieval import Retrieval, load_judge

NOISE_STREAM = 4_000_037


def sample(program: Program, guidance: float, steps: int, count: int) -> np.ndarray:
    """Pictures of the captions in order, `count` in all."""
    settings = program.config.sample.copy_and_resolve_references()
    settings.guidance_scale, settings.steps = guidance, steps
    run = make_sampler(program, settings, "euler")
    index = np.arange(count, dtype=np.int32) % len(program.prompts)
    root = jax.random.fold_in(jax.random.key(program.config.seed), NOISE_STREAM)
    params = program.new_state().average
    rows = chunks_of(program, root, index)
    parts = [run(params, program.frozen, *p)[0] for p in rows]
    return np.concatenate(jax.device_get(parts))[:count]


def main() -> None:
    """Samples, judges and writes the table and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", default="assets", help="assets or an exported .npz")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    options = parser.parse_args()
    config = base.get_config()
    config.model.init, config.train.microbatch = options.init, 64
    config.prompts.update(per_epoch=64, group_size=1)
    program, out = build(config), Path(options.out)
    text = tuple(program.prompts[i % 256] for i in range(options.samples))
    judge = Retrieval(load_judge())
    rows = []
    for guidance in options.guidance:
        begin = time.perf_counter()
        images = sample(program, guidance, options.steps, options.samples)
        seconds = time.perf_counter() - begin
        hit = float(np.mean(judge(images, text)))
        size = float(np.mean(jpeg_kilobytes(images, 4)))
        rows.append(
            f"| {guidance:g} | {100 * hit:.1f} % | {size:.2f} | {seconds:.0f} |"
        )
        print(rows[-1], flush=True)
        sheet = grid(images[:128], 16, 3, text[:128])
        save_png(out / f"base_policy_guidance_{guidance:g}.png", sheet)
    write_table(out / "base_policy.md", options, program, rows)


def write_table(path: Path, options, program: Program, rows: list[str]) -> None:
    """Writes what was measured, with the command, versions, machine and date."""
    guidance = " ".join(f"{scale:g}" for scale in options.guidance)
    head = [
        "# The base policy, judged",
        "",
        f"`python -m benchmarks.base_policy --samples {options.samples} "
        f"--steps {options.steps} --guidance {guidance}`, {datetime.date.today()}, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), jax "
        f"{jax.__version__}, weights {program.pipeline.fingerprint}.",
        "",
        f"{options.samples} samples, {options.steps} Euler steps; top-1 among all "
        f"{len(program.prompts)} captions and the reject class; JPEG kB after 4x "
        "nearest upscaling.",
        "",
        "| guidance | held-out retrieval, top-1 | JPEG kB | seconds |",
        "|---|---|---|---|",
    ]
    path.write_text("\n".join([*head, *rows]) + "\n")


if __name__ == "__main__":
    main()
