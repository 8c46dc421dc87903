"""The smallest mesh and the cheapest remat on which a run fits, guessed and then shown.

Weights, optimizer and gradients of another mesh follow from the sharding table exactly.
Temporaries beyond gradients are activations; they are taken from a compiled plan and
scaled by the share of the tokens that a device has. A guess is only suggested after its
rollout and update have been compiled.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from ddrl_jax.check_network import video_tokens
from ddrl_jax.chips import Chip
from ddrl_jax.errors import UserError
from ddrl_jax.models.attention import DIVIDING
from ddrl_jax.plan.links import lay
from ddrl_jax.plan.lowered import Abstract, Compiled, compile_phase, describe
from ddrl_jax.plan.memory import fits, own, peak, resident
from ddrl_jax.plan.target import HERE, Target
from ddrl_jax.sharding import AXES, Rules, spec_for, table
from ddrl_jax.weights import rollout_rules

TRIES = 4  # meshes compiled, at most
LEAST = "full"  # the remat policy that keeps least
# From what keeps more than LEAST, and computes less again, to what keeps everything.
FASTER = ("named", "dots", "none")
# Computes what "named" does and keeps it in the host's memory, which the CPU's compiler
# does not tell from the device's.
OUTSIDE = "offload"
# Rows of `resident` that are laid out as what is trained.
LIKE_WEIGHTS = ("parameters", "reference policy", "optimizer", "average of the weights")


class Suggestion(NamedTuple):
    """A mesh and a policy whose phases were compiled and fit.

    Attributes:
      mesh: axis -> size.
      remat: the policy that computes least again, of those that fit.
      peak: bytes a device.
      compilations: phases compiled in the search.
    """

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


def suitable(
    config: Any, mesh: dict[str, int], chip: Chip, target: Target = HERE
) -> bool:
    """Whether samples, heads, tokens and slices divide over a mesh of the target."""
    minibatch = config.prompts.per_epoch * config.prompts.group_size
    minibatch //= config.train.minibatches
    ways = mesh["tensor"] * mesh["context"]
    if config.model.name == "video_dit":
        tokens = video_tokens(config.model)
        if config.model.heads % ways or tokens % mesh["context"]:
            return False
    if config.model.attention in DIVIDING and mesh["context"] == 1:
        return False
    share = minibatch // _shares(mesh)
    if minibatch % _shares(mesh) or share % min(config.train.microbatch, share):
        return False
    try:
        links = lay(chip, mesh)
    except UserError:
        return False
    return target.chip is None or bool(links.torus())


class Shown(NamedTuple):
    """A plan with both phases compiled; on another mesh its parts scale by known laws.

    Attributes:
      plan: the run.
      compiled: its phases, the update last.
    """

    plan: Abstract
    compiled: list[Compiled]

    @property
    def peak(self) -> int:
        """Bytes a device, of the phase that needs most."""
        return max(peak(self.plan, found) for found in self.compiled)

    def weights(self, mesh: dict[str, int]) -> float:
        """Bytes a device of what is trained, once, on another mesh."""
        return self._tree(self.plan.weights.trained, mesh)

    def _tree(self, part: str, mesh: dict[str, int], rules: Rules | None = None):
        weights = self.plan.weights
        sizes: Any = AbstractMesh(tuple(mesh.values()), tuple(mesh))
        rules = table(self.plan.config.sharding) if rules is None else rules
        shapes = jax.tree.leaves(weights.shapes[part])
        names = jax.tree.leaves(
            weights.pipeline.axes[part], is_leaf=lambda a: isinstance(a, tuple)
        )
        total = 0.0
        for leaf, axes in zip(shapes, names, strict=True):
            spec = spec_for(axes, leaf.shape, sizes, rules)
            used = jax.tree.leaves(tuple(spec))
            total += leaf.size * leaf.dtype.itemsize / math.prod(mesh[a] for a in used)
        return total

    def stays(self, mesh: dict[str, int]) -> float:
        """Bytes a device that stay for the whole epoch, on another mesh.

        A row of `resident` that no law is known of is whole on every device.
        """
        here = dict(self.plan.mesh.shape)
        trained = self.weights(mesh) / self.weights(here)
        laws: dict[str, float] = dict.fromkeys(LIKE_WEIGHTS, trained)
        laws["frozen base"] = self._tree("params", mesh) / self._tree("params", here)
        laws["trajectories of the epoch"] = _shares(here) / _shares(mesh)
        rows = resident(self.plan)
        return sum(size * laws.get(name, 1.0) for name, size in rows.items())

    def guess(self, mesh: dict[str, int]) -> float:
        """Peak in bytes a device on another mesh, with the same remat."""
        here = dict(self.plan.mesh.shape)
        tokens = here["context"] / mesh["context"]
        *others, update = self.compiled
        phases = [self._rollout(found, mesh, tokens) for found in others]
        phases.append(self._update(update, mesh, tokens))
        return self.stays(mesh) + max(phases)

    def _update(self, found: Compiled, mesh: dict[str, int], tokens: float) -> float:
        """Its own part on another mesh: sums of the gradients, and activations."""
        trained = [self.weights(m) for m in (dict(self.plan.mesh.shape), mesh)]
        copy, results, temporaries = own(self.plan, found).values()
        # The sum of the gradients, and those of one microbatch.
        sums = min(2 * trained[0], temporaries)
        scaled = sums * trained[1] / trained[0]
        return copy + results + scaled + (temporaries - sums) * tokens

    def _rollout(self, found: Compiled, mesh: dict[str, int], tokens: float) -> float:
        """Its own part on another mesh."""
        here, rules = dict(self.plan.mesh.shape), rollout_rules(self.plan.config)
        copy, results, temporaries = own(self.plan, found).values()
        if rules is not None:
            parts = dict.fromkeys((self.plan.weights.trained, "params"))
            sizes = [sum(self._tree(p, m, rules) for p in parts) for m in (here, mesh)]
            copy *= sizes[1] / sizes[0]
        return copy + results + temporaries * tokens


def _shares(mesh: dict[str, int]) -> int:
    """Parts that a batch is split into."""
    return mesh["data"] * mesh["fsdp"]


def suggest(shown: Shown, devices: int, chip: Chip) -> Suggestion | None:
    """Searches device counts from the smallest; compiles what may fit.

    A mesh that was compiled, also the configured one, is not tried again: where it fits
    it is what smaller ones are looked for from.

    Args:
      shown: the run as configured, compiled.
      devices: that there are, at most.
      chip: whose memory it has to fit in.

    Returns:
      None where nothing was shown to fit.
    """
    known, tried = shown, 0
    if shown.plan.config.model.remat != LEAST:
        known = _compiled(shown.plan, dict(shown.plan.mesh.shape), chip)
        tried = len(known.compiled)
    seen, counts = [dict(known.plan.mesh.shape)], _divisors(devices)
    best: Shown | None = None
    if fits(known.peak, chip):
        best, counts = known, [n for n in counts if n < known.plan.mesh.size]
    for _ in range(TRIES):
        mesh = _smallest(known, counts, chip, seen)
        if mesh is None:
            break
        # What was compiled last is the better start for the next guess.
        known = _compiled(known.plan, mesh, chip)
        seen.append(mesh)
        tried += len(known.compiled)
        if fits(known.peak, chip):
            best = known
            counts = [n for n in counts if n < known.plan.mesh.size]
        else:
            counts = [n for n in counts if n >= known.plan.mesh.size]
    return None if best is None else _faster(best, tried, chip)


def _compiled(plan: Abstract, mesh: dict[str, int], chip: Chip) -> Shown:
    """The run on another mesh with LEAST, compiled: the rollout where the update fits.

    The update needs more in most runs, and half the minutes are saved where it does not
    fit.
    """
    plan = described(plan, mesh, LEAST)
    *others, update = plan.phases
    shown = Shown(plan, [compile_phase(update, plan.mesh)])
    if not fits(shown.peak, chip):
        return shown
    before = [compile_phase(phase, plan.mesh) for phase in others]
    return Shown(plan, [*before, *shown.compiled])


def described(plan: Abstract, mesh: dict[str, int], remat: str) -> Abstract:
    """The run on another mesh with another remat policy.

    In as few slices as the chip allows, but for the mesh that the plan is of.
    """
    target, config = plan.target, plan.config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.model.remat = remat
    asked = mesh == {axis: plan.config.mesh[axis] for axis in AXES}
    return describe(config, target if asked else target._replace(slices=0))


def _smallest(
    known: Shown, counts: list[int], chip: Chip, seen: list[dict[str, int]]
) -> dict[str, int] | None:
    """The mesh of fewest devices that should fit; of these the least divided one.

    One of `seen` has been compiled: no guess says more of it.
    """
    config = known.plan.config
    for count in counts:
        fitting = [
            mesh
            for mesh in meshes(count)
            if mesh not in seen and suitable(config, mesh, chip, known.plan.target)
            if fits(known.guess(mesh), chip)
        ]
        order = ("tensor", "context", "fsdp")
        if fitting:
            return min(fitting, key=lambda mesh: [mesh[axis] for axis in order])
    return None


def _faster(best: Shown, tried: int, chip: Chip) -> Suggestion:
    """The same mesh with the policy that computes least again of those that fit.

    Each policy keeps what the one before it keeps, and more: the first that does not
    fit ends the search, but for the one that keeps it outside the device. No policy
    matters to the rollout, which keeps nothing.
    """
    found = Suggestion(dict(best.plan.mesh.shape), LEAST, best.peak, tried)
    for remat in FASTER:
        tried, size = tried + 1, _with(best, remat)
        if not fits(size, chip):
            break
        found = found._replace(remat=remat, peak=size)
    if found.remat == LEAST and best.plan.target.chip is not None:
        tried, size = tried + 1, _with(best, OUTSIDE)
        if fits(size, chip):
            found = found._replace(remat=OUTSIDE, peak=size)
    return found._replace(compilations=tried)


def _with(best: Shown, remat: str) -> int:
    """Its peak with another policy, in bytes a device; the update is compiled."""
    mesh = dict(best.plan.mesh.shape)
    plan = described(best.plan, mesh, remat)
    update = compile_phase(plan.phases[-1], plan.mesh)
    # What of a rollout's arguments stays anyway, only the plan it is from can tell.
    before = [peak(best.plan, found) for found in best.compiled[:-1]]
    return max([*before, peak(plan, update)])
