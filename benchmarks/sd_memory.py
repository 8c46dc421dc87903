"""Memory and work of DDPO on Stable Diffusion 1.5, from the compiler and the jaxprs.

    python -m benchmarks.sd_memory
    python -m benchmarks.sd_memory --chip v6e    # by the compiler of TPUs, without one

Compiles what configs/aesthetic.py runs on one device - the update of a whole minibatch
with all 50 steps of its trajectories, the rollout, the decoding - at true shapes
(512 px, guidance 5) without any weights, and prints what the compiler sets aside:
arguments, results that are not in their place, temporaries. On a CPU this is the CPU
compiler's plan, which an accelerator's may differ from; on an accelerator it is that
one's. What else lies on the device is added up from its shapes. FLOPs are counted from
the jaxprs, loops as often as they run.

The CPU's compiler is told to order operations for memory, as those of accelerators do
(--scheduler=default leaves its own choice, an order for many threads), and not to
optimise machine code, which nothing here runs. It computes bfloat16 products in
float32: the table names the float32 copies of bfloat16 weights that are alive at the
peak, which a chip with bfloat16 products does not make.

Writes benchmarks/results/sd_memory.md, or sd_memory_v6e.md.
"""

import argparse
import importlib.metadata
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import aesthetic
from ddrl_jax.chips import chip_named
from ddrl_jax.data.prompt_sets import prompt_set
from ddrl_jax.flops import Count, count
from ddrl_jax.models.clip_config import ClipVisionConfig
from ddrl_jax.models.networks import network_shapes
from ddrl_jax.models.sd_folder import read_source
from ddrl_jax.models.sd_published import FILES
from ddrl_jax.plan.lowered import Abstract, describe
from ddrl_jax.plan.sizes import bytes_per_device
from ddrl_jax.plan.target import HERE, Target, choose, unsaved
from ddrl_jax.program import chunk_size

RESULTS = Path(__file__).resolve().parent / "results"
# CLIP ViT-L/14's picture tower, which the aesthetic score looks through
JUDGE = ClipVisionConfig(
    hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24,
    num_attention_heads=16, patch_size=14, with_projection=True,
)  # fmt: skip
GB, TERA = 1e9, 1e12
CPU_OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_dump_hlo_as_text": True,
}
SCHEDULERS = {
    "memory": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "default": "CPU_SCHEDULER_TYPE_DEFAULT",
}


class Measured(NamedTuple):
    """What one compiled program needs, in bytes."""

    name: str
    arguments: int
    outputs: int  # beyond those that take the place of arguments
    temporaries: int
    widened: int  # of the temporaries at the peak: float32 copies of bfloat16 weights
    count: Count  # FLOPs, loops as often as they run
    seconds: float  # of compiling

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs + self.temporaries


def measure(
    name: str, function: Any, shapes: tuple, order: str, target: Target
) -> Measured:
    """Compiles for abstract arguments; `order` is a name of SCHEDULERS, for a CPU."""
    start = time.monotonic()
    lowered = function.lower(*shapes)
    plan = ""
    if target.chip is not None or jax.default_backend() != "cpu":
        with unsaved():
            compiled = lowered.compile()
    else:
        compiled, plan = on_cpu(lowered, order)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend plans no memory ahead"
    return Measured(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        widened(compiled.as_text() or "", plan) if plan else 0,
        count(function, *shapes),
        seconds,
    )


def on_cpu(lowered: Any, order: str) -> tuple[Any, str]:
    """Compiles in an order of SCHEDULERS; also the list of what is alive when."""
    with tempfile.TemporaryDirectory() as folder:
        options: Any = CPU_OPTIONS | {"xla_dump_to": folder}
        options |= {"xla_cpu_scheduler_type": SCHEDULERS[order]}
        compiled = lowered.compile(compiler_options=options)
        (plan,) = Path(folder).glob("*live-range.txt")  # of one program
        return compiled, plan.read_text(encoding="utf-8")


def widened(program: str, plan: str) -> int:
    """Bytes of the float32 copies of bfloat16 arguments that are alive at the peak.

    Args:
      program: the compiled program as text.
      plan: the compiler's list of what is alive when.
    """
    entry = program[program.rfind("\nENTRY ") :]
    rounded = r"%([\w.\-]+) = \w+\[[^=]*parameter\(\d+\)"
    arguments = set(re.findall(rounded, entry))
    copy = r"%([\w.\-]*convert[\w.\-]*) = f32\S* (?:fusion|convert)\(%([\w.\-]+)\)"
    copies = {name for name, of in re.findall(copy, entry) if of in arguments}
    peak = plan.partition("(peak):")[2].partition("Stack trace")[0]
    alive = re.findall(r"([\w.\-]+)\{[\d,]*\}: (\d+) bytes", peak)
    return sum(int(size) for name, size in alive if name in copies)


def write_model(folder: Path, files: Mapping[str, dict[str, Any]] = FILES) -> Path:
    """Stable Diffusion 1.5 in the layout of diffusers, without its weights."""
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def planned(variant: str, microbatch: int, model: Path, target: Target) -> Abstract:
    """A variant of configs/aesthetic.py on one device; micro-batch 0 is its own."""
    config: Any = aesthetic.get_config(variant)
    config.model.init = str(model)
    config.mesh.data = 1
    config.train.microbatch = microbatch or config.train.microbatch
    return describe(config, target)


class Part(NamedTuple):
    """A program of a run with abstract arguments, and how many samples it is for."""

    name: str
    function: Any
    arguments: tuple
    samples: int


