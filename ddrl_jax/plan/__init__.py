"""--mode=plan: what a run needs on accelerators that are not here, before they are."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ddrl_jax.check_config import check_shapes
from ddrl_jax.chips import Chip, chip_named
from ddrl_jax.data.prompts import require_room
from ddrl_jax.errors import UserError
from ddrl_jax.plan.links import lay
from ddrl_jax.plan.lowered import compile_phase, describe
from ddrl_jax.plan.memory import embedding_bytes
from ddrl_jax.plan.roofline import EFFICIENCY
from ddrl_jax.plan.search import Shown, suggest
from ddrl_jax.plan.sheet import sheet, suggestion_line
from ddrl_jax.plan.target import Target, choose
from ddrl_jax.sharding import AXES
from ddrl_jax.weights import tell_undivided


class Settings(NamedTuple):
    """The --plan.* flags, understood."""

    devices: int
    chip: Chip
    efficiency: float
    suggest: bool
    slices: int  # 0: as few as the chip allows
    target: Target


def plan_mode(config: Any, flags: Mapping[str, str | None]) -> None:
    """Prints the plan of a configuration.

    Args:
      config: the whole configuration; of a diffusers model only the JSON is
        read.
      flags: "devices", "chip", "efficiency", "suggest", "slices" and "compiler" as on
        the command line.

    Raises:
      UserError: a flag that is missing or wrong, a mesh that does not fit the devices.
    """
    settings = read(flags)
    # First of all: a check of remat "offload" starts JAX.
    placeholders(1 if settings.target.chip else settings.devices)
    check_shapes(config, settings.devices)
    config = _whole_mesh(config, settings.devices)
    links = lay(settings.chip, {a: config.mesh[a] for a in AXES}, settings.slices)
    plan = describe(config, settings.target)
    require_room(plan.texts.count, embedding_bytes(plan))
    tell_undivided(plan.weights)
    compiled = [compile_phase(phase, plan.mesh) for phase in plan.phases]
    print(sheet(plan, compiled, links, settings.efficiency), flush=True)
    if settings.suggest:
        found = suggest(Shown(plan, compiled), settings.devices, settings.chip)
        line = suggestion_line(found, settings.chip, settings.target)
        print(line, flush=True)


def read(flags: Mapping[str, str | None]) -> Settings:
    """Understands the flags.

    Raises:
      UserError: names the one that is missing or wrong.
    """
    for name, example in (("devices", "256"), ("chip", "v5p")):
        if not flags.get(name):
            raise UserError(
                f"--plan.{name} is missing",
                got="nothing",
                wanted="what to plan for",
                way_out=f"--plan.{name}={example}",
            )
    chip = chip_named(str(flags["chip"]))
    devices = _number(flags, "devices", int, "a whole number >= 1")
    efficiency = _number(flags, "efficiency", float, "a share of 1", EFFICIENCY)
    wanted = flags.get("suggest") or "true"
    if wanted not in ("true", "false"):
        raise _wrong("suggest", wanted, "true or false")
    slices = _number(flags, "slices", int, "a whole number >= 1", 0)
    for name, right, range_ in (
        ("devices", devices >= 1, "at least 1"),
        ("efficiency", 0 < efficiency <= 1, "a share in (0, 1]"),
        ("slices", slices >= 0, "at least 1, or 0 for as few as the chip allows"),
    ):
        if not right:
            raise _wrong(name, flags[name], range_)
    target = choose(flags.get("compiler"), chip, slices)
    return Settings(devices, chip, efficiency, wanted == "true", slices, target)


def _number(flags, name: str, kind: type, wanted: str, default: Any = None) -> Any:
    given = flags.get(name)
    if given is None:
        return default
    try:
        return kind(given)
    except ValueError as e:
        raise _wrong(name, given, wanted) from e


def _wrong(name: str, got: object, wanted: str) -> UserError:
    return UserError(
        f"--plan.{name} has a value that can not be used",
        got=repr(got),
        wanted=wanted,
        way_out=f"correct --plan.{name}",
    )


def placeholders(devices: int) -> None:
    """Gives this process so many CPU devices to compile for; nothing runs on them.

    It has to be said before JAX starts, which is why plan is a mode of the program and
    not a function of a running one.

    Raises:
      UserError: JAX runs already, with fewer devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # it runs: enough where a test has started it
        pass
    if jax.device_count() < devices:
        raise UserError(
            "the plan needs more devices than this process was started with",
            got=f"{jax.device_count()} placeholder devices",
            wanted=f"{devices}",
            way_out="unset XLA_FLAGS and JAX_NUM_CPU_DEVICES, and start again",
        )


def _whole_mesh(config: Any, devices: int) -> Any:
    """The configuration with a size in place of -1."""
    config = config.copy_and_resolve_references()
    sizes = dict(config.mesh)
    known = -math.prod(sizes.values())
    free = {axis: devices // known for axis, size in sizes.items() if size == -1}
    config.mesh.update(free)
    return config
