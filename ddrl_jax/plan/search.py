"""The smallest mesh on which a run fits, guessed from one compiled plan and then shown.

Weights, optimizer and gradients of another mesh follow from the sharding table exactly.
Temporaries beyond gradients are activations; they are taken from the compiled plan and
scaled by the share of the tokens that a device has. A guess is only suggested after its
update has been compiled.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from ddrl_jax.config_rules import RULES
from ddrl_jax.plan.lowered import (
    Abstract,
    Compiled,
    bytes_per_device,
    compile_phase,
    describe,
)
from ddrl_jax.sharding import AXES, spec_for, table

FASTER = ("none", "dots")  # remat policies from the fastest on
TRIES = 4  # compilations, at most, until a guess has been shown to fit
MARGIN = 0.92  # of the memory: the rest is the runtime's, and fragments


class Suggestion(NamedTuple):
    """A mesh whose update was compiled and fits."""

    mesh: dict[str, int]
    remat: str
    peak: int
    compilations: int


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            for tensor in _divisors(devices // data // fsdp):
                rest = devices // data // fsdp // tensor
                yield dict(zip(AXES, (data, fsdp, tensor, rest), strict=True))


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def fits(peak: float | int, memory: float) -> bool:
    """Whether a program of this peak fits into a device's memory."""
    return peak <= MARGIN * memory


def suitable(config: Any, mesh: dict[str, int]) -> bool:
    """Whether heads and samples divide over a mesh."""
    shares = mesh["data"] * mesh["fsdp"]
    minibatch = config.prompts.per_epoch * config.prompts.group_size
    minibatch //= config.train.minibatches
    if minibatch % shares or config.model.name != "video_dit":
        return minibatch % shares == 0
    return config.model.heads % (mesh["tensor"] * mesh["context"]) == 0


class Scaling(NamedTuple):
    """What the update of a compiled plan needs, in parts that scale by known laws."""

    plan: Abstract
    base: Compiled

    def weights(self, mesh: dict[str, int]) -> float:
        """Bytes a device of what is trained, once."""
        return self._tree(self.plan.weights.trained, mesh)

    def _tree(self, part: str, mesh: dict[str, int]) -> float:
        weights = self.plan.weights
        sizes: Any = AbstractMesh(tuple(mesh.values()), tuple(mesh))
        rules, total = table(self.plan.config.sharding), 0.0
        shapes = jax.tree.leaves(weights.shapes[part])
        names = jax.tree.leaves(
            weights.pipeline.axes[part], is_leaf=lambda a: isinstance(a, tuple)
        )
        for leaf, axes in zip(shapes, names, strict=True):
            spec = spec_for(axes, leaf.shape, sizes, rules)
            used = jax.tree.leaves(tuple(spec))
            total += leaf.size * leaf.dtype.itemsize / math.prod(mesh[a] for a in used)
        return total

    def peak(self, mesh: dict[str, int]) -> float:
        """Bytes a device of the update on another mesh, with the same remat."""
        plan, here = self.plan, dict(self.plan.mesh.shape)
        trained = [self.weights(m) for m in (here, mesh)]
        state = bytes_per_device(plan.weights.abstract) / trained[0] * trained[1]
        frozen = self._tree("params", mesh) if plan.config.lora.rank else 0.0
        shares = [m["data"] * m["fsdp"] for m in (here, mesh)]
        kept = plan.chunks * bytes_per_device(plan.chunk) * shares[0] / shares[1]
        # The sum of the gradients, and those of one microbatch.
        activations = max(self.base.temporaries - 2 * trained[0], 0)
        activations *= here["context"] / mesh["context"]
        return state + frozen + kept + 2 * trained[1] + activations


def suggest(
    plan: Abstract, base: Compiled, devices: int, memory: float
) -> Suggestion | None:
    """Searches device counts from the smallest; compiles what may fit.

    Args:
      plan: the run as configured.
      base: its compiled update.
      devices: that there are, at most.
      memory: bytes of a device.

    Returns:
      None where nothing was shown to fit.
    """
    scaling, tried, small = Scaling(plan, base), 0, 1
    while tried < TRIES:
        mesh = _smallest(scaling, small, devices, memory)
        if mesh is None:
            return None
        other = described(plan.config, mesh, plan.config.model.remat)
        found = compile_phase(other.phases[-1], other.mesh)
        tried += 1
        if fits(found.peak, memory):
            return _faster(other, mesh, found.peak, memory, tried)
        # What did not fit is the better start for the next guess.
        scaling, small = Scaling(other, found), math.prod(mesh.values())
    return None


def described(config: Any, mesh: dict[str, int], remat: str) -> Abstract:
    """The run on another mesh with another remat policy."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.model.remat = remat
    return describe(config)


def _smallest(
    scaling: Scaling, least: int, devices: int, memory: float
) -> dict[str, int] | None:
    """The mesh of fewest devices that should fit; of these the least divided one."""
    for count in (n for n in _divisors(devices) if n >= least):
        fitting = [
            mesh
            for mesh in meshes(count)
            if suitable(scaling.plan.config, mesh) and fits(scaling.peak(mesh), memory)
        ]
        order = ("tensor", "context", "fsdp")
        if fitting:
            return min(fitting, key=lambda mesh: [mesh[axis] for axis in order])
    return None


def _faster(
    plan: Abstract, mesh: dict[str, int], peak: int, memory: float, tried: int
) -> Suggestion:
    """The same mesh with the policy that recomputes least, if that fits as well."""
    config, known = plan.config, RULES["model.remat"].names
    for remat in (name for name in FASTER if name in known):
        if remat == config.model.remat:
            break
        other = described(config, mesh, remat)
        found, tried = compile_phase(other.phases[-1], other.mesh), tried + 1
        if fits(found.peak, memory):
            return Suggestion(mesh, remat, found.peak, tried)
    return Suggestion(mesh, config.model.remat, peak, tried)
