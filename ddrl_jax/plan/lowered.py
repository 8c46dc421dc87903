"""A run's two large programs, compiled for a mesh that is not here.

Arguments are shapes with shardings: no weight is made and no file is read, but for the
JSON of a diffusers model. The functions are those of `program`: what is planned is what
runs, but for "auto" attention where a CPU stands in for GPUs: it has no fused kernel.
"""

import re
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.check_optimizer import total_updates
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.draws import draw_trained_steps
from ddrl_jax.flops import Count, count
from ddrl_jax.interfaces import DataSource, Memory, Trajectory
from ddrl_jax.learner import Minibatch, TrainState, kept_samples
from ddrl_jax.models.pipelines import PIPELINES
from ddrl_jax.models.stable_diffusion import planned_pipeline
from ddrl_jax.optim import make_optimizer
from ddrl_jax.plan.hlo import Collective, collectives
from ddrl_jax.plan.sizes import AS_SHAPED, Sizes, bytes_per_device, laid_out
from ddrl_jax.plan.target import HERE, Target, unsaved
from ddrl_jax.plan.texts import Texts, texts_of
from ddrl_jax.program import (
    chunk_size,
    jit_update,
    make_objective,
    make_sample,
)
from ddrl_jax.rollout import step_times, stored_states
from ddrl_jax.sharding import AXES, BATCH, make_mesh, params_shardings
from ddrl_jax.terms import WEIGHTED
from ddrl_jax.weights import Weights, at_most, describe_weights, rollout_rules

# In place of pipelines that read more than shapes.
PLANNED = {"stable_diffusion": planned_pipeline}


class Phase(NamedTuple):
    """One jitted program with its abstract arguments."""

    name: str
    function: Any
    arguments: tuple
    calls: int  # an epoch
    bytes: int  # of its arguments, on a device


class Abstract(NamedTuple):
    """A run without weights.

    Attributes:
      config: of the run.
      mesh: over placeholder devices.
      weights: shapes and shardings of everything trained.
      frozen: of the base under a LoRA, or {}.
      chunk: one microbatch with its kept transitions.
      chunks: of them in an update.
      phases: rollout and update, in this order; no rollout without a policy term.
      target: whose compiler is asked.
      sizes: bytes on a device of the arguments that this compiler pads.
      texts: how many prompts there are.
    """

    config: Any
    mesh: Mesh
    weights: Weights
    frozen: Any
    chunk: Minibatch
    chunks: int
    phases: tuple[Phase, ...]
    target: Target
    sizes: Sizes
    texts: Texts


class Compiled(NamedTuple):
    """What the compiler and the jaxpr say of one phase.

    Attributes:
      phase: which.
      arguments: bytes a device, weights and trajectory included.
      outputs: bytes a device that do not take the place of arguments.
      temporaries: bytes a device at their peak.
      count: FLOPs and bytes of products, of all devices together.
      collectives: read from the compiled text.
      seconds: of lowering and compiling.
      refusal: of a compiler that knows the chip's memory and found it too small:
        `temporaries` are what it asked for, collectives are not known; "" if it did.
      host: bytes of each device that it keeps in its host's memory meanwhile, as remat
        "offload" does; 0 by a compiler that does not know that memory.
    """

    phase: Phase
    arguments: int
    outputs: int
    temporaries: int
    count: Count
    collectives: list[Collective]
    seconds: float
    refusal: str = ""
    host: int = 0


