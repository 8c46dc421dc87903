"""Memory of a DDPO update and a rollout of Stable Diffusion 1.5, from the compiler.

    python -m benchmarks.sd_memory

Compiles the program's own update and rollout at true shapes (512 px, guidance 5,
micro-batch 1) without any weights, and prints what the compiler sets aside: arguments,
results that are not in their place, temporaries. On a CPU this is the CPU compiler's
plan, which an accelerator's may differ from; on an accelerator it is that one's.

The CPU's compiler is told to order operations for memory, as those of accelerators do
(--scheduler=default leaves its own choice, an order for many threads), and not to
optimise machine code, which nothing here runs. It computes bfloat16 products in
float32: the table names the float32 copies of bfloat16 weights that are alive at the
peak, which a chip with bfloat16 products does not make.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from configs import aesthetic
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.interfaces import Cond, Pipeline, Trajectory
from ddrl_jax.learner import Minibatch, make_update
from ddrl_jax.models.unet import PRECISE, UNet2DConditionModel
from ddrl_jax.models.unet_config import UNetConfig
from ddrl_jax.optim import make_optimizer
from ddrl_jax.program import make_objective
from ddrl_jax.rollout import rollout, step_times
from ddrl_jax.sharding import make_mesh
from ddrl_jax.weights import describe_weights

RESULTS = Path(__file__).resolve().parent / "results" / "sd_memory.md"
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
LATENT, TOKENS, WIDTH = (64, 64, 4), 77, 768
STEPS = 2  # trained: they are taken one after the other, in the same memory
GB = 1e9
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
    flops: float  # of the program, a loop counted once
    seconds: float  # of compiling

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs + self.temporaries


def measure(
    name: str, function: Any, *shapes: Any, order: str, donate: tuple = ()
) -> Measured:
    """Compiles for abstract arguments; `order` is a name of SCHEDULERS."""
    start = time.monotonic()
    lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
    with tempfile.TemporaryDirectory() as folder:
        options: Any = CPU_OPTIONS | {"xla_dump_to": folder}
        options |= {"xla_cpu_scheduler_type": SCHEDULERS[order]}
        on_cpu = jax.default_backend() == "cpu"
        compiled = lowered.compile(compiler_options=options if on_cpu else None)
        plans = list(Path(folder).glob("*live-range.txt"))
        plan = plans[0].read_text(encoding="utf-8") if plans else ""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None, "this backend plans no memory ahead"
    return Measured(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        widened(compiled.as_text() or "", plan),
        float((cost or {}).get("flops", np.nan)),
        time.monotonic() - start,
    )


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


def pipeline_of(config: Any) -> Pipeline:
    """The UNet alone; nothing of it is computed."""
    model = config.model
    network = UNet2DConditionModel(
        UNetConfig.from_json(UNET), model.dtype, model.remat, config.lora.rank,
        config.lora.alpha, model.attention,
    )  # fmt: skip
    example = (jnp.zeros((1, *LATENT)), jnp.zeros(1), jnp.zeros((1, TOKENS, WIDTH)))

    def boxed(key: jax.Array) -> Any:
        trees = network.init({"params": key, "lora": key}, *example)
        return {"params": trees["params"], "lora": trees.get("lora")}

    def denoise(params, lora, z, t, cond) -> Any:
        trees = {"params": params} | ({} if lora is None else {"lora": lora})
        return network.apply(trees, z, t, cond.emb)

    uncond = Cond(jnp.zeros((1, TOKENS, WIDTH)))
    nothing: Any = lambda *_: None  # noqa: E731
    shapes = jax.eval_shape(boxed, jax.random.key(0))
    specs = nn.get_partition_spec(shapes)
    return Pipeline(
        encode=nothing,
        uncond=uncond,
        init=lambda key: nn.meta.unbox(boxed(key)),
        denoise=denoise,
        decode=nothing,
        axes=jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, P)),
        latent_shape=LATENT,
        prediction="eps",
        load=nothing,
        fingerprint="",
        precise=PRECISE,
    )


def minibatch(size: int) -> Minibatch:
    """Shapes of one microbatch with its kept transitions."""
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    index = jax.ShapeDtypeStruct((STEPS, size), jnp.int32)
    states, flat = f32(STEPS, size, *LATENT), f32(STEPS, size)
    kept = Trajectory(states, states, flat, f32(STEPS, size, 2), index, None)
    cond = Cond(f32(size, TOKENS, WIDTH))
    return Minibatch(key, key, cond, None, None, kept, flat, f32(size))


def measure_config(label: str, config: Any, size: int, order: str) -> list[Measured]:
    """The update and the rollout of a configuration."""
    pipeline = pipeline_of(config)
    kernel = make_kernel(config.sampler, "eps")
    objective = make_objective(config, pipeline, kernel, None)
    tx = make_optimizer(config.optimizer, 1000)
    weights = describe_weights(config, pipeline, tx, make_mesh(config.mesh))
    trained = weights.shapes[weights.trained]
    frozen = weights.shapes["params"] if config.lora.rank else {}
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights.abstract
    )
    update = make_update(objective, tx, config.optimizer.ema_decay)
    chunk = minibatch(size)

    def sample(params, frozen, keys, cond, times, kept):
        def denoise(z, t, c):
            return objective.apply(params, frozen, z, t, c)

        policy, score = objective.guide(denoise), objective.score
        return rollout(policy, kernel, score, keys, cond, LATENT, times, kept)

    times = jax.ShapeDtypeStruct(step_times(kernel, size).shape, jnp.float32)
    kept = jax.ShapeDtypeStruct((config.sampler.steps, size), jnp.int32)
    rolled = (trained, frozen, chunk.keys, chunk.cond, times, kept)
    steps = kernel.levels.shape[0]
    return [
        measure(
            f"{label}: update",
            update,
            *(state, frozen, None, (chunk,)),
            order=order,
            donate=(0,),
        ),
        measure(f"{label}: rollout, {steps} steps", sample, *rolled, order=order),
    ]


def table(rows: Sequence[Measured]) -> list[str]:
    """As markdown."""
    lines = [
        "| program | peak GB | arguments | results beside them | temporaries "
        "| widened weights | peak without them | TFLOP, loops once | compiling s |",
        "|---" * 9 + "|",
    ]
    for r in rows:
        sizes = (r.peak, r.arguments, r.outputs, r.temporaries)
        sizes += (r.widened, r.peak - r.widened)
        cells = " | ".join(f"{size / GB:.2f}" for size in sizes)
        lines.append(f"| {r.name} | {cells} | {r.flops / 1e12:.2f} | {r.seconds:.0f} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measures and writes benchmarks/results/sd_memory.md."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--microbatch", type=int, default=1)
    flags.add_argument("--variants", nargs="+", default=["lora", "paper"])
    flags.add_argument("--dtype", default="")
    flags.add_argument("--scheduler", choices=SCHEDULERS, default="memory")
    flags.add_argument("--out", default=str(RESULTS))
    options = flags.parse_args(arguments)
    rows = []
    for variant in options.variants:
        config = aesthetic.get_config(variant)
        config.model.dtype = options.dtype or config.model.dtype
        label = f"{variant}, {config.model.dtype}, remat {config.model.remat}"
        rows += measure_config(label, config, options.microbatch, options.scheduler)
        print("\n".join(table(rows)), flush=True)
    head = [
        "# Memory of Stable Diffusion 1.5 at 512 px, by the compiler",
        "",
        f"`python -m benchmarks.sd_memory {' '.join(arguments)}`".replace(" `", "`"),
        f"{time.strftime('%Y-%m-%d')}, compiled for {jax.default_backend()} "
        f"({jax.devices()[0].device_kind}), jax {jax.__version__}.",
        f"Order of operations on a CPU: for {options.scheduler}. "
        f"Micro-batch {options.microbatch}, guidance 5 (two rows of the network a "
        "sample), AdamW with float32 moments, attention in chunks of 1,024 queries.",
        "",
    ]
    path = Path(options.out)
    path.write_text("\n".join([*head, *table(rows)]) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