def programs(plan: Abstract) -> list[Part]:
    """What runs on the device, one after the other."""
    pipeline, size = plan.weights.pipeline, chunk_size(plan.config, plan.mesh)
    rollout, update = plan.phases
    here = NamedSharding(plan.mesh, P())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)  # noqa: E731
    x0 = place(jax.ShapeDtypeStruct((size, *pipeline.latent_shape), jnp.float32))
    decoder = jax.tree.map(place, pipeline.decode)
    decode = jax.jit(lambda decode, x0: decode(x0))
    steps, samples = plan.config.sampler.steps, plan.chunks * size
    return [
        Part("update", update.function, update.arguments, samples),
        Part(f"rollout, {steps} steps", rollout.function, rollout.arguments, size),
        Part("decode", decode, (decoder, x0), size),
    ]


def resident(plan: Abstract) -> dict[str, int]:
    """Bytes that lie on the device besides an update's own arguments."""
    config: Any = plan.config
    pipeline = plan.weights.pipeline
    text = read_source(Path(config.model.init)).text
    others = (config.train.minibatches - 1) * plan.chunks
    prompts = len(prompt_set(config.prompts.set))
    return {
        "trajectories of the epoch's other minibatches": others
        * bytes_per_device(plan.chunk, plan.sizes),
        f"embeddings of {prompts} prompts": prompts * size_of(pipeline.uncond),
        "text encoder, float32": size_of(network_shapes("clip_text", text)),
        "autoencoder, float32": size_of((pipeline.decode, pipeline.encode_images)),
        "CLIP ViT-L/14 of the judge, float32": size_of(
            network_shapes("clip_vision", JUDGE)
        ),
    }


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


COLUMNS = (
    "program", "samples", "peak GB", "arguments", "results beside them", "temporaries",
    "widened weights", "peak without them", "TFLOP a sample", "of these recomputed",
    "compiling s",
)  # fmt: skip


def table(rows: Sequence[tuple[Measured, int]]) -> Iterator[str]:
    """As markdown; each row with the samples that its program is for."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for r, samples in rows:
        sizes = (r.peak, r.arguments, r.outputs, r.temporaries)
        sizes += (r.widened, r.peak - r.widened)
        cells = " | ".join(f"{size / GB:.2f}" for size in sizes)
        work = " | ".join(
            f"{flops / samples / TERA:.1f}"
            for flops in (r.count.flops, r.count.recomputed)
        )
        yield f"| {r.name} | {samples} | {cells} | {work} | {r.seconds:.0f} |"


def beside(label: str, plan: Abstract, update: Measured) -> Iterator[str]:
    """What else is on the device while an update runs, and the sum."""
    parts = resident(plan)
    total = update.peak + sum(parts.values())
    yield f"Beside the update, {label} (GB):"
    yield ""
    yield from (f"- {name}: {size / GB:.2f}" for name, size in parts.items())
    without = f"{(total - update.widened) / GB:.1f} without widened weights"
    yield f"- the update and all of these: {total / GB:.1f}, {without}"
    yield ""


def main(arguments: Sequence[str]) -> None:
    """Measures and writes the table, again after each program."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--microbatches", nargs="+", type=int, default=[1, 0])
    flags.add_argument("--variants", nargs="+", default=["lora", "paper"])
    flags.add_argument("--scheduler", choices=SCHEDULERS, default="memory")
    flags.add_argument("--chip", help="a TPU, by its own compiler: needs libtpu")
    flags.add_argument("--out", help="a file; without it one in benchmarks/results")
    options = flags.parse_args(arguments)
    out = Path(options.out) if options.out else named(options.chip)
    target = choose("tpu", chip_named(options.chip), 0) if options.chip else HERE
    rows: list[tuple[Measured, int]] = []
    notes: list[str] = []
    cases = itertools.product(options.microbatches, options.variants)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for microbatch, variant in cases:
            plan = planned(variant, microbatch, model, target)
            for part in programs(plan):
                label = name_of(variant, plan)
                name, shapes = f"{label}: {part.name}", part.arguments
                order = options.scheduler
                found = measure(name, part.function, shapes, order, target)
                rows.append((found, part.samples))
                notes += beside(label, plan, found) if part.name == "update" else []
                head = about(arguments, order, target)
                write(out, head, rows, notes)


def named(chip: str | None) -> Path:
    """The file of a compiler's table: each has its own."""
    return RESULTS / (f"sd_memory_{chip}.md" if chip else "sd_memory.md")


def name_of(variant: str, plan: Abstract) -> str:
    """A variant as the table names it."""
    config: Any = plan.config
    return f"{variant}, {config.model.dtype}, micro-batch {config.train.microbatch}"


def about(arguments: Sequence[str], order: str, target: Target) -> list[str]:
    """How the table came about."""
    device, version = jax.devices()[0], f"jax {jax.__version__}"
    compiler = f"{device.platform} ({device.device_kind}), {version}"
    how = f"Order of operations on a CPU: for {order}. "
    if target.chip is not None:
        libtpu = importlib.metadata.version("libtpu")
        compiler, how = f"{target.name} by libtpu {libtpu}, {version}", ""
    return [
        "# Memory and work of Stable Diffusion 1.5 at 512 px, by the compiler",
        "",
        f"`python -m benchmarks.sd_memory {' '.join(arguments)}`".replace(" `", "`"),
        f"{time.strftime('%Y-%m-%d')}, compiled for {compiler}; nothing was run.",
        f"{how}What configs/aesthetic.py runs on one device: 256 samples an epoch, "
        "50 steps, guidance 5 (two rows of the network a sample), remat full, AdamW "
        "with float32 moments.",
        "",
    ]


def write(path: Path, head: list[str], rows: list, notes: list[str]) -> None:
    """Writes and prints the whole file."""
    text = "\n".join([*head, *table(rows), "", *notes])
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