def describe(config: Any, target: Target = HERE) -> Abstract:
    """The phases of a configuration whose mesh has no -1.

    Args:
      config: the whole configuration, checked.
      target: whose compiler is to be asked.
    """
    mesh = make_mesh(config.mesh, target.devices({a: config.mesh[a] for a in AXES}))
    pipeline = (PIPELINES | PLANNED)[config.model.name](config, mesh)
    kernel = make_kernel(config.sampler, pipeline.prediction)
    source = None
    if config.data_term.weight:  # as from a cache of latents: they come with the chunk
        source = DataSource(("",), lambda records, keys: records)
    objective = make_objective(config, pipeline, kernel, source, mesh)
    tx = make_optimizer(config.optimizer, total_updates(config))
    weights = describe_weights(config, pipeline, tx, mesh)
    lora = bool(config.lora.rank)
    frozen = (
        _shaped(weights.shapes["params"], weights.shardings["params"]) if lora else {}
    )
    reference = None
    if config.policy.kl_weight:
        trained = None if lora else weights.abstract.params
        reference = (trained, frozen)
    chunk = _chunk(config, mesh, pipeline, kernel)
    size = chunk_size(config, mesh)
    total = config.prompts.per_epoch * config.prompts.group_size // size
    chunks = total // config.train.minibatches
    if config.policy.weight and config.policy.term == "sparse_rwr":
        chunks = -(-kept_samples(config) // (config.train.minibatches * size))
    update = Phase(
        "update",
        jit_update(config, objective, tx, weights.abstract),
        (weights.abstract, frozen, reference, (chunk,) * chunks),
        config.train.minibatches * config.train.inner_epochs,
        0,
    )
    phases = (update,)
    if config.policy.weight:
        copies = _rollout_weights(weights, frozen)
        times = _split(mesh, step_times(kernel, size).shape, jnp.float32, 1)
        steps = len(draw_trained_steps(config, kernel, 0, 1))
        kept = _split(mesh, (steps, size), jnp.int32, 1)
        arguments = (*copies, chunk.keys, chunk.cond, times, kept)
        rollout = Phase("rollout", make_sample(objective), arguments, total, 0)
        phases = (rollout, update)
    about = (mesh, weights, frozen, chunk, chunks, phases, target, AS_SHAPED)
    return _sized(Abstract(config, *about, texts_of(config)))


def _sized(plan: Abstract) -> Abstract:
    """The plan with the bytes of its arguments, as its compiler lays them out."""
    sizes = AS_SHAPED
    if plan.target.chip is not None:
        sizes = laid_out((plan.chunk, [phase.arguments for phase in plan.phases]))
    phases = tuple(
        phase._replace(bytes=bytes_per_device(phase.arguments, sizes))
        for phase in plan.phases
    )
    return plan._replace(phases=phases, sizes=sizes)


def _rollout_weights(weights: Weights, frozen: Any) -> tuple[Any, Any]:
    """(trained, frozen) as config.rollout lays them out."""
    state: TrainState = weights.abstract
    rules = rollout_rules(weights.config)
    if rules is None:
        return state.params, frozen

    def copy(part: str) -> Any:
        names, shapes = weights.pipeline.axes[part], weights.shapes[part]
        places = params_shardings(names, shapes, weights.mesh, rules)
        dtype, precise = weights.config.rollout.dtype, weights.pipeline.precise
        return _shaped(
            jax.eval_shape(lambda t: at_most(t, dtype, precise), shapes), places
        )

    trained = copy(weights.trained)
    return trained, copy("params") if weights.trained == "lora" else frozen


def _shaped(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        shardings,
    )


def _split(mesh: Mesh, shape: tuple, dtype: Any, axis: int = 0) -> Any:
    """An array split over the batch axes along `axis`."""
    spec = P(*(None,) * axis, BATCH)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _chunk(config: Any, mesh: Mesh, pipeline: Any, kernel: Any) -> Minibatch:
    """The shapes of one microbatch as the update gets it."""
    size, latent = chunk_size(config, mesh), pipeline.latent_shape
    steps = len(draw_trained_steps(config, kernel, 0, 1))
    split = lambda shape, dtype=jnp.float32, axis=0: _split(mesh, shape, dtype, axis)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    keys = split((size,), key)
    like = lambda u: split((size, *u.shape[1:]), u.dtype)  # noqa: E731
    cond = jax.tree.map(like, pipeline.uncond)
    stored = stored_states(steps, len(kernel.levels))
    states, flat = split((stored, size, *latent), axis=1), split((steps, size), axis=1)
    index, memory = split((steps, size), jnp.int32, 1), None
    if kernel.remember is not None:
        memory = Memory(split((steps, size, *latent), axis=1), flat)
    kept = Trajectory(
        *(states, index, flat, split((steps, size, 2), axis=1), index, memory)
    )
    pair = (split((size, *latent)), cond) if config.data_term.weight else (None, None)
    if not config.policy.weight:
        return Minibatch(keys, keys, cond, *pair, None, None, None)
    weighted = config.policy.term in WEIGHTED
    x0 = split((size, *latent)) if weighted else None
    kept, old = (None, None) if weighted else (kept, flat)
    chunk = Minibatch(keys, keys, cond, *pair, kept, old, split((size,)), x0)
    if config.policy.term == "sparse_rwr" and config.data_term.weight:
        return chunk._replace(data_weights=split((size,)))
    return chunk


def compile_phase(phase: Phase, mesh: Mesh) -> Compiled:
    """Lowers and compiles one phase, and reads what it needs.

    Args:
      phase: its arguments say where they live.
      mesh: of the run.
    """
    start = time.monotonic()
    lowered = phase.function.lower(*phase.arguments)
    work = count(phase.function, *phase.arguments)
    try:
        with unsaved() if mesh.devices.flat[0].platform != "cpu" else nullcontext():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.monotonic() - start
        return _too_large(phase, work, seconds, str(error).splitlines()[0], error)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    return Compiled(
        phase,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        work,
        collectives(compiled.as_text(), dict(mesh.shape)),
        seconds,
        host=memory.host_temp_size_in_bytes,
    )


def _too_large(
    phase: Phase, work: Count, seconds: float, text: str, error: Exception
) -> Compiled:
    """What is known of a phase that the compiler refused for its memory."""
    asked = re.search(r"(?:Used |\()([\d.]+)([KMG])", text)
    if "RESOURCE_EXHAUSTED" not in text or asked is None:
        raise error
    size = float(asked[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[asked[2]]
    # "Used" is of everything, "required for HLO temporaries" of these alone.
    temporaries = size if "temporaries" in text else size - phase.bytes
    return Compiled(
        phase, phase.bytes, 0, max(int(temporaries), 0), work, [], seconds, text
    )
