"""The plan as text: memory, work, traffic, time and cost, and where each is from."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from ddrl_jax.chips import Chip
from ddrl_jax.plan.links import Links
from ddrl_jax.plan.lowered import Abstract, Compiled
from ddrl_jax.plan.memory import MARGIN, fits, own, peak, resident, uncounted
from ddrl_jax.plan.roofline import Bounds, bounds, sent
from ddrl_jax.plan.search import LEAST, Suggestion
from ddrl_jax.plan.target import Target

GIB = 2.0**30
HOUR = 3600.0


def sheet(
    plan: Abstract, compiled: list[Compiled], links: Links, efficiency: float
) -> str:
    """The whole plan.

    Args:
      plan: the run.
      compiled: its phases, the update last.
      links: its mesh on the chips it is planned for.
      efficiency: share of the peak that products are taken to reach.
    """
    times = [_bounds(plan, found, links, efficiency) for found in compiled]
    chip = links.chip
    lines = [*_head(plan, links), "", *_memory(plan, compiled, chip)]
    for found, bound in zip(compiled, times, strict=True):
        lines += ["", *_phase(plan, found, bound, chip, efficiency)]
    lines += ["", *_cost(plan, compiled, times), *_assumed(links)]
    return "\n".join(lines)


def _head(plan: Abstract, links: Links) -> Iterator[str]:
    mesh, config = dict(plan.mesh.shape), plan.config
    kind = "hosts" if links.chip.ici_links == 1 else "slices"
    over = f" in {links.count} {kind}" if links.count > 1 else ""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    network = sum(a.size for a in jax.tree.leaves(plan.weights.shapes["params"]))
    trained = sum(a.size for a in jax.tree.leaves(plan.weights.abstract.params))
    yield (
        f"{config.name} on {math.prod(mesh.values())} x {links.chip.name}{over}: mesh "
        f"{sizes}; "
        f"remat {config.model.remat}, {config.model.dtype}"
    )
    yield f"weights {network:,}, of which trained {trained:,}"


def _memory(plan: Abstract, compiled: list[Compiled], chip: Chip) -> Iterator[str]:
    compiler = f"compiler for {plan.target.name}"
    exact = "shapes and shardings" + (", in tiles" if plan.sizes else "")
    yield f"memory a device, GiB ({exact}; temporaries: {compiler})"
    stays, peaks = resident(plan), {}
    for name, size in stays.items():
        yield _row(name, size)
    yield from (f"  not counted, {what}" for what in uncounted(plan))
    for found in compiled:
        for name, size in own(plan, found).items():
            if size or name.startswith("temporaries"):
                yield _row(name, size)
        peaks[found.phase.name] = peak(plan, found)
        yield _row(f"peak of the {found.phase.name}", peaks[found.phase.name])
        if found.host:
            yield _row("beside it in the host", found.host)
    most = max(peaks.values())
    room = MARGIN * chip.hbm_bytes - most
    verdict = "fits, with" if fits(most, chip) else "DOES NOT FIT, short of"
    yield (
        f"  {verdict} {abs(room) / GIB:.2f} GiB, of {chip.hbm_bytes / GIB:.1f} "
        f"({1 - MARGIN:.0%} are left to the runtime)"
    )
    yield from (f"  {found.refusal}" for found in compiled if found.refusal)
    if widened(plan):
        yield "  (the CPU compiler keeps float32 copies of bfloat16; others do not)"


def widened(plan: Abstract) -> bool:
    """Whether the compiler asked computes the plan's bfloat16 products in float32."""
    return plan.target.chip is None and plan.config.model.dtype == "bfloat16"


def _row(name: str, size: int) -> str:
    return f"  {name:28s} {size / GIB:9.3f}"


def network_items(plan: Abstract, phase: str) -> int:
    """Calls of the network in one call of a phase, recomputations left out."""
    if phase == "rollout":
        return plan.config.sampler.steps
    kept = plan.chunk.old_log_prob
    steps = 0 if kept is None else kept.shape[0]
    steps += plan.chunk.x0 is not None
    data = plan.config.data_term
    steps += (max(steps, 1) if data.every_step else 1) if data.weight else 0
    return steps * plan.chunks


def _bounds(plan: Abstract, found: Compiled, links: Links, efficiency: float) -> Bounds:
    shapes = jax.tree.leaves(plan.weights.shapes["params"])
    width = 2 if plan.config.model.dtype == "bfloat16" else 4
    return bounds(
        found,
        links,
        efficiency=efficiency,
        widened=widened(plan),
        weights=width * sum(a.size for a in shapes),
        items=network_items(plan, found.phase.name),
    )


def _phase(
    plan: Abstract, found: Compiled, bound: Bounds, chip: Chip, efficiency: float
) -> Iterator[str]:
    devices = plan.mesh.size
    flops = found.count.flops / devices
    yield (
        f"{found.phase.name}: {found.phase.calls} calls an epoch, compiled in "
        f"{found.seconds:.0f} s; a device, a call:"
    )
    again = found.count.recomputed / max(found.count.flops, 1)
    yield (
        f"  FLOPs {flops:.3e} ({again:.0%} recomputed)      {bound.flops:10.2f} s at "
        f"{efficiency:.0%} of {chip.flops / 1e12:.0f} TFLOP/s"
    )
    if found.count.repeated:
        rest = found.count.repeated + found.count.model_flops
        yield (
            f"  of the rest {found.count.repeated / rest:.0%} because context divides "
            "no convolution: its devices do it alike"
        )
    size = bound.memory * chip.hbm_bandwidth
    yield (
        f"  memory traffic {size / GIB:12.1f} GiB           {bound.memory:10.2f} s at "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s{_written_out(plan)}"
    )
    along: dict[tuple[str, ...], float] = {}
    for (axes, _), amount in sent(found, widened(plan)).items():
        along[axes] = along.get(axes, 0.0) + amount
    for axes, total in sorted(along.items()):
        kinds: dict[str, int] = {}
        for c in found.collectives:
            if c.axes == axes:
                kinds[c.kind] = kinds.get(c.kind, 0) + c.count
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        yield (
            f"  sent along {'+'.join(axes):22s} {total / GIB:9.3f} GiB "
            f"{bound.links[axes]:9.2f} s  ({counts})"
        )
    if found.refusal:
        yield "  sent: not known of what the compiler refused; the time is without it"
    yield f"  at least {bound.seconds:.2f} s, bound by {bound.term}"


def _written_out(plan: Abstract) -> str:
    """What the count of memory traffic takes attention for."""
    fused = plan.target.chip is not None  # "auto" is splash there
    return "" if fused else " (attention weights as if written out)"


def _cost(plan: Abstract, compiled: list[Compiled], times: list[Bounds]):
    config: Any = plan.config
    pairs = zip(compiled, times, strict=True)
    epoch = sum(found.phase.calls * bound.seconds for found, bound in pairs)
    samples = config.prompts.per_epoch * config.prompts.group_size
    total = config.train.epochs * epoch / HOUR
    refused = any(found.refusal for found in compiled)
    again = config.policy.weight and config.policy.old_log_prob == "recompute"
    sends = ", nor the second look at log-probs of the rollout" if again else ""
    sends += ", nor what a refused phase sends" if refused else ""
    yield (
        f"an epoch of {samples} samples: {epoch:.0f} s, {samples * HOUR / epoch:,.0f} "
        f"samples an hour (rewards, decoding and evaluation are not in it{sends})"
    )
    yield (
        f"the run of {config.train.epochs} epochs: {total:.1f} hours, "
        f"{total * plan.mesh.size:,.0f} accelerator hours"
    )


def _assumed(links: Links) -> Iterator[str]:
    """What the times of the links rest on."""
    across = "a group across {} uses the network share of each of its chips"
    if links.chip.ici_links == 1:
        yield "assumed: " + across.format("hosts")
        return
    yield (
        "assumed: each mesh axis is one ring of the torus, closed and used both ways "
        "(over a whole plane it would have more links); " + across.format("slices")
    )
    if not links.on_whole_axes():
        shape = " x ".join(map(str, links.torus()))
        yield (
            f"note: these mesh axes share axes of a {shape} torus: there they send "
            "more slowly than assumed"
        )


def suggestion_line(found: Suggestion | None, chip: Chip, target: Target) -> str:
    """What the search found, as a line with the overrides that bring it."""
    if found is None:
        return "suggestion: no mesh of these devices was shown to fit"
    sizes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in found.mesh.items())
    offload = (
        "; remat=offload keeps as little on the device, which a CPU can not show"
        if found.remat == LEAST and target.chip is None
        else ""
    )
    return (
        f"suggestion: the smallest that fits is {math.prod(found.mesh.values())} "
        f"devices, {sizes} --config.model.remat={found.remat}: {found.peak / GIB:.1f} "
        f"of {chip.hbm_bytes / GIB:.1f} GiB ({found.compilations} programs compiled to "
        f"show it{offload})"
    )
